"""What the teachers of a pool score and cost: mAP, parameters and latency of many of them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from jdkd.latency import LatencyReport, fuse_for_inference, measure_quick
from jdkd.notices import ProgressCallback
from jdkd.pool.elastic_pool import TeacherPool
from jdkd.pool.members import ScoredTeacher, Teacher, teacher_to_json

TIMED_TOGETHER = 8  # teachers that are in memory at a time, beside the largest


@dataclass(frozen=True)
class SpreadRow:
    """One teacher.

    Args:
        name: what ``--subnet`` and :meth:`TeacherPool.named` take.
        teacher: as JSON.
        map: COCO mAP.
        parameters: of the detector alone.
        latency_ms: median end to end of one image.
        latency_ratio: of its latency to the largest network's, timed in turn.
        latency_interval: where that lies with 95 %.
    """

    name: str
    teacher: dict[str, Any]
    map: float
    parameters: int
    latency_ms: float
    latency_ratio: float
    latency_interval: tuple[float, float]

    @property
    def is_foreign(self) -> bool:
        return "foreign" in self.teacher


@dataclass(frozen=True)
class Spread:
    """What is known of a pool: its teachers, best first, and where they were timed."""

    rows: list[SpreadRow]
    environment: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"teachers": [asdict(row) for row in self.rows], "environment": self.environment}


def measure_spread(
    pool: TeacherPool,
    teachers: Sequence[Teacher],
    selection: Any,
    images: Sequence[Tensor],
    *,
    progress: ProgressCallback | None = None,
    **timing: Any,
) -> Spread:
    """Scores teachers and times them against the largest network.

    Args:
        pool: a finished pool; it stays as it is.
        teachers: each is measured once.
        selection: images that scores are taken on.
        images: uint8 ``[3, H, W]``, that are timed on.
        progress: called with (what, done, total, values).
        timing: options of :func:`jdkd.latency.measure_quick`.

    Raises:
        InputError: the pool does not hold one of them, or it cannot be scored or timed on these images.
    """
    distinct = list(dict.fromkeys(teachers))
    largest, rows, reports = fuse_for_inference(pool.teacher(pool.space.largest)), [], []
    for start in range(0, len(distinct), TIMED_TOGETHER):
        members, models = {}, {"largest": largest}
        for teacher in distinct[start : start + TIMED_TOGETHER]:
            detector = pool.teacher(teacher)
            members[str(teacher)] = pool.scored(teacher, detector, selection)
            models |= {} if teacher == pool.space.largest else {str(teacher): fuse_for_inference(detector)}
            if progress:
                progress("pool: scoring", start + len(members), len(distinct), {"mAP": members[str(teacher)].map})
        reports.append(measure_quick(models, images, device=pool.device, **timing))
        rows += [_row(name, member, reports[-1]) for name, member in members.items()]
        if progress:
            progress("pool: timing", len(rows), len(distinct), {})
    return Spread(sorted(rows, key=lambda row: -row.map), reports[0].environment if reports else {})


def _row(name: str, member: ScoredTeacher, report: LatencyReport) -> SpreadRow:
    timed = name if name in report.models else "largest"
    found = None if timed == "largest" else report.ratio(timed)
    return SpreadRow(
        name=name,
        teacher=teacher_to_json(member.teacher),
        map=member.map,
        parameters=member.parameters,
        latency_ms=report.models[timed].modes()["end_to_end"].p50,
        latency_ratio=found.value if found else 1.0,
        latency_interval=found.interval if found else (1.0, 1.0),
    )
