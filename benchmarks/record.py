"""Rows of benchmark results: what they say about the machine and the sources, where they lie, and tables of
them."""

from __future__ import annotations

import dataclasses
import functools
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
from torch import nn

from benchmarks import markdown
from benchmarks.cost import Cost
from benchmarks.harness import Case, Timing
from jdkd.errors import InputError
from jdkd.latency.records import sources

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OURS = "jdkd"
_UNITS = ((1e6, "s"), (1e3, "ms"), (1, "µs"))
Row = dict[str, Any]


def device_name(device: str, threads: int | None = None) -> str:
    """The name of the GPU (``cuda`` or ``cuda:N``), or the processor's with the number of threads in use, or of those
    that were."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    processor = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        processor = found.group(1).strip() if found else processor
    return f"{processor}, {threads or torch.get_num_threads()} threads"


def sources_hash() -> str:
    """A hash of ``csrc/`` and ``kernels/``: rows of the same hash timed the same kernels."""
    digest = hashlib.sha256()
    for path in sorted(p for room in ("csrc", "kernels") for p in (ROOT / room).rglob("*") if p.is_file()):
        if path.suffix in {".h", ".cpp", ".cu", ".cuh", ".py"}:
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers of a model, with their names: for one that lies in no file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(-1).numpy().tobytes())
    return digest.hexdigest()


def require_published(file: Path, root: Path = ROOT) -> None:
    """Refuses to add to the files of results what no commit can repeat.

    Args:
        file: where results are to go; outside of the checkout's results anything may.
        root: of the checkout.

    Raises:
        InputError: the sources were changed since the last commit, or there is no telling.
    """
    if not file.resolve().is_relative_to(root / RESULTS.relative_to(ROOT)):
        return
    found = sources(root)
    if found["dirty"] is not False:
        state = (
            "is no checkout of git" if found["dirty"] is None else f"has changes since commit {found['commit'][:12]}"
        )
        raise InputError(
            f"{file} is among the published results, and {root} {state}, so nobody could repeat them; commit first, or "
            "give --out elsewhere."
        )


def command(*words: str) -> str | None:
    """What a command prints, at the root of the checkout; None where it is missing, fails or says nothing."""
    try:
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


@functools.cache
def commit() -> str | None:
    """The commit that this checkout is at, if git knows; a copy without git has the hash of its sources."""
    return command("git", "rev-parse", "--short=12", "HEAD")


def environment(device: str, copy_bandwidth: float) -> Row:
    """What every row of one run has in common."""

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
        "tf32": torch.backends.cudnn.conv.fp32_precision == "tf32" if gpu else None,  # for cuDNN and our kernels
        "commit": commit(),
        "sources": sources_hash(),
        "load": round(os.getloadavg()[0], 2),
        "copy_bytes_per_s": round(copy_bandwidth),
    }


def rows(case: Case, timings: Sequence[Timing], common: Row) -> list[Row]:
    """One row a provider, the baseline's first; where the baseline was left out, gains over it are None."""
    baseline = {timing.provider: timing.median for timing in timings}.get(next(iter(case.providers)))
    found = []
    for timing in timings:
        low, high = timing.quartiles()
        rate, copy = case.least_bytes / timing.median, timing.copy_bytes_per_s or common["copy_bytes_per_s"]
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
                **_cost(timing.cost),
                "times_baseline": None if baseline is None else round(baseline / timing.median, 3),
                "least_bytes": case.least_bytes,
                "bytes_per_s": round(rate),
                "of_copy": round(rate / copy, 4),
                "note": timing.note,
                "counts": timing.counts,
                **common,
                "copy_bytes_per_s": round(copy),
            }
        )
    return found


def _cost(cost: Cost | None) -> Row:
    """The fields of :class:`benchmarks.cost.Cost`, all None where it was not measured."""
    return {field.name: getattr(cost, field.name, None) for field in dataclasses.fields(Cost)}


def result_file(device: str, op: str, threads: int | None = None) -> Path:
    """Where saved rows of an operator lie, by default those of this process's number of threads."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device, threads).lower().replace("(r)", "")).strip("-")
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
    """Markdown tables, one a device: a line a case, a column a family of providers with its gain over the baseline.

    A family is what the first word of a provider says, ``jdkd`` or ``torch.compile``; its fastest member stands for it,
    named in brackets. Where the rows tell, further columns compare the baseline with ours, see :func:`_comparison`.
    """
    by_device: dict[str, list[Row]] = {}
    for row in given:
        by_device.setdefault(row["device"], []).append(row)
    return "\n\n".join(f"{device}:\n\n{_of_device(rows)}" for device, rows in by_device.items())


def _of_device(given: Sequence[Row]) -> str:
    cases: dict[tuple[str, str], dict[str, Row]] = {}
    families = list(dict.fromkeys(_family(row) for row in given))
    for row in given:
        key = (" ".join(row[name] for name in ("case", "dtype", "layout")), row["mode"])
        fastest = cases.setdefault(key, {})
        fastest[_family(row)] = min(row, fastest.get(_family(row), row), key=lambda row: row["median_us"])
    order = list(dict.fromkeys(case for case, _ in cases))
    cases = dict(sorted(cases.items(), key=lambda item: (order.index(item[0][0]), item[0][1])))  # modes side by side
    comparisons = [_comparison(found.get(families[0]), found.get(OURS)) for found in cases.values()]
    compared = [name for name in ("of copy", "peak memory", "kept") if any(name in line for line in comparisons)]
    lines = []
    for (key, found), comparison in zip(cases.items(), comparisons, strict=True):
        cells = [_cell(found[name]) if name in found else "not measured" for name in families]
        cells += [comparison.get(name, "") for name in compared]
        lines.append([*key, *cells])
    return markdown.table(["case", "mode", *families, *compared], "llr", lines)


def _family(row: Row) -> str:
    return row["provider"].partition(" ")[0]


def duration(microseconds: float) -> str:
    """A time in the unit that reads best."""
    factor, unit = next(scale for scale in _UNITS if microseconds >= scale[0] or scale[0] == 1)
    return f"{microseconds / factor:.3g} {unit}"


def _cell(row: Row) -> str:
    text, gain = duration(row["median_us"]), row["times_baseline"]
    member = row["provider"].partition(" ")[2]
    notes = [f"{gain:.1f}×"] if gain not in (None, 1) else []
    notes += [member] if member else []
    return f"{text} ({', '.join(notes)})" if notes else text


def _comparison(baseline: Row | None, ours: Row | None) -> dict[str, str]:
    """How fast ours move the least bytes, as a part of a copy's bandwidth; and the memory of the baseline and of ours:
    the most beyond the inputs, and what is kept for the backward."""
    if ours is None:
        return {}
    found = {"of copy": f"{ours['of_copy']:.0%}"}
    for name, field in (("peak memory", "peak_bytes"), ("kept", "kept_bytes")):
        sizes = [row.get(field) if row else None for row in (baseline, ours)]
        if sizes[1] is not None:
            found[name] = " → ".join("–" if size is None else f"{size / 1e6:.3g}" for size in sizes) + " MB"
    return found
