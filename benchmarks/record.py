"""Rows of benchmark results: what they say about the machine and the sources, where they lie, and tables of
them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Case, Timing

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, Any]


def device_name(device: str) -> str:
    """The GPU's name, or the processor's with the number of threads in use."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    processor = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        processor = found.group(1).strip() if found else processor
    return f"{processor}, {torch.get_num_threads()} threads"


def sources_hash() -> str:
    """A hash of ``csrc/`` and ``kernels/``: rows of the same hash timed the same kernels."""
    digest = hashlib.sha256()
    for path in sorted(p for room in ("csrc", "kernels") for p in (ROOT / room).rglob("*") if p.is_file()):
        if path.suffix in {".h", ".cpp", ".cu", ".cuh", ".py"}:
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def environment(device: str, copy_bandwidth: float) -> Row:
    """What every row of one run has in common."""

    def command(*words: str) -> str | None:
        try:
            return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() or None
        except (OSError, subprocess.CalledProcessError):
            return None

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    gpu = device == "cuda"
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "driver": command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if gpu else None,
        "triton": version("triton") if gpu else None,
        "tf32": torch.backends.cuda.matmul.allow_tf32 if gpu else None,
        "commit": command("git", "rev-parse", "--short=12", "HEAD"),
        "sources": sources_hash(),
        "load": round(os.getloadavg()[0], 2),
        "copy_bytes_per_s": round(copy_bandwidth),
    }


def rows(case: Case, timings: Sequence[Timing], common: Row) -> list[Row]:
    """One row a provider, the baseline's first."""
    found = []
    for timing in timings:
        low, high = timing.quartiles()
        rate = case.least_bytes / timing.median
        found.append(
            {
                "op": case.op,
                "case": case.label,
                "mode": case.mode,
                "dtype": str(case.dtype).removeprefix("torch."),
                "layout": case.layout,
                "provider": timing.provider,
                "median_us": round(timing.median * 1e6, 2),
                "quartiles_us": [round(low * 1e6, 2), round(high * 1e6, 2)],
                "rounds": len(timing.seconds),
                "error": float(f"{timing.error:.3g}"),
                "host_us": None if timing.host_seconds is None else round(timing.host_seconds * 1e6, 2),
                "times_baseline": round(timings[0].median / timing.median, 3),
                "least_bytes": case.least_bytes,
                "bytes_per_s": round(rate),
                "of_copy": round(rate / common["copy_bytes_per_s"], 4),
                **common,
            }
        )
    return found


def result_file(device: str, op: str) -> Path:
    """Where saved rows of an operator lie."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower().replace("(r)", "")).strip("-")
    return RESULTS / slug / f"{op}.jsonl"


def append(path: Path, new: Iterable[Row]) -> None:
    """Adds rows to a file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in new)


def load(paths: Iterable[Path]) -> list[Row]:
    """Reads rows from files of JSON lines."""
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines() if line]


def latest(given: Iterable[Row]) -> list[Row]:
    """The last row of every device, case and provider."""
    key = ("device", "op", "case", "mode", "dtype", "layout", "provider")
    return list({tuple(row[name] for name in key): row for row in given}.values())


def tables(given: Iterable[Row]) -> str:
    """A Markdown table for each operator; see :func:`table`."""
    by_op: dict[str, list[Row]] = {}
    for row in given:
        by_op.setdefault(row["op"], []).append(row)
    return "\n\n".join(map(table, by_op.values()))


def table(given: Iterable[Row]) -> str:
    """A Markdown table: one line a case, one column a provider, with its gain over the first."""
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    providers: dict[str, None] = {}
    for row in given:
        key = tuple(row[name] for name in ("device", "op", "case", "dtype", "layout", "mode"))
        cases.setdefault(key, {})[row["provider"]] = row
        providers[row["provider"]] = None
    lines = [
        "| " + " | ".join(["device", "op", "size", "dtype", "layout", "mode", *providers]) + " |",
        "| " + " | ".join(["---"] * 6 + ["---:"] * len(providers)) + " |",
    ]
    for key, found in cases.items():
        cells = [_cell(found[name]) if name in found else "not measured" for name in providers]
        lines.append("| " + " | ".join([*key, *cells]) + " |")
    return "\n".join(lines)


def _cell(row: Row) -> str:
    microseconds = row["median_us"]
    text = f"{microseconds / 1000:.3g} ms" if microseconds >= 1000 else f"{microseconds:.3g} µs"
    return text if row["times_baseline"] == 1 else f"{text} ({row['times_baseline']:.1f}×)"
