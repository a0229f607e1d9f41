"""The GPU check without a GPU: its plan, its deadlines, and that nothing that breaks takes anything else with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from benchmarks.gpu import check, needs, plan, summary

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"
HANGS = "import time; print('begun', flush=True); time.sleep(60)"


def place(out="/out", absent=(), device="cuda"):
    return plan.Place(
        sys.executable, device, str(out), lambda name: name not in absent,
        lambda name: None if name in absent else f"/cuda/bin/{name}", ["tests/ops/test_pack_gpu.py"],
    )  # fmt: skip


def python(name, code, **more):
    return plan.Job(name, [sys.executable, "-c", code], **more)


def part(name, seconds, *codes):
    return plan.Part(name, seconds, tuple(python(f"{name} {n}", code) for n, code in enumerate(codes)))


def jobs_of(parts, name):
    return {job.name: job for own in parts if own.name == name for job in own.jobs}


@pytest.fixture
def checked(tmp_path):
    """Follows a plan: its exit code and its summary, as data."""

    def run(parts, limit=60.0):
        rc = check.Check(place(tmp_path, device="cpu"), limit, "rehearse").follow(parts)
        return rc, json.loads((tmp_path / "summary.txt").read_text().splitlines()[-1])

    return run


# The plan


def test_a_run_fits_nine_minutes_in_order_of_worth():
    parts = plan.first(place())
    assert [own.name for own in parts] == ["machine", "smoke", "tests", *plan.TIMED]
    assert next(iter(plan.TIMED)) == "pearson" and [*plan.TIMED][-1] == "compile"
    assert sum(own.seconds for own in parts) <= plan.LIMIT <= 540


@pytest.mark.parametrize("failed", [
    {}, {"smoke": ["pack"]}, {"tests": ["a::b"], "sanitizers": ["racecheck"]}, {"timed": [*plan.TIMED]},
    {"smoke": [*plan.OPS], "tests": ["a::b"], "sanitizers": [*plan.SANITIZERS], "timed": [*plan.TIMED]},
])  # fmt: skip
def test_a_second_run_fits_three_minutes(failed):
    parts = plan.again(place(), failed)
    assert sum(own.seconds for own in parts) <= plan.AGAIN <= 180 and all(own.seconds > 0 for own in parts)
    names = [own.name for own in parts]
    assert names == ["machine", *(name for name in ("smoke", "tests") if name in failed), *failed.get("timed", [])] or (
        not failed and names == ["machine", "profile"]
    )


def test_a_second_run_profiles_six_kernels_where_nothing_failed():
    words = jobs_of(plan.again(place(), {}), "profile")["ncu"].words
    assert words[:3] == ["/cuda/bin/ncu", "--clock-control", "none"] and "benchmarks.gpu.profiled" in words
    source = (ROOT / "benchmarks" / "gpu" / "profiled.py").read_text()
    assert source.count('    yield "') == 6


def test_every_operator_is_smoked_in_a_process_of_its_own_beside_jdkd_check():
    jobs = jobs_of(plan.first(place()), "smoke")
    assert [*jobs] == [*(f"smoke {op}" for op in plan.OPS), "jdkd check"]
    assert "benchmarks.gpu.verdicts" in jobs["jdkd check"].words


def test_sanitizers_see_our_kernels_without_the_caching_allocator():
    jobs = jobs_of(plan.first(place()), "tests")
    assert [*jobs] == ["pytest", "sanitizer memcheck", "sanitizer racecheck", "sanitizer synccheck"]
    for tool in plan.SANITIZERS:
        job = jobs[f"sanitizer {tool}"]
        assert job.env == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        assert job.words[1:3] == ["--tool", tool] and {"pearson", "pearson_single"} <= {*job.words}
        assert jobs_of(plan.first(place(absent=("compute-sanitizer",))), "tests")[job.name].words is None
    assert len({word for job in jobs.values() for word in job.words if word.startswith("49")}) == 3


def test_pytest_takes_what_is_there():
    words = jobs_of(plan.first(place()), "tests")["pytest"].words
    assert "--timeout=60" in words and "-n" in words
    bare = jobs_of(plan.first(place(absent=("pytest_timeout", "xdist"))), "tests")["pytest"].words
    assert "--timeout=60" not in bare and "-n" not in bare and bare[-1] == "tests/ops/test_pack_gpu.py"


def test_at_most_eight_files_are_left():
    for parts, more in ((plan.first(place()), plan.FILES), (plan.again(place(), {}), ())):
        prints = {job.prints_to for own in parts for job in own.jobs}
        assert len({*more, *prints}) <= 8
    assert len({*plan.FILES, "profile.txt"} - {"sanitizer.txt"}) <= 8


def test_tests_whose_packages_are_missing_are_left_out_unimported():
    files = needs.test_files()
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*_gpu.py")} <= {*files}
    own = {file: needs.missing(file, lambda package: package != "torchvision") for file in files}
    assert own["tests/train/test_gpu.py"] == "torchvision" and own["tests/ops/test_pack_gpu.py"] is None
    assert needs.missing("tests/ops/test_pearson_gpu.py", lambda package: package != "torch") == "torch"


def test_a_gpu_test_is_made_of_every_tile_and_configuration():
    pytest.importorskip("triton")
    from tests.ops import test_elastic_levels_gpu as gpu
    from tests.ops.elastic_conv_aot import configurations

    assert len(gpu.tiles()) == gpu.TILES and len(configurations()) == gpu.CONFIGURATIONS


# The driver


def test_a_part_that_overruns_is_ended_and_the_next_begins(checked, tmp_path):
    begin = time.monotonic()
    rc, told = checked([part("slow", 3, HANGS, "print('beside')"), part("next", 5, "print('next')")])
    assert rc == 1 and time.monotonic() - begin < 8
    assert told["failed"] == {"slow": {"slow 0": "it ran out of time"}}
    log = (tmp_path / "log.txt").read_text()
    assert "[slow 0] begun" in log and "[slow 1] beside" in log and "[next 0] next" in log


def test_many_that_overrun_are_ended_together(checked):
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + HANGS
    _, told = checked([part("slow", 4, *[stubborn] * 6)])
    assert len(told["failed"]["slow"]) == 6 and told["parts"][0]["seconds"] < 4 + 2


def test_what_a_part_started_ends_with_it(checked, tmp_path):
    started = tmp_path / "pid"
    code = (
        "import subprocess, sys, pathlib; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(started)!r}).write_text(str(p.pid)); p.wait()"
    )
    checked([part("parent", 3, code)])
    child = Path(f"/proc/{started.read_text()}/stat")
    until = time.monotonic() + 5
    while child.exists() and child.read_text().split()[2] != "Z" and time.monotonic() < until:
        time.sleep(0.05)
    assert not child.exists() or child.read_text().split()[2] == "Z"


@pytest.mark.parametrize("code", ["import os; os.abort()", "raise SystemExit(7)", "1 / 0", "syntax error"])
def test_a_part_that_crashes_takes_nothing_with_it(checked, code):
    rc, told = checked([part("broken", 10, code, "print()"), part("next", 10, "print()")])
    assert rc == 1 and [*told["failed"]] == ["broken"]
    why = told["failed"]["broken"]["broken 0"]
    assert "exit code" in why and ("ZeroDivisionError" in why or "1 / 0" not in code)
    assert [own["part"] for own in told["parts"]] == ["broken", "next"]


def test_a_command_that_is_not_there_is_a_failure_and_one_that_cannot_be_run_is_none(checked):
    absent = plan.Part("absent", 5, (plan.Job("absent", ["/no/such/program"]), plan.Job("tool", None, why="no tool")))
    rc, told = checked([absent])
    assert rc == 1 and [*told["failed"]["absent"]] == ["absent"]


def test_what_no_time_is_left_for_is_told(checked):
    rc, told = checked([part("first", 20, "import time; time.sleep(1.5)"), part("last", 20, "print()")], limit=6)
    assert rc == 1 and told["failed"] == {"last": {"last": "no time is left"}}


def test_without_an_extension_one_is_compiled_for_the_device_that_is_here(checked, monkeypatch, tmp_path):
    capable = 'print(\'@@ {"machine": {"capability": "9.0"}}\'); raise SystemExit(%d)'
    built, right = [], plan.build

    def build(place, capability):
        built.append(right(place, capability).jobs[0].env["TORCH_CUDA_ARCH_LIST"])
        return part("build", 10, "print()")

    monkeypatch.setattr(plan, "build", build)
    monkeypatch.setattr(plan, "looked_at", lambda place, name: part(name, 10, capable % 0))
    own = check.Check(place(tmp_path), 60, "first")
    assert own.follow([part("machine", 10, capable % check.NO_EXTENSION), part("next", 10, "print()")]) == 1
    assert built == ["9.0a"]
    assert [record["part"] for record in own.summary.records] == ["machine", "build", "machine again", "next"]


def test_without_a_device_nothing_else_is_run(checked):
    rc, told = checked([part("machine", 10, f"raise SystemExit({check.NO_DEVICE})"), part("next", 10, "print()")])
    assert rc == check.REFUSED and [own["part"] for own in told["parts"]] == ["machine"]


def test_everything_that_passes_is_said_to(checked, tmp_path):
    rc, told = checked([part("good", 10, 'print(\'@@ {"machine": {"device": "H100"}}\')')])
    assert rc == 0 and told["ok"] and told["machine"] == {"device": "H100"}
    assert "everything passed" in (tmp_path / "summary.txt").read_text()


DRIVER = """
import signal, sys
from benchmarks.gpu import check, plan
hangs = [sys.executable, "-c", {hangs!r}]
parts = [plan.Part("first", 20, (plan.Job("first", [sys.executable, "-c", "print('made')"]),)),
         plan.Part("second", 50, (plan.Job("second", hangs),))]
sys.exit(check.main([sys.argv[1], "rehearse"], {{"rehearse": lambda place: parts}}))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "ended"])
def test_what_was_made_is_there_when_the_check_is_ended_in_the_middle(tmp_path, number):
    out, hangs = tmp_path / "out", f"{HANGS}  # {tmp_path}"  # told from what hangs in other tests at the same time
    driver = subprocess.Popen([sys.executable, "-c", DRIVER.format(hangs=hangs), out], cwd=ROOT, start_new_session=True)
    log = out / "log.txt"
    until = time.monotonic() + 30
    while not (log.is_file() and "[second] begun" in log.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    driver.send_signal(number)
    rc = driver.wait(20)
    told = json.loads((out / "summary.txt").read_text().splitlines()[-1])
    assert [own["part"] for own in told["parts"]] == ["first"] and "[first] made" in log.read_text()
    assert len((out / "parts.jsonl").read_text().splitlines()) == 1
    if number == signal.SIGTERM:
        assert rc == 1 and told["stopped"]
    for process in Path("/proc").glob("[0-9]*/cmdline"):  # one that was killed ended nothing
        words = b""
        with suppress(OSError):  # it has ended since it was listed
            words = process.read_bytes()
        if hangs.encode() in words.split(b"\0"):
            assert number == signal.SIGKILL
            os.kill(int(process.parent.name), signal.SIGKILL)


# The benchmark process


TIMER = """
import json, sys, time
given = sys.argv[1:]
skip = int(given[0])
def tell(**event): print("@@ " + json.dumps(event), flush=True)
for number, part in enumerate(given[1:]):
    for case in ["one", "two", "three"][skip if number == 0 else 0:]:
        tell(part=part, case=case)
        print("row of", part, case, flush=True)
        {breaks}
    tell(end=part, part=part, left=["four"])
"""


@pytest.fixture
def timer(monkeypatch):
    """Puts a stand-in for the benchmark process in place, which breaks as it is told."""

    def stand_in(breaks):
        def timed(place, parts, skipped):
            assert all(seconds > 0 for seconds in parts.values())
            return [sys.executable, "-c", TIMER.format(breaks=breaks), str(skipped), *parts]

        monkeypatch.setattr(plan, "timed", timed)

    return stand_in


def parts_of_30_seconds(*names):
    return [plan.Part(name, 30) for name in names]


def test_one_process_times_all_parts(checked, timer, tmp_path):
    timer("import os; print('process', os.getpid())")
    rc, told = checked(parts_of_30_seconds("pearson", "pack"), limit=100)
    assert rc == 0 and [(own["part"], own["cases"], own["not_begun"]) for own in told["parts"]] == [
        ("pearson", 3, ["four"]),
        ("pack", 3, ["four"]),
    ]
    processes = {line.split()[-1] for line in (tmp_path / "log.txt").read_text().splitlines() if "process" in line}
    assert len(processes) == 1


def test_a_case_that_breaks_the_process_takes_no_other_with_it(checked, timer, tmp_path):
    timer("if (part, case) == ('pearson', 'two'): import os; os.abort()")
    rc, told = checked(parts_of_30_seconds("pearson", "pack"), limit=100)
    assert rc == 1 and [*told["failed"]["pearson"]] == ["two"] and "exit code -6" in told["failed"]["pearson"]["two"]
    log = (tmp_path / "log.txt").read_text()
    assert all(log.count(f"row of {part} {case}") == 1 for part in ("pearson", "pack") for case in ("one", "three"))


def test_a_process_that_begins_no_second_time_is_not_blamed_on_the_case_before(checked, timer, monkeypatch):
    timer("if (part, case) == ('pearson', 'two'): import os; os.abort()")
    first, broken = plan.timed, [sys.executable, "-c", "raise SystemExit('no torch')"]
    monkeypatch.setattr(plan, "timed", lambda *given: broken if given[-1] else first(*given))
    _, told = checked([plan.Part("pearson", 60)], limit=100)
    assert told["failed"]["pearson"] == {
        "two": "the process ended with exit code -6: row of pearson two",
        "pearson": "the process ended with exit code 1: no torch",
    }


def test_a_case_that_hangs_costs_its_part_and_no_more(checked, timer, tmp_path):
    timer("if (part, case) == ('pearson', 'two'): time.sleep(60)")
    rc, told = checked([plan.Part("pearson", 6), plan.Part("pack", 20)], limit=100)
    assert rc == 1 and told["failed"] == {"pearson": {"two": "it ran out of time"}}
    assert told["parts"][0]["seconds"] < 8 and told["parts"][1]["cases"] == 3


def test_a_process_that_never_begins_fails_its_parts(checked, timer):
    timer("")
    plan.timed = lambda place, parts, skipped: [sys.executable, "-c", "raise ImportError('torch')"]
    rc, told = checked(parts_of_30_seconds("pearson", "pack"), limit=100)
    assert rc == 1 and [*told["failed"]] == ["pearson", "pack"]


# A second run, and the script


def test_a_second_run_is_of_what_failed(tmp_path):
    rows = [{"test": "tests/a.py::b[1-2]", "outcome": "failed", "why": "wrong"}, {"test": "c", "outcome": "passed"}]
    (tmp_path / "tests.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"test": cut')
    own = summary.Summary(tmp_path, "first", 540)
    failed = {"failed": "pearson_single bfloat16 cluster 16", "why": "wrong"}
    own.add({"part": "smoke", "seconds": 3, "limit": 30, "jobs": [
        {"job": "smoke pearson_single", "rc": 1, "events": [failed]}, {"job": "smoke pack", "rc": -9, "events": [],
         "timed_out": True}, {"job": "smoke pearson", "rc": 0, "events": []}]})  # fmt: skip
    own.add({"part": "tests", "seconds": 3, "limit": 30, "jobs": [
        {"job": "pytest", "rc": 1, "events": []}, {"job": "sanitizer racecheck", "rc": 9, "events": []}]})  # fmt: skip
    own.add({"part": "conv", "seconds": 3, "limit": 30, "failed": {"P3: jdkd triton": "errs"}})
    own.write()
    found = summary.failures(tmp_path / "summary.txt")
    assert found == {
        "smoke": ["pearson_single", "pack"],
        "tests": ["tests/a.py::b[1-2]"],
        "sanitizers": ["racecheck"],
        "timed": ["conv"],
    }
    assert "conv: P3: jdkd triton: errs" in (tmp_path / "summary.txt").read_text()


def script(*words, **env):
    given = {**os.environ, "PYTHON": sys.executable, **env}
    return subprocess.run([SCRIPT, *words], env=given, capture_output=True, text=True, timeout=60)


def test_a_folder_with_results_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "kernels.jsonl").write_text("{}\n")
    done = script(tmp_path)
    assert done.returncode == 2 and "is not empty; give a new folder" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["kernels.jsonl"]
    file = script(tmp_path / "kernels.jsonl")
    assert file.returncode == 2 and "cannot be made" in file.stderr
    (tmp_path / "no.txt").write_text("nothing")
    foreign = script(tmp_path / "new", "again", tmp_path / "no.txt")
    assert foreign.returncode == 2 and "is no summary of a run" in foreign.stderr
    unknown = script(tmp_path / "new", "everything")
    assert unknown.returncode == 2 and "everything" in unknown.stderr
    assert script(tmp_path / "new", PYTHON="no-such-python").returncode == 2
