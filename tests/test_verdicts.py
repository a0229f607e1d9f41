"""A kernel runs unasked only where it was seen right: checks, verdicts, and where they are kept."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import threading
import timeit
from pathlib import Path

import pytest
import torch

from jdkd import _backend, _dispatch, _ext, _verdicts, check
from jdkd._verdicts import Compared, Subject
from jdkd.functional import pkd_loss
from jdkd.notices import Notice

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
FULL = torch.zeros(2)
OURS = Subject("toy", "run", "cpu", CPU, torch.float32)
pytestmark = pytest.mark.usefixtures("nothing_known")


@pytest.fixture
def toy(monkeypatch):
    """An operator whose compiled backend errs by what the fixture's ``error`` says; it counts its checks."""

    class Toy:
        error, checks = 0.0, 0

        def check(self, backend, device, dtype):
            Toy.checks += 1
            if isinstance(self.error, Exception):
                raise self.error
            yield Compared("the sum", torch.full((3,), 1 + self.error), torch.ones(3))

    found = Toy()
    monkeypatch.setattr(_backend, "_table", {})
    monkeypatch.setattr(_ext, "why_missing", lambda op=None, device="cpu": None)
    _backend.register("toy", "cpu", dtypes=(torch.float32,), checks={"run": found.check})
    _backend.register("toy", "reference")
    return found


def anew() -> None:
    """What another process knows."""
    _verdicts._known.clear()
    _backend._chosen.clear()


def chosen() -> str:
    return _backend.select("toy", FULL, "run")


def kept() -> list[Path]:
    return sorted(Path(os.environ["JDKD_CACHE"]).rglob("*.json"))


def test_what_is_seen_right_runs_and_is_checked_once(toy):
    assert [chosen(), chosen()] == ["cpu", "cpu"] and toy.checks == 1
    anew()
    assert chosen() == "cpu" and toy.checks == 1  # read from the cache
    assert _verdicts.known(OURS).cached
    (file,) = kept()
    assert json.loads(file.read_text())["environment"] == _verdicts.environment(CPU)


@pytest.mark.parametrize("error", [0.5, float("nan"), float("inf")])
def test_what_is_wrong_is_left_out_and_said_once_with_what_to_report(toy, error):
    toy.error = error
    with pytest.warns(
        Notice, match=r"cpu toy \(run, float32\) is left out, since it is wrong.*the sum errs by"
    ) as told:
        assert [chosen(), chosen()] == ["reference", "reference"]
    assert len(told) == 1
    for value in _verdicts.environment(CPU).values():
        assert value in str(told[0].message)
    anew()
    assert chosen() == "reference" and toy.checks == 1  # the verdict is kept, and said before


@pytest.mark.parametrize("error", [RuntimeError("ptxas died"), AssertionError(), KeyError("PRECISION")])
def test_what_cannot_be_checked_is_left_out_for_this_process_only(toy, error):
    toy.error = error
    with pytest.warns(Notice, match=f"could not be checked on this device: {type(error).__name__}"):
        assert chosen() == "reference"
    assert chosen() == "reference" and toy.checks == 1 and kept() == []
    anew()
    toy.error = 0.0
    assert chosen() == "cpu"


def test_a_kernel_without_a_check_is_never_a_default(toy):
    _backend.register("toy", "cpu", dtypes=(torch.float32,))
    assert chosen() == "reference"


def test_every_kernel_of_the_package_has_checks():
    check.load_operators()
    kernels = [(op, backend) for op, row in _backend._table.items() for backend in row if backend != "reference"]
    assert kernels
    for op, backend in kernels:
        assert _backend.subjects(op, backend, CPU), f"{op} / {backend}"


@pytest.mark.parametrize("changed", ["sources", "driver", "torch", "device"])
def test_another_environment_is_checked_anew(toy, monkeypatch, changed):
    chosen()
    anew()
    other = _verdicts.environment(CPU) | {changed: "x"}
    monkeypatch.setattr(_verdicts, "environment", lambda device: other)
    assert chosen() == "cpu" and toy.checks == 2


def test_the_hash_is_of_what_is_installed(monkeypatch, tmp_path):
    before = _verdicts._sources()
    assert before == _verdicts._sources()
    for room in ("kernels", "jdkd/ops", "jdkd/reference"):
        (tmp_path / room).mkdir(parents=True)
    monkeypatch.setattr(_verdicts, "__file__", str(tmp_path / "jdkd" / "_verdicts.py"))
    hashes = {before, _verdicts._sources()}
    for room in ("kernels", "jdkd/ops", "jdkd/reference"):
        (tmp_path / room / "pearson.py").write_text("eps = 1e-6")
        hashes.add(_verdicts._sources())
    assert len(hashes) == 5


@pytest.mark.parametrize("content", ["", "{", "[]", '"right"', "\0" * 40, "{}", '{"state": "right"}', "[" * 5000])
def test_a_file_that_cannot_be_read_counts_as_none(toy, content):
    chosen()
    (file,) = kept()
    whole = file.read_text()
    file.write_text(content)
    anew()
    assert chosen() == "cpu" and toy.checks == 2 and file.read_text() == whole


def test_a_right_verdict_of_another_environment_is_not_believed(toy):
    chosen()
    (file,) = kept()
    content = json.loads(file.read_text())
    content["environment"]["sources"] = "of yesterday"
    file.write_text(json.dumps(content))
    anew()
    toy.error = 1.0
    with pytest.warns(Notice):
        assert chosen() == "reference"


@pytest.mark.parametrize("place", ["a file/below", "/proc/nowhere"])
def test_a_cache_that_cannot_be_written_breaks_nothing(toy, monkeypatch, tmp_path, place):
    (tmp_path / "a file").touch()
    monkeypatch.setattr(_verdicts, "cache_folder", lambda: Path(tmp_path, place))
    assert [chosen(), chosen()] == ["cpu", "cpu"] and toy.checks == 1


def test_without_a_variable_the_cache_is_in_the_users_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("JDKD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _verdicts.folder(CPU).is_relative_to(tmp_path / "jdkd" / "verdicts")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert _verdicts.folder(CPU) is None


def test_what_ends_the_process_twice_is_left_alone(toy, monkeypatch):
    ended = []
    for crashes, backend in ((1, "cpu"), (2, "reference")):
        anew()
        for file in kept():
            file.unlink()
        gone = subprocess.Popen(["true"])
        gone.wait()
        with monkeypatch.context() as there:
            there.setattr(_verdicts, "_process", lambda gone=gone: f"{platform.node()}-{gone.pid}")
            ended.append(_verdicts.marked(OURS.name, CPU))
            ended[-1].__enter__()  # and never leaves
        assert len(list(Path(os.environ["JDKD_CACHE"]).rglob("*.checking"))) == crashes
        told = pytest.warns(Notice, match="2 processes ended") if backend == "reference" else contextlib.nullcontext()
        with told:
            assert chosen() == backend
    assert _backend.check(OURS).state == "right"  # asked to, it is tried again
    anew()
    assert chosen() == "cpu"


def test_an_interrupted_check_leaves_nothing_behind(toy):
    def interrupted(*_):
        raise KeyboardInterrupt

    _backend.register("toy", "cpu", dtypes=(torch.float32,), checks={"run": interrupted})
    with pytest.raises(KeyboardInterrupt):
        chosen()
    assert not [*Path(os.environ["JDKD_CACHE"]).rglob("*.*")] and not _verdicts._running


def test_two_processes_at_once_find_the_same(tmp_path):
    script = "import torch; from jdkd.functional import pkd_loss; x = torch.randn(2, 3, 9, 7, requires_grad=True)\n" + (
        "pkd_loss(x, torch.randn(2, 3, 9, 7)).backward(); from jdkd import _backend; print(*_backend._chosen.values())"
    )
    runs = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", script], cwd=ROOT, stdout=-1, stderr=-1, text=True)
        for _ in range(2)
    ]
    for run in runs:
        out, err = run.communicate(timeout=120)
        assert run.returncode == 0 and set(out.split()) <= {"cpu", "reference"}, err
    assert all(json.loads(file.read_text())["state"] == "right" for file in kept())
    assert not [*Path(os.environ["JDKD_CACHE"]).rglob("*.partial"), *Path(os.environ["JDKD_CACHE"]).rglob("*.checking")]


def test_threads_wait_for_one_check(toy):
    begun, go_on = threading.Event(), threading.Event()
    plain = toy.check

    def slow(*where):
        begun.set()
        go_on.wait(10)
        yield from plain(*where)

    _backend.register("toy", "cpu", dtypes=(torch.float32,), checks={"run": slow})
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(chosen())) for _ in range(3)]
    threads[0].start()
    assert begun.wait(10)
    for thread in threads[1:]:
        thread.start()
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert found == ["cpu"] * 3 and toy.checks == 1


def test_a_check_that_asks_for_itself_gets_the_reference(toy):
    def asking(*_):
        yield Compared(chosen(), torch.ones(1), torch.ones(1))

    _backend.register("toy", "cpu", dtypes=(torch.float32,), checks={"run": asking})
    assert chosen() == "cpu" and _verdicts.known(OURS).what == "reference"


def test_the_reference_runs_while_nothing_can_be_checked(toy, monkeypatch):
    monkeypatch.setattr(_verdicts, "_may_check", lambda device: False)
    assert chosen() == "reference" and toy.checks == 0
    monkeypatch.undo()
    with torch._guards.tracing(torch._guards.TracingContext(None)):
        assert not _verdicts._may_check(CPU)
    assert _verdicts._may_check(CPU)


def test_a_choice_stays_the_same_row_while_a_graph_is_captured(toy, monkeypatch):
    def row() -> _dispatch.Candidate:
        return _backend.table_of("toy").choose(_backend.Call("run", CPU, torch.float32))[0]

    before = row()
    assert before.name == "cpu" and row() is before
    _dispatch.forget()
    monkeypatch.setattr(_verdicts, "_may_check", lambda device: False)
    assert row() is before and chosen() == "cpu" and toy.checks == 1


def test_a_captured_graph_checks_nothing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not _verdicts._may_check(torch.device("cuda", 0)) and _verdicts._may_check(CPU)


def test_what_surrounds_the_first_call_changes_no_verdict(toy):
    seen = []

    def looking(*_):
        seen.append(torch.ones(2, 2) @ torch.ones(2, 2))
        yield Compared("product", seen[-1], torch.full((2, 2), 2.0))

    _backend.register("toy", "cpu", dtypes=(torch.float32,), checks={"run": looking})
    with torch.inference_mode(), torch.autocast("cpu"), torch.device("meta"):
        assert chosen() == "cpu"
    assert seen[0].dtype == torch.float32 and seen[0].device == CPU and not seen[0].is_inference()


def test_the_generator_of_random_numbers_is_left_alone():
    state = torch.get_rng_state()
    pkd_loss(torch.ones(1, 2, 3, 3), torch.ones(1, 2, 3, 3))
    assert _verdicts._known and torch.equal(torch.get_rng_state(), state)


def test_what_is_asked_for_runs_and_says_so_if_it_is_known_to_be_wrong(toy):
    with _backend.use_backend("cpu"):
        assert chosen() == "cpu" and toy.checks == 0  # unchecked: that is how it is mended
    toy.error = 1.0
    with pytest.warns(Notice, match="left out"):
        chosen()
    _backend._chosen.clear()
    with pytest.warns(Notice, match="runs because it was asked for, and was found wrong"), _backend.use_backend("cpu"):
        assert chosen() == "cpu"


def test_the_choice_and_its_origin_are_told(toy, monkeypatch):
    def told() -> tuple[str, str]:
        return _backend.choice("toy", "run", CPU, torch.float32)

    unchecked = "default: available, and checked on first use: reference if it is wrong then"
    assert told() == ("cpu", unchecked) and toy.checks == 0
    chosen()
    assert told()[1].startswith("checked: seen right") and "checked by this process" in told()[1]
    anew()
    assert "read from the cache" in told()[1]
    monkeypatch.setenv("JDKD_BACKEND", "reference")
    assert told() == ("reference", "JDKD_BACKEND asks for it")
    monkeypatch.delenv("JDKD_BACKEND")
    toy.error = 1.0
    _backend.check(OURS)
    assert told()[0] == "reference" and "cpu is left out: the sum errs by 1.0e+00" in told()[1]


def test_a_choice_that_is_made_costs_two_lookups(toy):
    """Of the variable, which was one before, and of the choice."""
    chosen()
    bare, ours = (
        min(timeit.repeat(run, number=5_000, repeat=9)) for run in (lambda: os.environ.get("JDKD_BACKEND"), chosen)
    )
    assert ours < 4 * bare
