"""What elastic convolutions are to reach, as data, and what rows of results say to it.

A goal compares providers of one case, which took turns in one process. What only a GPU can show is asked of a GPU
alone. Where there is no row nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import record
from benchmarks.record import Row

DEVICES = {"cpu": "CPU", "cuda": "GPU"}


@dataclass(frozen=True)
class Goal:
    """How the time of one provider is to compare with that of another, in one case.

    Args:
        device: ``cpu`` or ``cuda``.
        case, mode, dtype, layout: name the case, as its rows do.
        ours: a provider, or the first word of several, of which the fastest counts.
        theirs: a provider.
        least: how many times as fast ours is to be; or
        most: what share of their time ours may take; without either it is only told.
    """

    device: str
    case: str
    mode: str
    dtype: str
    ours: str
    theirs: str
    least: float | None = None
    most: float | None = None
    layout: str = "channels-last"

    def pair(self, rows: Sequence[Row]) -> tuple[Row, Row] | None:
        """The two rows that it compares, ours first; None where one is missing."""
        names = ("case", "mode", "dtype", "layout")
        own = [row for row in rows if all(row[name] == getattr(self, name) for name in names)]
        ours = [row for row in own if row["provider"] == self.ours or row["provider"].startswith(f"{self.ours} ")]
        theirs = [row for row in own if row["provider"] == self.theirs]
        return (min(ours, key=lambda row: row["median_us"]), theirs[0]) if ours and theirs else None

    def cells(self, rows: Sequence[Row]) -> list[str]:
        """A line of the table."""
        wanted = (
            f"at least {self.least:g}×" if self.least else f"at most {self.most:g} of the time" if self.most else ""
        )
        line = [f"{self.case} {self.dtype} {self.layout}", self.mode]
        pair = self.pair(rows)
        if pair is None:
            return [*line, self.ours, self.theirs, "not measured", wanted]
        ours, theirs = pair
        gain = theirs["median_us"] / ours["median_us"]
        measured = f"{1 / gain:.3f} of the time" if self.most else f"{gain:.2f}×"
        return [*line, *map(_named, pair), measured, wanted]


def _named(row: Row) -> str:
    host = "" if row["host_us"] is None else f" (host {record.duration(row['host_us'])})"
    return f"{row['provider']} {record.duration(row['median_us'])}{host}"


def _conv(device: str, dtype: str) -> list[Goal]:
    half, whole = "P3 fpn 3x3 256->256 x0.5 N=2", "P3 fpn 3x3 256->256 x1 N=2"
    if device == "cpu":
        return [
            Goal(device, half, "forward", dtype, "jdkd", "full_width", most=0.35),
            Goal(device, whole, "forward", dtype, "jdkd", "exported", most=1.05),
        ]
    sliced = {(3, 2): 0.95, (4, 2): 0.95, (5, 2): 1.5, (3, 1): 1.5, (4, 1): 1.5, (5, 1): 1.5}  # level, images
    cases = {key: "P{} fpn 3x3 256->256 x0.5 N={}".format(*key) for key in sliced}
    return [
        Goal(device, half, "forward", dtype, "jdkd", "full_width", least=3.2),
        Goal(device, cases[4, 2], "forward", dtype, "jdkd", "full_width", least=2.5),
        Goal(device, half, "forward", dtype, "jdkd", "mask_multiply", least=3.2),
        *(Goal(device, cases[key], "forward", dtype, "jdkd", "slice_contiguous", least=sliced[key]) for key in sliced),
    ]


def _pointwise(label: str) -> list[Goal]:
    case = ("cuda", f"{label} x0.5 N=2", "evaluation", "bfloat16", "jdkd")
    return [Goal(*case, "eager", least=1.3), Goal(*case, "torch.compile", least=1.0)]


def _pack(layout: str) -> list[Goal]:
    case = ("cpu", "ResNet-50 x0.5", "forward+backward", "float32")
    return [
        Goal(*case, f"jdkd {mode}", "slice_contiguous", least=least, layout=layout)
        for mode, least in (("main_grad", 3.0), ("autograd", 1.3))
    ]


GOALS = {
    "elastic_conv": [*_conv("cpu", "float32"), *_conv("cuda", "bfloat16")],
    "pack": [*_pack("NCHW"), *_pack("channels-last")],
    "elastic_pointwise": [
        goal
        for label in ("layer1 1x1 64->256", "layer2 1x1 128->512", "layer3 1x1 256->1024", "layer4 1x1 512->2048")
        for goal in _pointwise(label)
    ],
    "supernet_step": [
        Goal("cpu", "R18-FPN 128x224 N=2", "training step", "float32", "jdkd", "slice_contiguous"),
        Goal("cuda", "R50-FPN 800x1344 N=2", "training step", "bfloat16", "jdkd", "slice_contiguous", least=1.5),
    ],
}


def table(op: str, rows: Sequence[Row]) -> str:
    """Markdown: what every device that has rows says to the goals of an operator, and for which kind there are none.

    Args:
        op: a key of :data:`GOALS`.
        rows: of any operators, the latest of each provider.
    """
    parts = []
    for device, name in DEVICES.items():
        goals = [goal for goal in GOALS[op] if goal.device == device]
        own = [row for row in rows if row["op"] == op and (row["cuda"] is not None) == (device == "cuda")]
        by_device: dict[str, list[Row]] = {}
        for row in own:
            by_device.setdefault(row["device"], []).append(row)
        found = {of: rows for of, rows in by_device.items() if any(goal.pair(rows) for goal in goals)}
        parts += [f"{of}:\n\n{_of_device(goals, rows)}" for of, rows in found.items()]
        parts += [f"On a {name}: not measured."] if goals and not found else []
    return "\n\n".join(parts)


def _of_device(goals: Sequence[Goal], rows: Sequence[Row]) -> str:
    lines = [["case", "mode", "ours", "against", "measured", "goal"], ["---"] * 2 + ["---:"] * 4]
    return "\n".join(f"| {' | '.join(line)} |" for line in [*lines, *(goal.cells(rows) for goal in goals)])
