"""Times the kernels against their competitors on the device at hand and prints a table.

    python -m benchmarks.run                                what fits two minutes
    python -m benchmarks.run --full pearson                 every size, dtype and layout of one operator
    python -m benchmarks.run --full pearson --match "P3-P7 N=16 bfloat16 NCHW"
    python -m benchmarks.run --save                         also append to benchmarks/results/<device>/<op>.jsonl
    python -m benchmarks.run --table FILE...                only print the table of files of rows

Every ``benchmarks/cases/<op>.py`` offers ``cases(device, full)``.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import goals, harness, record


def all_cases(ops: list[str], device: str, full: bool) -> Iterator[harness.Case]:
    """The cases of the operators asked for, of all if none is; they take turns, each its most telling first."""
    names = sorted(path.stem for path in (Path(__file__).parent / "cases").glob("[a-z]*.py"))
    if unknown := set(ops) - set(names):
        raise SystemExit(f"there is no benchmark of {', '.join(sorted(unknown))}; choose from {', '.join(names)}")
    by_op = []
    for name in ops or names:
        module = importlib.import_module(f"benchmarks.cases.{name}")
        if hasattr(module, "cases"):
            by_op.append(module.cases(device, full))
        else:
            print(f"{name}: not run, benchmarks/cases/{name}.py offers no cases(device, full)", file=sys.stderr)
    for turn in itertools.zip_longest(*by_op):
        yield from filter(None, turn)


def describe(row: record.Row) -> str:
    """One line of progress."""
    low, high = row["quartiles_us"]
    gain = "" if row["times_baseline"] is None else f"{row['times_baseline']:.2f} x"
    others = [f"error {row['error']:.0e}"]
    others += [f"{row[name] / 1e6:.3g} MB {name[:4]}" for name in ("peak_bytes", "kept_bytes") if row[name] is not None]
    others += [f"{row[name]} {name}" for name in ("kernels", "dispatched_ops") if row[name] is not None]
    others += [f"host {row['host_us']:.0f} us"] if row["host_us"] is not None else []
    others += [f"{count} {name.replace('_', ' ')}" for name, count in (row["counts"] or {}).items()]
    others += [row["note"]] if row["note"] else []
    return (
        f"  {row['provider']:<27}{row['median_us']:>12.1f} us  [{low:.1f}, {high:.1f}]  {gain:>8} "
        f"{row['of_copy']:>6.1%} of copy  {', '.join(others)}"
    )


def timed(
    case: harness.Case, device: str, seconds: float, common: record.Row, out: Sequence[Path] = ()
) -> tuple[list[record.Row], dict[str, str]]:
    """Times one case, and appends its rows to files before anything else is begun.

    Args:
        case: what to time.
        device: ``cpu`` or ``cuda``.
        seconds: of rounds.
        common: see :func:`benchmarks.record.environment`.
        out: files of rows.

    Returns:
        The rows; and what is wrong with providers that were left out, by their names.
    """
    print(case, flush=True)
    wrong: dict[str, str] = {}
    rows = record.rows(case, harness.measure(case, device, seconds, wrong), common)
    for path in out:
        record.append(path, rows)
    print(
        "\n".join([*map(describe, rows), *(f"  {name} is not timed: {why}" for name, why in wrong.items())]), flush=True
    )
    return rows, wrong


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.partition("\n")[0])
    parser.add_argument("ops", nargs="*", help="operators; all if none is named")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--full", action="store_true", help="every size, dtype and layout")
    parser.add_argument("--match", default="", help="only cases whose name has all these words")
    parser.add_argument("--seconds", type=float, default=2.0, help="of rounds a case")
    parser.add_argument("--limit", type=float, default=100.0, help="begin no case after so many seconds")
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    parser.add_argument("--save", action="store_true", help="append the rows to benchmarks/results/")
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="only print these rows")
    given = parser.parse_args(words)
    if given.table:
        print(record.tables(record.latest(record.load(given.table))))
        return 0
    started = time.monotonic()
    device = ("cuda" if torch.cuda.is_available() else "cpu") if given.device == "auto" else given.device
    common = record.environment(device, harness.copy_bandwidth(device))
    print(f"{common['device']}, torch {common['torch']}, copy {common['copy_bytes_per_s'] / 1e9:.1f} GB/s")
    done, wrong, left = [], 0, []
    for case in all_cases(given.ops, device, given.full):
        if not set(given.match.split()) <= set(str(case).split()):
            continue
        if not given.full and time.monotonic() - started > given.limit:
            left.append(str(case))
            continue
        out = [given.out] if given.out else []
        out += [record.result_file(device, case.op)] if given.save else []
        rows, failed = timed(case, device, given.seconds, common, out)
        done += rows
        wrong += bool(failed)
    print("\n" + record.tables(done))
    for op in sorted({row["op"] for row in done} & goals.GOALS.keys()):
        print(f"\nGoals of {op}\n\n{goals.table(op, done)}")
    if left:
        print(f"\nnot measured, out of time: {'; '.join(left)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
