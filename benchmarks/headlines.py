"""The sentences of the front page on kernels, from the committed rows; `python -m benchmarks.readme` writes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.accelerate import ALL

Row = dict[str, Any]
OP = "headlines"
LOSS = {"case": "P3 N=2", "mode": "forward+backward", "dtype": "float32", "layout": "NCHW"}
CONVOLUTION = {"case": "P3 fpn 3x3 256->256 x0.5 N=2", "mode": "forward", "dtype": "float32"}


ACCELERATED = ("RetinaNet R50", "Faster R-CNN R50", "FCOS R50")  # torchvision's


def sentences(loss: Sequence[Row], convolution: Sequence[Row], accelerated: Sequence[Row]) -> str:
    """A list in Markdown; what has no row is not measured. Each compares what took turns in one run, the last of them.

    Args:
        loss: rows of the Pearson loss.
        convolution: rows of the elastic convolution.
        accelerated: rows of detectors made faster as they are.
    """
    lines = ["- **PKD's loss**: not measured."]
    if found := _together(loss, LOSS, ("jdkd", "eager", "torch.compile")):
        own, eager, compiled = found
        lines = [
            f"- **PKD's loss** on P3 of two images, fp32, forward and backward, {own['device']}: "
            f"{own['median_us'] / 1e3:.3g} ms, {eager['median_us'] / own['median_us']:.3g} times as fast as its "
            f"formula in torch and {compiled['median_us'] / own['median_us']:.2g} times as fast as torch.compile of it"
            f"; {own['peak_bytes'] / 1e6:.3g} MB at its peak, the formula {eager['peak_bytes'] / 1e6:.3g} MB."
        ]
    if found := _together(convolution, CONVOLUTION, ("jdkd", "full_width")):
        half, whole = found
        lines.append(
            f"- **An elastic 3x3 convolution** with half of its 256 channels active takes "
            f"{half['median_us'] / whole['median_us']:.3g} of the time of all of it, on {half['device']}."
        )
    found = {row["case"]: row for row in accelerated if row["ingredient"] == ALL and row["case"] in ACCELERATED}
    if len(found) == len(ACCELERATED):
        ratios = ", ".join(f"{found[case]['alone'][0]:.2f} ({case})" for case in ACCELERATED)
        sizes, devices = ({str(row[what]) for row in found.values()} for what in ("size", "device"))
        where = f"at {sizes.pop().strip('[]').replace(', ', ' x ')}, {devices.pop()}"
        lines.append(f"- **torchvision's detectors, accelerated as they are**, take {ratios} of their time {where}.")
    return "\n".join(lines)


def _together(rows: Sequence[Row], wanted: Row, providers: Sequence[str]) -> list[Row]:
    """The rows of a case by some providers, in any of their forms, of the last run that has them all; else none."""
    runs: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        family = row["provider"].partition(" ")[0]
        if family in providers and all(row[name] == value for name, value in wanted.items()):
            runs.setdefault((row["device"], row["time"]), {})[family] = row
    whole = [run for run in runs.values() if len(run) == len(providers)]
    return [whole[-1][name] for name in providers] if whole else []
