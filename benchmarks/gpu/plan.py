"""What the GPU check runs, in order of worth: parts, their seconds, and the commands that run side by side in each."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

LIMIT, AGAIN = 540, 180  # seconds of a first and of a second run, the driver's own included
FILES = ("summary.txt", "log.txt", "parts.jsonl", "smoke.jsonl", "tests.jsonl", "sanitizer.txt", "kernels.jsonl",
         "latency.jsonl")  # fmt: skip
OPS = ("pearson", "pearson_single", "pack", "elastic_pointwise", "elastic_levels", "elastic_conv")
SANITIZERS = ("memcheck", "racecheck", "synccheck")
OUR_KERNELS = "regex=pearson|pack|elastic"  # in mangled names, compiled and Triton's
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else a read past a tensor lands in another one, unseen
UNTIL = "{until}"  # a word for which the time is put in, in seconds since 1970, after which a job begins nothing new
BUILD_SECONDS = 120  # where no extension that fits was carried; it is taken from the last parts


@dataclass(frozen=True)
class Job:
    """One command.

    Args:
        name: what the records call it.
        words: the command; None instead of a list where it cannot be run, and ``why`` says why.
        env: variables besides the run's.
        prints_to: the file in OUT that gets what it prints.
        why: see ``words``.
    """

    name: str
    words: Sequence[str] | None
    env: Mapping[str, str] = field(default_factory=dict)
    prints_to: str = "log.txt"
    why: str = ""


@dataclass(frozen=True)
class Part:
    """What is run together, for at most so many seconds.

    Args:
        name: what the records call it.
        seconds: its share; one that ends early leaves the rest to nobody, one that overruns is ended.
        jobs: commands that run side by side; none: a part of the one benchmark process.
        late: seconds that it may overrun, at the cost of the last parts.
    """

    name: str
    seconds: int
    jobs: tuple[Job, ...] = ()
    late: int = 0


@dataclass(frozen=True)
class Place:
    """Where a run takes place.

    Args:
        python: the interpreter.
        device: ``cuda``; ``cpu`` to rehearse.
        out: the folder of results.
        has: whether a Python package is there.
        tool: the path of a program, or None.
        tests: the test files to run; those left out are named by the driver.
    """

    python: str
    device: str
    out: str
    has: Callable[[str], bool]
    tool: Callable[[str], str | None]
    tests: Sequence[str]

    def run(self, module: str, *words: str) -> list[str]:
        """A module of this package as a command."""
        return [self.python, "-m", f"benchmarks.gpu.{module}", *words]

    def file(self, name: str) -> str:
        return f"{self.out}/{name}"


# Parts of the one benchmark process and their seconds, in order of worth; baselines that are compiled first come last.
TIMED = {"pearson": 110, "pack": 12, "pointwise and levels": 45, "conv": 25, "latency": 60, "supernet": 35,
         "compile": 55}  # fmt: skip


def first(place: Place) -> list[Part]:
    """One whole run."""
    smokes = [_smoke(place, op) for op in OPS]
    tests = [_tests(place, place.tests), *(_sanitized(place, tool, number) for number, tool in enumerate(SANITIZERS))]
    return [
        looked_at(place),
        Part("smoke", 30, (*smokes, _verdicts(place))),
        Part("tests", 150, tuple(tests)),
        *(Part(name, seconds) for name, seconds in TIMED.items()),
    ]


def again(place: Place, before: Mapping[str, Sequence[str]]) -> list[Part]:
    """What failed before, or, where nothing did, a profile of six kernels.

    Args:
        place: where.
        before: names of operators that failed under ``smoke``, of tests under ``tests``, of tools that found something
            under ``sanitizers``, of benchmark parts under ``timed``.
    """
    parts = [looked_at(place)]
    ops, tests, tools, timed = (list(before.get(name, ())) for name in ("smoke", "tests", "sanitizers", "timed"))
    if not (ops or tests or tools or timed):
        return [*parts, Part("profile", 165, (_profile(place),))]
    if ops:
        parts.append(Part("smoke", 30, tuple(_smoke(place, op) for op in ops)))
    if tests or tools:
        jobs = [_tests(place, tests)] if tests else []
        parts.append(Part("tests", 60, (*jobs, *(_sanitized(place, tool, n) for n, tool in enumerate(tools)))))
    left = AGAIN - 7 - sum(part.seconds for part in parts)
    wanted = sum(TIMED[name] for name in timed)
    return [*parts, *(Part(name, min(TIMED[name], left * TIMED[name] // wanted)) for name in timed)]


def looked_at(place: Place, name: str = "machine") -> Part:
    """What the machine is; the first import of torch may read all of it from a disk, and is waited for."""
    return Part(name, 8, (Job("machine", place.run("machine", "--device", place.device)),), late=22)


def build(place: Place, capability: str) -> Part:
    """Compiles the extension in place, for the device that is here alone.

    Args:
        place: where.
        capability: of the device, such as ``9.0``; Hopper's own instructions are among what is compiled for it.
    """
    words = [place.python, "setup.py", "--quiet", "build_ext", "--inplace"]
    archs = {"TORCH_CUDA_ARCH_LIST": f"{capability}a" if capability == "9.0" else capability} if capability else {}
    return Part("build", BUILD_SECONDS, (Job("build", words, {"JDKD_BUILD_EXT": "1", **archs}),))


def timed(place: Place, parts: Mapping[str, float], skipped: int) -> list[str]:
    """The benchmark process.

    Args:
        place: where.
        parts: seconds that each part may begin cases in, the start of the process included.
        skipped: cases of the first part that are done, or broke the process before.
    """
    given = [f"{name}:{seconds:.0f}" for name, seconds in parts.items()]
    files = ("--kernels", place.file("kernels.jsonl"), "--latency", place.file("latency.jsonl"))
    began = ("--began", f"{time.time():.1f}", "--skip", str(skipped))
    return place.run("timed", "--device", place.device, *files, *began, *given)


def _smoke(place: Place, op: str) -> Job:
    words = ["--device", place.device, "--until", UNTIL, "--out", place.file("smoke.jsonl")]
    return Job(f"smoke {op}", place.run("smoke", op, *words, *([] if place.device == "cuda" else ["--brief"])))


def _verdicts(place: Place) -> Job:
    """``jdkd check``, without its command line's packages: jdkd sees for itself whether the kernels are right here."""
    return Job("jdkd check", place.run("verdicts", "--until", UNTIL))


def _tests(place: Place, tests: Sequence[str]) -> Job:
    if not place.has("pytest"):
        return Job("pytest", None, why="there is no module pytest")
    words = [place.python, "-m", "pytest", "-m", "gpu", "-q", "--continue-on-collection-errors", "--tb=short"]
    words += ["-p", "no:cacheprovider", "-W", "default", "-p", "benchmarks.gpu.reports"]
    words += ["--rows", place.file("tests.jsonl")]
    words += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"] if place.has("xdist") else []
    # A thread ends the process where a signal would wait for the driver of a kernel that never returns.
    words += ["--timeout=60", "--timeout-method=thread"] if place.has("pytest_timeout") else []
    return Job("pytest", [*words, *tests])


def _sanitized(place: Place, tool: str, number: int) -> Job:
    """The smoke under one tool, without the caching allocator: of our own kernels, those of the Pearson loss too."""
    name, program = f"sanitizer {tool}", place.tool("compute-sanitizer")
    if program is None:
        return Job(name, None, why="there is no compute-sanitizer")
    words = [program, "--tool", tool, "--error-exitcode", "9", "--report-api-errors", "no", "--print-limit", "20"]
    words += ["--target-processes", "application-only", "--kernel-name", OUR_KERNELS]
    words += ["--port", str(49152 + 100 * number)]
    smoke = ("--device", place.device, "--brief", "--until", UNTIL, "--under", tool)
    words += place.run("smoke", *OPS, *smoke, "--out", place.file("smoke.jsonl"))
    return Job(name, words, UNCACHED, "sanitizer.txt")


def _profile(place: Place) -> Job:
    program = place.tool("ncu")
    if program is None:
        return Job("ncu", None, why="there is no ncu")
    sections = ("SpeedOfLight", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy", "WarpStateStats")
    words = [program, "--clock-control", "none", "--profile-from-start", "off"]
    words += [word for section in sections for word in ("--section", section)]
    return Job("ncu", [*words, *place.run("profiled", "--seconds", "150")], prints_to="profile.txt")
