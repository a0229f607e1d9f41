"""What came of a run, for a person and, in the last line of the same file, for a program."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import OPS, SANITIZERS, TIMED

Record = dict[str, Any]


def not_run(part: str, why: str) -> Record:
    """The record of a part that was not begun."""
    return {"part": part, "seconds": 0.0, "limit": 0.0, "why": why, "failed": {part: why}}


def problems(record: Record) -> dict[str, str]:
    """What failed in a part, each with the reason."""
    found = dict(record.get("failed", {}))
    if record.get("why") and not found:
        found[record["part"]] = record["why"]
    for job in record.get("jobs", ()):
        if "rc" not in job:
            continue  # it could not be run here: told, no failure
        told = {event["failed"]: event["why"] for event in job["events"] if "failed" in event}
        found |= told
        if job.get("timed_out"):
            found[job["job"]] = "it ran out of time"
        elif job["rc"] != 0 and not told:
            found[job["job"]] = job.get("why") or f"exit code {job['rc']}: {job.get('last', '')}"
    return found


def line(record: Record) -> str:
    """A part in one line."""
    failed = problems(record)
    state = "ok" if not failed else "not run" if record.get("why") else "FAILED"
    notes = [f"{record['cases']} cases"] if "cases" in record else []
    notes += [f"{len(record['not_begun'])} not begun"] if record.get("not_begun") else []
    notes += [f"{job['job']}: not run, {job['why']}" for job in record.get("jobs", ()) if "rc" not in job]
    notes += [f"{len(failed)} failed"] if failed else []
    return f"{record['part']:<22}{state:<9}{record['seconds']:>6.1f} of {record['limit']:.0f} s  {'; '.join(notes)}"


class Summary:
    """The records of a run so far.

    Args:
        out: the folder of results.
        run: which run it is.
        limit: seconds that it may take.
    """

    def __init__(self, out: Path, run: str, limit: float) -> None:
        self.out, self.run, self.limit = out, run, limit
        self.records: list[Record] = []
        self.seconds, self.stopped = 0.0, False

    def add(self, record: Record) -> None:
        """Takes the record of a part, and keeps it in ``parts.jsonl`` at once."""
        tests = self.out / "tests.jsonl"
        if record["part"] == "tests" and tests.is_file():
            record["failed"] = record.get("failed", {}) | _failed_tests(tests)
        self.records.append(record)
        with (self.out / "parts.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")

    def failed(self) -> bool:
        return self.stopped or not self.records or any(map(problems, self.records))

    def facts(self) -> dict[str, Any]:
        """All of it, as data."""
        broken = {record["part"]: problems(record) for record in self.records}
        return {
            "run": self.run, "ok": not self.failed(), "stopped": self.stopped, "seconds": round(self.seconds, 1),
            "limit": self.limit, "machine": _machine(self.records), "failed": {k: v for k, v in broken.items() if v},
            "parts": [{k: v for k, v in record.items() if k not in ("jobs", "goals")} for record in self.records],
        }  # fmt: skip

    def text(self) -> str:
        """All of it, as a person reads it."""
        facts = self.facts()
        verdict = "stopped" if self.stopped else "everything passed" if facts["ok"] else "FAILED"
        lines = [f"GPU check, {self.run} run: {verdict}, {facts['seconds']:.0f} of {self.limit:.0f} s", ""]
        lines += [f"  {name}: {value}" for name, value in facts["machine"].items()] + [""]
        lines += [*map(line, self.records), ""]
        for part, why in facts["failed"].items():
            lines += [f"{part}: {name}: {' '.join(str(text).split())[:300]}" for name, text in why.items()]
        for record in self.records:
            left = record.get("not_begun") or []
            lines += ["", f"{record['part']}, not begun: {'; '.join(left)}"] if left else []
            lines += ["", record["goals"]] if record.get("goals") else []
        return "\n".join(lines)

    def write(self) -> None:
        """Writes ``summary.txt``, whole."""
        draft = self.out / "summary.txt.part"
        draft.write_text(f"{self.text()}\n\n{json.dumps(self.facts())}\n", encoding="utf-8")
        draft.replace(self.out / "summary.txt")


def _failed_tests(rows: Path) -> dict[str, str]:
    """Tests by their ids that failed, of the rows that are whole."""
    found = {}
    for text in rows.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(text)
        except ValueError:
            continue  # cut off where the process was ended
        if row["outcome"] == "failed":
            found[row["test"]] = row["why"]
    return found


def _machine(records: list[Record]) -> dict[str, Any]:
    events = [event for record in records for job in record.get("jobs", ()) for event in job["events"]]
    return {name: value for event in events for name, value in event.get("machine", {}).items()}


def failures(before: Path) -> Mapping[str, list[str]]:
    """What failed, of the summary of a run: operators of the smoke, tests, sanitizers, and benchmark parts."""
    failed = json.loads(before.read_text(encoding="utf-8").splitlines()[-1])["failed"]
    # A smoke's failure is named "smoke OP" where it broke, and "OP check" where a check did.
    smoke = [op for op in OPS if any(op in name.split() for name in failed.get("smoke", {}))]
    tests = [name for name in failed.get("tests", {}) if "::" in name]
    found = " ".join(failed.get("tests", {}))
    tools = [tool for tool in SANITIZERS if f"sanitizer {tool}" in found]
    return {"smoke": smoke, "tests": tests, "sanitizers": tools, "timed": [name for name in TIMED if name in failed]}
