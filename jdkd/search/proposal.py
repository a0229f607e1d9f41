"""What a search decides and what comes of it, as plain data that travels as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from jdkd.pool.members import Teacher, teacher_from_json, teacher_to_json
from jdkd.rewrite import Rewrite


@dataclass(frozen=True)
class Cycle:
    """A stretch of training: ``steps`` steps from ``start`` of a learning-rate cycle of ``total`` steps."""

    steps: int
    start: int
    total: int
    lr: float


@dataclass(frozen=True)
class Proposal:
    """A candidate that is to be made, decided from the archive alone.

    Args:
        number: of the candidate, from 1; the seed of its training too.
        generation: that it belongs to, from 1.
        parent: id of the candidate that it inherits from.
        kind: ``"morph"`` (another student), ``"teacher"`` (another teacher, or no longer one) or ``"train"`` (both
            stay).
        action: what is done to the parent, in words.
        rewrites: what is done to it, one after the other; each is of what the one before has left.
        teacher: who teaches it; None where nobody does.
        cycle: its stretch of training.
        predicted: its latency over the base's, by the table of latencies.
        target: the latency ratio that it is made for; None where it explores for several.
    """

    number: int
    generation: int
    parent: str
    kind: str
    action: str
    rewrites: tuple[Rewrite, ...]
    teacher: Teacher | None
    cycle: Cycle
    predicted: float
    target: float | None = None

    def to_json(self) -> dict[str, Any]:
        rewrites = [rewrite.to_json() for rewrite in self.rewrites]
        shown = {name: getattr(self, name) for name in ("number", "generation", "parent", "kind", "action")}
        rest = {
            "teacher": self.teacher and teacher_to_json(self.teacher),
            "cycle": asdict(self.cycle),
            "predicted": self.predicted,
            "target": self.target,
        }
        return {**shown, **rest, "rewrites": rewrites}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Proposal:
        read = {
            "rewrites": tuple(map(Rewrite.from_json, fields["rewrites"])),
            "teacher": fields["teacher"] and teacher_from_json(fields["teacher"]),
            "cycle": Cycle(**fields["cycle"]),
        }
        return cls(**{**fields, **read})
