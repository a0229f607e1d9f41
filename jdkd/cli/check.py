"""`jdkd check`."""

from __future__ import annotations

from dataclasses import dataclass

WRONG = 1
"""Exit code of a check that found a kernel wrong."""


@dataclass(frozen=True)
class Check:
    """Check every kernel on this machine's devices against float64; exit code 1 if one is wrong."""

    def __call__(self) -> int:
        from rich.console import Console
        from rich.table import Table

        from jdkd.check import run

        console = Console()
        with console.status("checking"):
            rows = list(run())
        table = Table("operator", "form", "backend", "dtype", "device", "verdict", "error", "where it is largest")
        for row in rows:
            style = "red" if row.is_wrong else "dim" if row.verdict is None else None
            table.add_row(
                row.op, row.form, row.backend, row.dtype, row.device, row.state, row.error, row.what, style=style
            )  # fmt: skip
        console.print(table)
        wrong = sum(row.is_wrong for row in rows)
        checked = sum(row.verdict is not None for row in rows)
        console.print(f"{checked} forms checked, {wrong} wrong or not to be checked" if checked else _nothing(rows))
        return WRONG if wrong else 0


def _nothing(rows: list) -> str:
    reasons = dict.fromkeys(row.reason for row in rows)
    return f"no kernel to check, plain torch runs: {'; '.join(reasons)}"
