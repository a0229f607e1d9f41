"""The driver of the GPU check: runs the plan, each part under its deadline, and tells what came of it at any time.

It imports Python's own modules alone. A part that fails, crashes, hangs or overruns is recorded, and the next begins.
``summary.txt`` is written anew after every part: what a person reads, and in its last line the same as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks.gpu import needs, plan, summary
from benchmarks.gpu.jobs import ROOT, Jobs
from benchmarks.gpu.timing import Timing

REFUSED = 2
NO_EXTENSION, NO_DEVICE = 3, 5  # exit codes of the machine's part


class Stopped(BaseException):
    """Somebody asked the driver to end."""


class Check:
    """One run.

    Args:
        place: where.
        limit: seconds, all parts together.
        run: ``first``, ``again`` or ``rehearse``, for the summary.
    """

    def __init__(self, place: plan.Place, limit: float, run: str) -> None:
        self.place, self.limit = place, limit
        self.started = time.monotonic()
        self.out = Path(place.out)
        self.jobs = Jobs(self.out, environment(place))
        self.summary = summary.Summary(self.out, run, limit)

    def left(self) -> float:
        """Seconds that are left."""
        return self.limit - (time.monotonic() - self.started)

    def follow(self, parts: Sequence[plan.Part]) -> int:
        """Runs the parts in order. Returns: the exit code."""
        try:
            todo = list(parts)
            while todo:
                part = todo.pop(0)
                if part.jobs:
                    record = self.one(part)
                    codes = [job.get("rc") for job in record.get("jobs", ())]
                    if NO_DEVICE in codes:
                        return REFUSED
                    if part.name == "machine" and self.place.device == "cuda" and NO_EXTENSION in codes:
                        todo = [*self.built(), *todo]
                else:
                    timed = [part, *(later for later in todo if not later.jobs)]
                    todo = [later for later in todo if later.jobs]
                    Timing(self.place, self.jobs, self.left, self.done).follow(timed)
        except Stopped:
            self.summary.stopped = True
        finally:
            self.jobs.stop_all()
            self.summary.seconds = time.monotonic() - self.started
            self.summary.write()
        return 1 if self.summary.failed() else 0

    def one(self, part: plan.Part) -> dict[str, Any]:
        """Runs the jobs of a part side by side."""
        seconds, begin = min(part.seconds + part.late, self.left()), time.monotonic()
        if seconds < min(5, part.seconds):
            return self.done(summary.not_run(part.name, "no time is left"))
        outcomes = self.jobs.side_by_side(part.jobs, seconds)
        record = {"part": part.name, "seconds": round(time.monotonic() - begin, 1), "limit": round(seconds)}
        return self.done(record | {"jobs": outcomes})

    def built(self) -> list[plan.Part]:
        """What compiles the extension, and looks at the machine again."""
        self.jobs.say("no extension that fits was carried: it is compiled here")
        capability = self.summary.facts()["machine"].get("capability", "")
        return [plan.build(self.place, capability), plan.looked_at(self.place, "machine again")]

    def done(self, record: dict[str, Any]) -> dict[str, Any]:
        """Keeps the record of a part."""
        self.summary.add(record)
        self.summary.seconds = time.monotonic() - self.started
        self.summary.write()
        self.jobs.say(summary.line(record))
        return record


def environment(place: plan.Place) -> dict[str, str]:
    """The variables of a run: one folder for all caches, outside OUT; no output held back."""
    cache = os.environ.get("JDKD_CACHE") or str(Path(tempfile.gettempdir()) / f"jdkd-gpu-check-{os.getuid()}")
    own = {
        "JDKD_CACHE": cache,
        "TRITON_CACHE_DIR": f"{cache}/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
    }
    if place.device == "cpu":
        own["CUDA_VISIBLE_DEVICES"] = ""
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "JDKD_BACKEND")}
    return kept | own


def tool(name: str) -> str | None:
    """The path of a program of the CUDA toolkit."""
    import shutil

    folders = [os.environ.get("PATH", ""), f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"]
    folders += map(str, sorted(Path("/opt/nvidia/nsight-compute").glob("*"), reverse=True))
    return shutil.which(name, path=os.pathsep.join(folders))


def tests_here(say: Callable[[str], None]) -> list[str]:
    """The GPU tests whose packages are here; the others are named."""
    found = []
    for file in needs.test_files():
        package = needs.missing(file, needs.has)
        if package is None:
            found.append(file)
        else:
            say(f"left out: {file}, there is no module {package}")
    return found


def main(words: Sequence[str], plans: Mapping[str, Callable[..., list[plan.Part]]] | None = None) -> int:
    """Runs the check.

    Args:
        words: OUT, and ``again`` with the summary of the first run, or ``rehearse``.
        plans: other plans by the names of the runs, for tests.
    """
    given = _parsed(words)
    if given is None:
        return REFUSED
    rehearsal = given.run == "rehearse"
    out = given.out.resolve()
    place = plan.Place(sys.executable, "cpu" if rehearsal else "cuda", str(out), needs.has, tool, [])
    check = Check(place, plan.AGAIN if given.run == "again" else plan.LIMIT, given.run)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, _stop)
    make = (plans or {}).get(given.run)
    if make is not None:
        parts = make(place)
    elif given.run == "again":
        parts = plan.again(place, given.before)
    else:
        parts = plan.first(dataclasses.replace(place, tests=tests_here(check.jobs.say)))
    return check.follow(parts)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped


def _parsed(words: Sequence[str]) -> argparse.Namespace | None:
    """The arguments; None after one sentence if they cannot be followed."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu_check.sh", description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder for the results")
    parser.add_argument("run", nargs="?", choices=("first", "again", "rehearse"), default="first")
    parser.add_argument("before", nargs="?", type=Path, help="summary.txt of the first run, for again")
    given = parser.parse_args(words)
    try:
        given.out.mkdir(parents=True, exist_ok=True)
        refusal = f"{given.out} is not empty; give a new folder, so that no result is overwritten"
        refusal = refusal if any(given.out.iterdir()) else None
    except OSError as error:
        refusal = f"{given.out} cannot be made: {error.strerror}; give a folder that can"
    try:
        given.before = summary.failures(given.before) if given.before else {}
    except (OSError, ValueError, KeyError, IndexError):
        refusal = f"{given.before} is no summary of a run; give the summary.txt of the first one"
    if refusal:
        print(f"gpu_check: {refusal}", file=sys.stderr)
        return None
    return given
