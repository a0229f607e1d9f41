"""Checks every kernel on the devices at hand against float64. See :func:`run`.

``python -m jdkd.check`` does so and prints :func:`lines`, as ``jdkd check`` does with a table.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch

from jdkd import _backend
from jdkd._verdicts import RIGHT, Verdict, dtype_name
from jdkd.env import load_operators


class Row(NamedTuple):
    """One form of an operator on one device, or a backend that is not there.

    Args:
        op: noun stem of the operator.
        form: forward, gradient, ...; ``"all"`` of a backend that is not there.
        backend: ``"cuda"``, ``"triton"`` or ``"cpu"``.
        dtype: of the features or weights; ``""`` of a backend that is not there.
        device: where it was checked.
        verdict: what came of it; None where there was nothing to check.
        reason: why there was nothing to check.
    """

    op: str
    form: str
    backend: str
    dtype: str
    device: str
    verdict: Verdict | None
    reason: str = ""

    @property
    def is_wrong(self) -> bool:
        """Whether the form was checked and may not run unasked; one that could not be checked counts."""
        return self.verdict is not None and self.verdict.state != RIGHT

    @property
    def state(self) -> str:
        """The verdict in a word."""
        return self.verdict.state if self.verdict else "not there"

    @property
    def error(self) -> str:
        """The largest error for what is allowed, and that; empty where nothing was compared."""
        verdict = self.verdict
        return "" if verdict is None or verdict.error is None else f"{verdict.error:.1e} of {verdict.allowed:.1e}"

    @property
    def what(self) -> str:
        """The result that errs so, or why there is none."""
        return self.reason if self.verdict is None else self.verdict.what


def run() -> Iterator[Row]:
    """Checks all forms of all operators on all devices, whatever is known of them, and keeps the verdicts.

    Yields:
        A row a form, backend, dtype and device, as soon as it was checked.
    """
    load_operators()
    for op in _backend.ops():
        for backend, missing in _backend.available(op).items():
            if backend == "reference":
                continue
            devices = _devices(backend)
            if missing or not devices:
                reason = missing or "tensors on the CPU run through Triton's interpreter, which is for tests"
                yield Row(op, "all", backend, "", "", None, reason)
                continue
            for device in devices:
                for subject in _backend.subjects(op, backend, device):
                    dtype = dtype_name(subject.dtype)
                    yield Row(op, subject.form, backend, dtype, str(device), _backend.check(subject))


def lines(rows: list[Row]) -> Iterator[str]:
    """Yields: rows as plain text, one a line."""
    for row in rows:
        where = f"{row.op} / {row.form} / {row.backend} {row.dtype} {row.device}".rstrip()
        yield f"{where:<52} {row.state:<9}  {row.error:<18}  {row.what}"


def _devices(backend: str) -> list[torch.device]:
    if backend == "cpu":
        return [torch.device("cpu")]
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


if __name__ == "__main__":
    checked = list(run())
    print(*lines(checked), sep="\n")
    sys.exit(any(row.is_wrong for row in checked))
