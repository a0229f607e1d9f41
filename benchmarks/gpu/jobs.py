"""Commands under a deadline: what they print goes to a file as it comes, and whatever they started ends with them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import UNTIL, Job

ROOT = Path(__file__).resolve().parents[2]
EVENT = "@@ "  # begins a line that is for the driver: JSON
GRACE = 2.0  # seconds from the request to end to the end
Event = dict[str, Any]


def tell(**event: Any) -> None:
    """Tells the driver something."""
    print(EVENT + json.dumps(event), flush=True)


class Process:
    """One command in a process group of its own.

    Args:
        job: what to run.
        env: all of its variables.
        write: takes a file's name and a line.
        heard: takes an event.
    """

    def __init__(
        self, job: Job, env: Mapping[str, str], write: Callable[[str, str], None], heard: Callable[[Event], None]
    ) -> None:
        self.job, self.write, self.heard = job, write, heard
        self.last = ""  # of what it printed: where it broke, most likely the reason
        self.process = subprocess.Popen(
            list(job.words or ()), cwd=ROOT, env={**env, **job.env}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def _listen(self) -> None:
        with self.process.stdout as printed:
            for line in printed:
                event = _event(line)
                if event is not None:
                    self.heard(event)
                elif line.strip():
                    self.last = line.strip()
                self.write(self.job.prints_to, f"[{self.job.name}] {line.rstrip()}")

    def wait(self, until: float) -> int | None:
        """The exit code, or None where it still runs at a time of the monotonic clock."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, until - time.monotonic()))
        return self.process.poll()

    def signal(self, number: int) -> None:
        """Signals it and whatever it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


def end(processes: Sequence[Process]) -> None:
    """Ends commands and whatever they started, all within :data:`GRACE`."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            if number == signal.SIGKILL or process.process.poll() is None:
                process.signal(number)
        until = time.monotonic() + GRACE / 2
        for process in processes:
            process.wait(until)
    for process in processes:
        process.listener.join(0.2)  # a process that no signal ends may hold the pipe


def _event(line: str) -> Event | None:
    if not line.startswith(EVENT):
        return None
    try:
        return json.loads(line.removeprefix(EVENT))
    except ValueError:
        return None  # cut off where a process died


class Jobs:
    """Starts commands and writes what they print.

    Args:
        out: the folder of results.
        env: variables of every command.
    """

    def __init__(self, out: Path, env: Mapping[str, str]) -> None:
        self.out, self.env = out, env
        self.running: list[Process] = []
        self._lock = threading.Lock()

    def say(self, line: str) -> None:
        """Says a line to whoever watches and to the log."""
        print(line, flush=True)
        self.write("log.txt", line)

    def write(self, file: str, line: str) -> None:
        with self._lock, (self.out / file).open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def start(self, job: Job, heard: Callable[[Event], None]) -> Process:
        """Starts a command.

        Raises:
            OSError: if there is none.
        """
        process = Process(job, self.env, self.write, heard)
        self.running.append(process)
        return process

    def stop(self, processes: Sequence[Process]) -> None:
        """Ends commands."""
        end(processes)
        for process in processes:
            self.running.remove(process)

    def stop_all(self) -> None:
        """Ends all that run."""
        self.stop(list(self.running))

    def side_by_side(self, jobs: Sequence[Job], seconds: float) -> list[dict[str, Any]]:
        """Runs commands at once; those that run at the deadline are ended.

        Returns:
            For each its name, and exit code, seconds, whether it ran out of time and its events; or why it was not run.
        """
        begin, until = time.monotonic(), f"{time.time() + seconds - 2 * GRACE:.1f}"
        outcomes, processes = [], {}
        for job in jobs:
            outcome: dict[str, Any] = {"job": job.name, "events": []}
            outcomes.append(outcome)
            if job.words is None:
                outcome["why"] = job.why
                continue
            try:
                words = [until if word == UNTIL else word for word in job.words]
                processes[job.name] = self.start(dataclasses.replace(job, words=words), outcome["events"].append)
            except OSError as error:
                outcome |= {"rc": 127, "why": str(error)}
        while processes:
            late = time.monotonic() > begin + seconds - GRACE
            over = [name for name, process in processes.items() if late or process.process.poll() is not None]
            timed_out = {name: processes[name].process.poll() is None for name in over}
            self.stop([processes[name] for name in over])
            for outcome in outcomes:
                if (name := outcome["job"]) in over:
                    taken, process = round(time.monotonic() - begin, 1), processes.pop(name)
                    outcome |= {"rc": process.process.poll(), "timed_out": timed_out[name], "seconds": taken}
                    outcome["last"] = process.last
            time.sleep(0.02)
        return outcomes
