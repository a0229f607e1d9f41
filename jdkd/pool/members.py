"""What teaches, by name: a subnet of the pool, or a detector of another make."""

from dataclasses import dataclass
from typing import Any

from jdkd.pool.space import Subnet

BASE = "base"
"""The name by which the base teaches in a search."""
Teacher = Subnet | str
"""A subnet of the pool, or the name of a member of another make."""


@dataclass(frozen=True)
class ScoredTeacher:
    """A teacher that was scored: COCO mAP on the images that select, and its parameters."""

    teacher: Teacher
    map: float
    parameters: int

    def to_json(self) -> dict[str, Any]:
        return {**teacher_to_json(self.teacher), "map": self.map, "parameters": self.parameters}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "ScoredTeacher":
        return cls(teacher_from_json(fields), fields["map"], fields["parameters"])


def teacher_to_json(teacher: Teacher) -> dict[str, Any]:
    """``{"subnet": {...}}`` or ``{"foreign": name}``."""
    return {"foreign": teacher} if isinstance(teacher, str) else {"subnet": teacher.to_json()}


def teacher_from_json(fields: dict[str, Any]) -> Teacher:
    """The teacher that :func:`teacher_to_json` wrote, whatever else stands beside it."""
    return fields["foreign"] if "foreign" in fields else Subnet.from_json(fields["subnet"])
