"""The benchmark parts in one process, and in another one from where a case broke it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.gpu import plan
from benchmarks.gpu.jobs import GRACE, Event, Jobs, Process

AGAIN_SECONDS = 15  # of a part that must be left for its next cases to get a process of their own


class Timing:
    """Follows benchmark parts.

    Args:
        place: where.
        jobs: starts processes.
        left: seconds of the whole run that are left.
        done: takes the record of each part.
    """

    def __init__(
        self, place: plan.Place, jobs: Jobs, left: Callable[[], float], done: Callable[[dict[str, Any]], object]
    ) -> None:
        self.place, self.jobs, self.left, self.done = place, jobs, left, done
        self.events: list[Event] = []

    def follow(self, parts: Sequence[plan.Part]) -> None:
        """Runs the parts; each gets its seconds from the end of the one before, the start of a process included."""
        process: Process | None = None
        for number, part in enumerate(parts):
            begin, seconds = time.monotonic(), min(part.seconds, self.left())
            record: dict[str, Any] = {"part": part.name, "limit": round(seconds, 1), "failed": {}}
            if seconds < 5:
                self.done(record | {"why": "no time is left", "seconds": 0.0})
                continue
            begun = 0
            while True:
                if process is None:
                    process = self._started(parts[number:], seconds - (time.monotonic() - begin), part.name)
                broke = self._watched(process, part.name, begin + seconds - GRACE)
                if broke is None:
                    break
                self.jobs.stop([process])
                process, begun, before = None, self._begun(part.name), begun
                record["failed"][self._last("case", part.name) if begun > before else part.name] = broke
                if begun == before or seconds - (time.monotonic() - begin) < AGAIN_SECONDS:
                    break
            taken = round(time.monotonic() - begin, 1)
            self.done(record | self._told(part.name, record["failed"]) | {"seconds": taken})
        if process is not None:
            self.jobs.stop([process])

    def _started(self, parts: Sequence[plan.Part], seconds: float, name: str) -> Process:
        """A process for these parts; of the first only the cases that were not begun yet, in the seconds left."""
        begun = self._begun(name)
        shares = {part.name: min(part.seconds, seconds if part.name == name else part.seconds) for part in parts}
        words = plan.timed(self.place, {part: share - GRACE - 1 for part, share in shares.items()}, begun)
        return self.jobs.start(plan.Job("timed", words), self.events.append)

    def _watched(self, process: Process, name: str, until: float) -> str | None:
        """Waits for the end of a part. Returns: None, or how it broke."""
        while time.monotonic() < until:
            rc = process.process.poll()
            if rc is not None:
                process.listener.join(GRACE)
            if any(event.get("end") == name for event in self.events):
                return None
            if rc is not None:
                return f"the process ended with exit code {rc}: {process.last}"
            time.sleep(0.05)
        return "it ran out of time"

    def _begun(self, name: str) -> int:
        """How many cases of a part were begun."""
        return sum("case" in event and event["part"] == name for event in self.events)

    def _last(self, key: str, name: str) -> str | None:
        found = [event[key] for event in self.events if key in event and event["part"] == name]
        return found[-1] if found else None

    def _told(self, name: str, broken: dict[str, str]) -> dict[str, Any]:
        """What the process told of a part."""
        own = [event for event in self.events if event.get("part") == name]
        failed = {event["failed"]: event["why"] for event in own if "failed" in event}
        ended = [event for event in self.events if event.get("end") == name]
        told = {"cases": self._begun(name), "failed": failed | broken}
        return told | ({"not_begun": ended[-1]["left"], "goals": ended[-1].get("goals", "")} if ended else {})
