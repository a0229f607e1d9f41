"""The sentences of the front page on kernels, from the committed rows; `python -m benchmarks.readme` writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import record

Row = dict[str, Any]
OP = "headlines"
LOSS = {"case": "P3 N=2", "mode": "forward+backward", "dtype": "float32", "layout": "NCHW"}
CONVOLUTION = {"case": "P3 fpn 3x3 256->256 x0.5 N=2", "mode": "forward", "dtype": "float32"}


def sentences(loss: Sequence[Row], convolution: Sequence[Row]) -> str:
    """A list in Markdown; what has no row is not measured.

    Args:
        loss: rows of the Pearson loss.
        convolution: rows of the elastic convolution.
    """
    own, eager, compiled = (_of(loss, LOSS, provider) for provider in ("jdkd", "eager", "torch.compile"))
    lines = ["- **PKD's loss**: not measured."]
    if own and eager and compiled:
        lines = [
            f"- **PKD's loss** on P3 of two images, fp32, forward and backward, {own['device']}: "
            f"{own['median_us'] / 1e3:.3g} ms, {eager['median_us'] / own['median_us']:.3g} times as fast as its "
            f"formula in torch and {compiled['median_us'] / own['median_us']:.2g} times as fast as torch.compile of it"
            f"; {own['peak_bytes'] / 1e6:.3g} MB at its peak, the formula {eager['peak_bytes'] / 1e6:.3g} MB."
        ]
    half, whole = (_of(convolution, CONVOLUTION, provider) for provider in ("jdkd", "full_width"))
    if half and whole:
        lines.append(
            f"- **An elastic 3x3 convolution** with half of its 256 channels active takes "
            f"{half['median_us'] / whole['median_us']:.3g} of the time of all of it, on {half['device']}."
        )
    return "\n".join(lines)


def _of(rows: Sequence[Row], wanted: Row, provider: str) -> Row | None:
    """The last row of a case by a provider, in any of its forms."""
    found = [
        row
        for row in record.latest(rows)
        if row["provider"].partition(" ")[0] == provider and all(row[name] == value for name, value in wanted.items())
    ]
    return found[-1] if found else None
