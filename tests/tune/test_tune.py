"""A way to compute something is taken where it is faster beyond doubt, and nothing is timed twice."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from jdkd import _dispatch, _tuned, env, files
from jdkd._dispatch import Candidate, Table
from jdkd.errors import InputError
from jdkd.notices import Notice
from jdkd.ops import pearson_forms
from jdkd.tune import pearson, plan, regions, session, tune
from jdkd.tune.shapes import Shape, copied, nbytes
from jdkd.tune.timing import LONGEST_SLEEP, BehindASleep, clock_of, rotated

CPU = torch.device("cpu")


class Call(NamedTuple):
    region: str
    device: torch.device = CPU


TABLE = Table("toy", (Candidate("usual", ""), Candidate("other", ""), Candidate("third", "")), lambda call: call.region)


class Times:
    """A clock that is told what a way takes: the milliseconds of its calls, in turn."""

    name = "told"

    def __init__(self, **milliseconds: list[float]) -> None:
        self.left = {name: itertools.cycle(each) for name, each in milliseconds.items()}
        self.ran: list[str] = []

    def time(self, call) -> float:
        call()
        return next(self.left[self.ran[-1]])

    def shapes(self, region: str, *labels: str) -> Iterator[Shape]:
        runs = {name: lambda given, name=name: self.ran.append(name) for name in self.left}
        for label in labels or ("a",):
            yield Shape(TABLE, Call(region), label, lambda: torch.zeros(8), runs)


@pytest.fixture(autouse=True)
def a_quiet_machine(monkeypatch, tmp_path):
    """A cache of its own, no request, and samples enough however slow the machine is."""
    monkeypatch.setenv("JDKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("JDKD_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(session, "ROUNDS", 8)
    monkeypatch.setattr(session, "MOST_WARMUP", 0.05)
    monkeypatch.setattr("jdkd.tune.timing.MOST_SETS", 2)
    monkeypatch.setattr("jdkd.latency.protocol._no_garbage_collection", contextlib.nullcontext)  # takes the most time
    _dispatch.forget()
    yield
    _dispatch.forget()


def run(times: Times, *names: str, shapes: tuple[str, ...] = (), **options):
    def jobs(device, quick):
        return [job for name in names or ("r",) for job in regions._regions(times.shapes(name, *shapes))]

    (outcome,) = tune([CPU], clock=times, jobs=jobs, **{"minutes": 1.0, **options})
    return outcome


def test_what_is_faster_is_taken_from_then_on():
    outcome = run(Times(usual=[2.0, 2.1], other=[1.0, 1.1], third=[1.5]))
    (row,) = outcome.changed()
    assert row[:2] == ("toy", "r") and row[2].path == "other" and (outcome.timed, outcome.left) == (1, 0)
    assert TABLE.choose(Call("r"))[0].name == "other" and TABLE.choose(Call("s"))[0].name == "usual"
    assert TABLE.explain(Call("r")).source.endswith("times as fast as usual")
    assert outcome.file == _tuned.file_of(CPU) and outcome.file.is_file()


@pytest.mark.parametrize(
    ("usual", "other"),
    [([1.0], [1.0]), ([1.0], [1.2]), ([1.0, 3.0, 2.0], [0.9, 3.1, 1.9, 2.2])],
    ids=["equal", "slower", "noise"],
)
def test_what_is_not_faster_beyond_doubt_is_not_taken(usual, other):
    outcome = run(Times(usual=usual, other=other, third=[9.0]))
    assert outcome.changed() == [] and TABLE.choose(Call("r"))[0].name == "usual"
    assert outcome.regions["toy"]["r"].measured  # and what was found is kept


def test_what_is_faster_in_one_shape_only_is_not_taken():
    times = Times(usual=[2.0], other=[1.0], third=[9.0])
    shapes = list(times.shapes("r", "fast", "slow"))
    slow = Times(usual=[1.0], other=[2.0], third=[9.0])
    mixed = [shapes[0], next(slow.shapes("r", "slow"))]

    class Both:
        name = "both"

        def time(self, call) -> float:
            before = len(times.ran), len(slow.ran)
            call()
            clock = times if len(times.ran) > before[0] else slow
            return next(clock.left[clock.ran[-1]])

    (outcome,) = tune([CPU], minutes=1.0, clock=Both(), jobs=lambda *_: list(regions._regions(iter(mixed))))
    assert outcome.changed() == []


def test_what_wins_once_by_chance_is_timed_again(monkeypatch):
    lucky, times, compared = Times(usual=[2.0], other=[2.0], third=[9.0]), [1.0, 2.0], session.compared

    def once(*given):
        lucky.left["other"] = itertools.cycle([times.pop(0)])
        return compared(*given)

    monkeypatch.setattr(session, "compared", once)
    outcome = run(lucky)
    assert outcome.changed() == [] and times == []
    assert [row.ratio for row in outcome.regions["toy"]["r"].measured if row.path == "other"] == [1.0]


def test_a_run_carries_on_where_the_last_one_ended(monkeypatch):
    times = Times(usual=[2.0], other=[1.0], third=[9.0])
    seen = []

    def stop(device, done, total, values):
        seen.append((done, total))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(times, "a", "b", "c", progress=stop)
    assert [*_tuned.regions(CPU)["toy"]] == ["a", "b"] and seen == [(1, 3), (2, 3)]
    calls = len(times.ran)
    outcome = run(times, "a", "b", "c")
    assert (outcome.timed, outcome.left, len(outcome.changed())) == (1, 0, 3)
    assert len(times.ran) - calls < calls
    assert run(times, "a", "b", "c").timed == 0
    assert run(times, "a", "b", "c", again=True).timed == 3


def test_what_was_left_when_all_was_timed_again_is_timed_by_the_next_run():
    times = Times(usual=[2.0], other=[1.0], third=[9.0])
    run(times, "a", "b", "c")
    outcome = run(times, "a", "b", "c", again=True, minutes=1e-9)
    assert (outcome.timed, outcome.left) == (1, 2) and [*_tuned.regions(CPU)["toy"]] == ["a"]
    assert TABLE.choose(Call("b"))[0].name == "usual", "until then it counts no longer"
    outcome = run(times, "a", "b", "c")
    assert (outcome.timed, outcome.left, len(outcome.changed())) == (2, 0, 3)


def test_what_is_timed_again_counts_no_longer_until_then():
    """A default whose call is dispatched would else be timed as the way that was faster before."""
    times = Times(usual=[2.0], other=[1.0], third=[9.0])
    run(times, "a", "b")
    chosen = []
    (shape,) = times.shapes("a")
    shape.runs["usual"] = lambda given: (chosen.append(TABLE.choose(shape.call)[0].name), times.ran.append("usual"))
    options = {"clock": times, "again": True, "jobs": lambda *_: list(regions._regions(iter([shape])))}
    (outcome,) = tune([CPU], **options)
    assert {*chosen} == {"usual"} and outcome.timed == 1
    assert {row[1] for row in outcome.changed()} == {"a", "b"} and TABLE.choose(Call("b"))[0].name == "other"


def lone(*names: str, of: str = "usual") -> list[regions.Job]:
    return [regions.Job("toy", name, of, (), ()) for name in names]


def test_where_one_way_alone_can_run_nothing_is_timed_and_that_is_said():
    times = Times(usual=[2.0], other=[1.0], third=[9.0])
    jobs = [*regions._regions(times.shapes("1x1, stride 1")), *lone("1x1, stride 2", "3x3, stride 1", "3x3, stride 2")]
    (outcome,) = tune([CPU], clock=times, jobs=lambda *_: jobs)
    assert (outcome.timed, outcome.left) == (1, 0) and [*_tuned.regions(CPU)["toy"]] == ["1x1, stride 1"]
    assert [*map(str, outcome.alone)] == ["toy: usual alone for 1x1, stride 2; 3x3"]


def test_what_is_alone_is_named_as_shortly_as_it_can_be():
    assert [*map(str, regions.alone(lone("1x1, a", "3x3, a")))] == ["toy: usual alone"]
    two = regions.alone(lone("1x1, a", "3x3, a") + lone("1x1, b", of="other"))
    assert [*map(str, two)] == ["toy: usual alone for 1x1, a; 3x3", "toy: other alone for 1x1, b"]
    assert [*map(str, regions.alone(lone("1x1") + lone("1x1, b", of="other")))][1] == "toy: other alone for 1x1, b"


def test_a_table_of_one_way_is_planned_to_be_said(monkeypatch):
    table = Table("toy", (Candidate("usual", ""), Candidate("never", "", can_run=lambda call: "no")), TABLE.region)
    shape = Shape(table, Call("r"), "a", lambda: torch.zeros(1), {})
    monkeypatch.setattr(regions, "TABLES", (lambda device, quick: iter([shape]),))
    assert plan(CPU) == [regions.Job("toy", "r", "usual", (), (shape,))]


def test_a_way_that_fails_is_left_out_and_said():
    times = Times(usual=[2.0], other=[1.0], third=[9.0])
    (shape,) = times.shapes("r")

    def failing(given):
        raise RuntimeError("no kernel image")

    shape.runs["other"] = failing
    with pytest.warns(Notice, match="other of toy is left out: RuntimeError for a: no kernel image"):
        (outcome,) = tune([CPU], clock=times, jobs=lambda *_: list(regions._regions(iter([shape]))))
    assert outcome.changed() == [] and outcome.timed == 1


def test_one_process_writes_at_a_time(monkeypatch):
    held = []
    run(Times(usual=[2.0], other=[1.0], third=[9.0]), progress=lambda *_: held.append(len(files._locks)))
    assert held == [len(files._locks) + 1]


def test_what_does_not_fit_into_the_time_keeps_its_default():
    times = Times(usual=[2.0], other=[1.0], third=[9.0])
    outcome = run(times, "a", "b", "c", minutes=1e-9)
    assert (outcome.timed, outcome.left) == (1, 2) and [*_tuned.regions(CPU)["toy"]] == ["a"]


def test_the_clock_of_one_thread_counts_its_own_time_alone(monkeypatch):
    for threads, name in ((1, "thread_time"), (2, "perf_counter")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert clock_of(CPU).name == name


class Gpu:
    """Stands in for ``torch.cuda``: what is queued runs one after another, a cycle of a sleep a nanosecond."""

    def __init__(self) -> None:
        self.host, self.free, self.naps = 0.0, 0.0, []  # ms

    def queue(self, milliseconds: float) -> None:
        self.free = max(self.free, self.host) + milliseconds

    def _sleep(self, cycles: int) -> None:
        self.naps.append(cycles)
        self.queue(cycles / 1e6)

    def device(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def Event(self, enable_timing: bool) -> Gpu.Mark:
        return Gpu.Mark(self)

    class Mark:
        def __init__(self, gpu: Gpu) -> None:
            self.gpu = gpu

        def record(self) -> None:
            self.at = max(self.gpu.host, self.gpu.free)

        def query(self) -> bool:
            return self.gpu.host >= self.at

        def synchronize(self) -> None:
            self.gpu.host = max(self.gpu.host, self.at)

        def elapsed_time(self, end: Gpu.Mark) -> float:
            return end.at - self.at


@pytest.mark.parametrize(("host", "naps"), [(0.15, [200_000]), (0.9, [200_000, 400_000, 800_000, 1_600_000])])
def test_the_clock_of_a_gpu_sleeps_until_all_is_queued(monkeypatch, host, naps):
    """Two launches of 10 us each, between which the host takes longer than the GPU."""
    gpu = Gpu()
    monkeypatch.setattr(torch, "cuda", gpu)

    def call() -> None:
        for _ in range(2):
            gpu.host += host / 2
            gpu.queue(0.01)

    clock = BehindASleep(torch.device("cuda", 0))
    assert clock.time(call) == pytest.approx(0.02) and gpu.naps == naps
    assert clock.time(call) == pytest.approx(0.02) and gpu.naps == [*naps, naps[-1]]


def test_a_call_that_waits_for_the_gpu_is_timed_all_the_same(monkeypatch):
    gpu = Gpu()
    monkeypatch.setattr(torch, "cuda", gpu)

    def waits() -> None:
        gpu.queue(0.01)
        gpu.host = max(gpu.host, gpu.free) + 0.5
        gpu.queue(0.01)

    assert BehindASleep(torch.device("cuda", 0)).time(waits) == pytest.approx(0.52)
    assert gpu.naps[-1] == LONGEST_SLEEP


def test_devices_that_are_alike_are_timed_once():
    assert len(tune([CPU, CPU], jobs=lambda *_: [])) == 1


@pytest.mark.parametrize("minutes", [0, -1, float("nan"), float("inf")])
def test_refuses_a_time_that_is_none(minutes):
    with pytest.raises(InputError, match=f"minutes must be a positive number, got {minutes}"):
        tune([CPU], minutes=minutes)


def test_refuses_where_something_else_decides(monkeypatch, tmp_path):
    monkeypatch.setenv("JDKD_BACKEND", "reference")
    with pytest.raises(InputError, match="the backend reference is asked for"):
        tune([CPU])
    monkeypatch.delenv("JDKD_BACKEND")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(InputError, match="TRITON_INTERPRET is set"):
        tune([CPU])
    monkeypatch.delenv("TRITON_INTERPRET")
    (tmp_path / "file").touch()
    monkeypatch.setenv("JDKD_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"JDKD_CACHE .* is a file"):
        tune([CPU])


def test_inputs_go_past_the_cache_and_share_no_memory(monkeypatch):
    monkeypatch.setattr("jdkd.tune.timing.MOST_SETS", 8)
    monkeypatch.setattr("jdkd.tune.timing.last_level_cache", lambda device: 4000)
    sets = rotated(lambda: (torch.zeros(1000).requires_grad_(), [torch.ones(10)], "not a tensor"))
    assert len(sets) == 3 and sum(map(nbytes, sets)) >= 3 * 4000
    assert len({given[0].data_ptr() for given in sets}) == 3 and all(given[0].requires_grad for given in sets)
    last = torch.zeros(1, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    assert copied(last).stride() == last.stride()


def test_the_single_pass_is_timed_with_what_choosing_it_costs(monkeypatch):
    calls = []
    monkeypatch.setattr(pearson_forms, "looked_up", calls.append)
    shape = pearson.of_forms(CPU, torch.float32, [(1, 8, 3, 3)])
    given = shape.make()
    shape.runs["split"](given)
    assert not calls
    shape.runs["single pass"](given)
    assert [call.gradients for call in calls] == ["students"]


def test_every_region_of_this_machine_can_be_timed(monkeypatch):
    """Each way of each shape runs, on a CPU, and computes what the default computes."""
    found = plan(CPU, quick=True)
    first = {job.table: job for job in reversed(found)}  # of its table, with the smallest shapes
    assert "elastic convolution" in first and all(shape.call.device == CPU for job in found for shape in job.shapes)
    for job in first.values():
        given = job.shapes[0].make()
        results = [job.shapes[0].runs[name](given) for name in (job.default, *job.others)]
        for other in results[1:]:
            torch.testing.assert_close(other, results[0], rtol=1e-3, atol=1e-3)
        assert job.shapes[0].table.region(job.shapes[0].call) == job.region


def test_the_command_refuses_in_one_sentence_and_has_an_example(capsys):
    pytest.importorskip("tyro")
    from jdkd.cli import main

    assert main(["tune", "--minutes", "0"]) == 2
    assert capsys.readouterr().err == "jdkd: minutes must be a positive number, got 0.0; give 3, say.\n"
    with pytest.raises(SystemExit) as ended:
        main(["tune", "--help"])
    assert ended.value.code == 0 and "jdkd tune --minutes 3" in capsys.readouterr().out


def test_the_command_shows_what_changed_and_resumes_after_an_interrupt(capsys, monkeypatch):
    pytest.importorskip("tyro")
    from jdkd import tune as room
    from jdkd.cli import main

    times = Times(usual=[2.0], other=[1.0], third=[9.0])
    real, interrupts = session.tune, [True]

    def planted(devices, *, progress, **options):
        def told(*given):
            progress(*given)
            if interrupts:
                interrupts.clear()
                raise KeyboardInterrupt

        names = ("a", "b")
        jobs = [job for name in names for job in regions._regions(times.shapes(name))] + lone("c")
        return real([CPU], progress=told, clock=times, jobs=lambda *_: jobs, **{**options, "minutes": 1.0})

    monkeypatch.setattr(room, "tune", planted)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["tune"]) == 2
    assert "interrupted; 1 of 2 regions of cpu kept: carry on with jdkd tune" in capsys.readouterr().err
    assert main(["tune"]) == 0
    out = capsys.readouterr().out
    assert "cpu: 2 regions timed, 1 of them now; 2 take another way than the default" in out
    assert out.count("2.00 to 2.00") == 2
    assert "cpu: not timed, as nothing else can run there:\n  toy: usual alone for c\n" in out
    assert out.splitlines()[-1] == f"accelerate: {env.ACCELERATE}"
