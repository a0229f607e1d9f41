"""What the kernels are to reach, as data, and what rows of results say to it.

A :class:`Goal` compares providers of one case, which took turns in one process: rows of two runs are not compared. An
:class:`Overall` takes such comparisons over all convolutions, a :class:`Limit` stands for itself, and a :class:`Floor`
for the bytes that anybody must move, at the speed at which the same process copied. What only a GPU can
show is asked of a GPU alone. Where there is no row nothing is claimed.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks import conv_shapes, markdown, record
from benchmarks.record import Row

DEVICES = {"cpu": "CPU", "cuda": "GPU"}
NOT_MEASURED = "not measured"
PEARSON_TABLE = 64 << 10  # bytes: losses, and two sides of five numbers for each of 1280 channels, rounded up by torch


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
        """The two rows that it compares, ours first, both of the run that timed theirs; None where one is missing."""
        own = _of_case(self, rows)
        theirs = [row for row in own if row["provider"] == self.theirs]
        ours = [row for row in own if _family(row, self.ours) and theirs and _run(row) == _run(theirs[0])]
        return (min(ours, key=lambda row: row["median_us"]), theirs[0]) if ours else None

    def gain(self, rows: Sequence[Row]) -> float | None:
        """How many times as fast ours is."""
        pair = self.pair(rows)
        return None if pair is None else pair[1]["median_us"] / pair[0]["median_us"]

    def cells(self, rows: Sequence[Row]) -> list[str]:
        """A line of the table."""
        wanted = (
            f"at least {self.least:g}×" if self.least else f"at most {self.most:g} of the time" if self.most else ""
        )
        line, pair, gain = [_named_case(self), self.mode], self.pair(rows), self.gain(rows)
        if pair is None or gain is None:
            return [*line, self.ours, self.theirs, NOT_MEASURED, wanted]
        measured = f"{1 / gain:.3f} of the time" if self.most else f"{gain:.2f}×"
        return [*line, *map(_named, pair), measured, wanted]


@dataclass(frozen=True)
class Overall:
    """How the time of one provider is to compare with that of another, over every convolution of the detectors.

    Args:
        device, mode, dtype, ours, theirs, layout: as for :class:`Goal`.
        case: what the labels of the cases end in, behind that of the convolution.
        mean: how many times as fast ours is to be, as a geometric mean.
        least: how many times as fast ours is to be everywhere.
    """

    device: str
    case: str
    mode: str
    dtype: str
    ours: str
    theirs: str
    mean: float
    least: float
    layout: str = "channels-last"

    def goals(self) -> list[Goal]:
        """Its comparisons, one a convolution."""
        named = (self.mode, self.dtype, self.ours, self.theirs, self.least, None, self.layout)
        return [Goal(self.device, f"{label} {self.case}", *named) for label in conv_shapes.distinct()]

    def cells(self, rows: Sequence[Row]) -> list[str]:
        """A line of the table."""
        goals = self.goals()
        gains = [gain for goal in goals if (gain := goal.gain(rows)) is not None]
        measured = f"{NOT_MEASURED}, {len(gains)} of {len(goals)} were" if gains else NOT_MEASURED
        if len(gains) == len(goals):
            measured = f"{math.exp(math.fsum(map(math.log, gains)) / len(gains)):.2f}×, {min(gains):.2f}× and more"
        wanted = f"mean at least {self.mean:g}×, none below {self.least:g}×"
        every = dataclasses.replace(self, case=f"all convolutions {self.case}")
        return [_named_case(every), self.mode, self.ours, self.theirs, measured, wanted]


@dataclass(frozen=True)
class Limit:
    """What one provider may take in one case.

    Args:
        device, case, mode, dtype, layout: as for :class:`Goal`.
        ours: a provider.
        most: of fields of its row, or of its ``counts``, the most that is allowed.
    """

    device: str
    case: str
    mode: str
    dtype: str
    ours: str
    most: Mapping[str, float]
    layout: str = "channels-last"

    def cells(self, rows: Sequence[Row]) -> list[str]:
        """A line of the table."""
        found = [row for row in _of_case(self, rows) if row["provider"] == self.ours]
        values = {**found[0], **(found[0].get("counts") or {})} if found else {}
        measured = ", ".join(_amount(name, values.get(name)) for name in self.most) if found else NOT_MEASURED
        wanted = ", ".join(_amount(name, most) for name, most in self.most.items())
        return [_named_case(self), self.mode, self.ours, "", measured, f"at most {wanted}"]


@dataclass(frozen=True)
class Floor:
    """How near a provider is to come to the time that a copy of the least bytes takes.

    Args:
        device, case, mode, dtype, ours, layout: as for :class:`Goal`.
        most: its time over that of the copy.
    """

    device: str
    case: str
    mode: str
    dtype: str
    ours: str
    most: float
    layout: str = "channels-last"

    def cells(self, rows: Sequence[Row]) -> list[str]:
        """A line of the table."""
        found = [row for row in _of_case(self, rows) if _family(row, self.ours) and row["of_copy"]]
        best = min(found, key=lambda row: row["median_us"], default=None)
        line = [_named_case(self), self.mode, _named(best) if best else self.ours, "copy of the least bytes"]
        measured = f"{1 / best['of_copy']:.2f} of the time" if best else NOT_MEASURED
        return [*line, measured, f"at most {self.most:g} of the time"]


def _family(row: Row, ours: str) -> bool:
    """Whether a row is of a provider, or of one of several that begin with it."""
    return row["provider"] == ours or row["provider"].startswith(f"{ours} ")


def _of_case(goal: Goal | Limit | Floor, rows: Sequence[Row]) -> list[Row]:
    names = ("case", "mode", "dtype", "layout")
    return [row for row in rows if all(row[name] == getattr(goal, name) for name in names)]


def _run(row: Row) -> tuple[str | None, str | None]:
    """What rows of one run have in common."""
    return row.get("time"), row.get("commit")


def _named_case(goal: Goal | Overall | Limit | Floor) -> str:
    return f"{goal.case} {goal.dtype} {goal.layout}"


def _named(row: Row) -> str:
    host = "" if row["host_us"] is None else f" (host {record.duration(row['host_us'])})"
    return f"{row['provider']} {record.duration(row['median_us'])}{host}"


def _amount(name: str, value: float | None) -> str:
    if name == "median_us":
        return record.duration(value) if value is not None else f"time {NOT_MEASURED}"
    words = name.replace("_", " ")
    return f"{words} {NOT_MEASURED}" if value is None else f"{value:g} {words}"


def _conv(device: str, dtype: str) -> list[Goal | Overall]:
    half, whole = "P3 fpn 3x3 256->256 x0.5 N=2", "P3 fpn 3x3 256->256 x1 N=2"
    if device == "cpu":
        return [
            Goal(device, half, "forward", dtype, "jdkd", "full_width", most=0.35),
            Goal(device, whole, "forward", dtype, "jdkd", "exported", most=1.05),
        ]
    convs = {level: f"P{level} fpn 3x3 256->256" for level in (3, 4, 5)} | {6: conv_shapes.P6, 7: conv_shapes.P7}
    sliced = {(3, 2): 0.95, (4, 2): 0.95, **{(level, 2): 1.5 for level in (5, 6, 7)}}  # level, images
    sliced |= {(level, 1): 1.5 for level in convs}
    masked = {(3, "full_width"): 3.2, (4, "full_width"): 2.5, (3, "mask_multiply"): 3.2, (4, "mask_multiply"): 2.5}
    named = ("forward", dtype, "jdkd")
    return [
        *(Goal(device, f"{convs[level]} x0.5 N=2", *named, other, least) for (level, other), least in masked.items()),
        *(
            Goal(device, f"{convs[level]} x0.5 N={images}", *named, "slice_contiguous", least)
            for (level, images), least in sliced.items()
        ),
        Overall(device, "x0.5 N=2", *named, "slice_contiguous", mean=1.0, least=0.95),
    ]


def _levels() -> list[Goal]:
    least = {"P5-P7 rpn 3x3 256->256 x0.5 N=2": 1.5, "P2-P6 rpn 3x3 256->256 x0.5 N=2": 0.95}
    least |= {case.replace("N=2", "N=1"): 1.5 for case in least}
    named = ("forward", "bfloat16", "jdkd", "slice_contiguous")
    return [Goal("cuda", case, *named, least=gain) for case, gain in least.items()]


def _pointwise(label: str) -> list[Goal]:
    case = ("cuda", f"{label} x0.5 N=2", "evaluation", "bfloat16", "jdkd")
    return [Goal(*case, "eager", least=1.3), Goal(*case, "torch.compile", least=1.0)]


def _pack(layout: str) -> list[Goal | Limit]:
    case = ("cpu", "ResNet-50 x0.5", "forward+backward", "float32")
    limits = {"forward": 25, "unpack": 40}  # microseconds
    return [
        *(
            Goal(*case, f"jdkd {mode}", "slice_contiguous", least=least, layout=layout)
            for mode, least in (("main_grad", 3.0), ("autograd", 1.3))
        ),
        *(
            Limit("cuda", "37.9M of ResNet-101 x0.5", mode, "bfloat16", "jdkd", most, layout)
            for mode, most in ((mode, {"median_us": limit, "kernels": 1}) for mode, limit in limits.items())
        ),
    ]


def _pearson() -> list[Goal | Floor | Limit]:
    """Of the five levels of a detector: how near to their floor in bytes, how much faster than what people run, and
    what is kept for the backward: dS of the single pass, else five numbers a channel for each side."""
    large, small, bf16 = "P3-P7 N=16", "P3-P7 N=2", "bfloat16"
    wanted = {"forward": (1.05, None, None), "forward+backward": (1.15, 15, 3.4), "tap": (1.15, 8, 2)}
    goals: list[Goal | Floor | Limit] = []
    for layout in ("NCHW", "channels-last"):
        for mode, (floor, eager, compiled) in wanted.items():
            # A loss alone makes 3 passes in a single one, which takes NCHW; split it makes 5.
            split = 5 / 3 if (mode, layout) == ("forward+backward", "channels-last") else 1
            case = ("cuda", large, mode, bf16, "jdkd")
            goals.append(Floor(*case, most=round(floor * split, 2), layout=layout))
            if eager and layout == "NCHW":
                goals.append(Goal(*case, "eager", least=eager, layout=layout))
                goals.append(Goal(*case, "torch.compile", least=compiled, layout=layout))
    # 16 us of bytes on an H200 are 23 on an H100; what is launched besides takes the other half.
    goals.append(Floor("cuda", small, "forward+backward", bf16, "jdkd", most=1.5, layout="NCHW"))
    goals += [
        Limit("cuda", large, "tap", bf16, f"jdkd {name}", {"kept_bytes": PEARSON_TABLE}, "NCHW")
        for name in ("triton", "cuda")
    ]
    gradients = 16 * 256 * (100 * 168 + 50 * 84 + 25 * 42 + 13 * 21 + 7 * 11) * 2
    kept = {"kept_bytes": gradients + PEARSON_TABLE}
    goals.append(Limit("cuda", large, "forward+backward", bf16, "jdkd single", kept, "NCHW"))
    for dtype, layout in itertools.product(("float32", "bfloat16", "float16"), ("NCHW", "channels-last")):
        cpu = ("cpu", "P3 N=2", "forward+backward", dtype, "jdkd")
        goals.append(Floor(*cpu, most=round(1 / 0.6, 2), layout=layout))
        goals += [Goal(*cpu, other, least, layout=layout) for other, least in (("eager", 10), ("torch.compile", 4))]
    return goals


def _changes() -> list[Limit]:
    waits = {"host_syncs": 0, "kernels_compiled": 0}
    most = {"jdkd": waits, "jdkd triton": waits, "jdkd packed": waits, "jdkd torch.compile": {"graphs_compiled": 1}}
    case = ("cuda", "R18-FPN 128x224 N=2", "evaluation", "bfloat16")
    return [Limit(*case, provider, limits) for provider, limits in most.items()]


GOALS: dict[str, list[Goal | Overall | Limit | Floor]] = {
    "pearson": [*_pearson()],
    "elastic_conv": [*_conv("cpu", "float32"), *_conv("cuda", "bfloat16")],
    "elastic_levels": [*_levels()],
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
    "subnet_change": [*_changes()],
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
        found = {of: [goal.cells(rows) for goal in goals] for of, rows in by_device.items()}
        found = {of: lines for of, lines in found.items() if any(line[4] != NOT_MEASURED for line in lines)}
        parts += [f"{of}:\n\n{_of_device(lines)}" for of, lines in found.items()]
        parts += [f"On a {name}: {NOT_MEASURED}."] if goals and not found else []
    return "\n\n".join(parts)


def _of_device(goals: Sequence[Sequence[str]]) -> str:
    return markdown.table(("case", "mode", "ours", "against", "measured", "goal"), "llr", goals)
