"""Dynamic distillation: who of all that could teach matches this student?"""

from __future__ import annotations

import random
from collections.abc import Sequence

from torch import nn

from jdkd.distill import explained, pyramids
from jdkd.distill.alignment import PyramidSnapshot
from jdkd.errors import InputError
from jdkd.notices import say_once
from jdkd.pool import Subnet, TeacherPool
from jdkd.pool.members import BASE, Teacher
from jdkd.search.archive import Candidate
from jdkd.search.context import SearchContext

NEIGHBOURS = 2  # unscored subnets that are looked at, around the present teacher, in every generation
ROOM = 2**31  # bytes of teachers' features that are kept, while students are trained too; further ones are made anew


class Matching:
    """Chooses the teacher of every student.

    A teacher's score is what it is ahead of the student in mAP, times the correlation of its features with their best
    prediction from the student's (:func:`jdkd.distill.explained`): one that knows more, and whose language the student
    can speak through the adapter. Who is not ahead has nothing to say; where nobody is ahead the student learns from
    the labels alone. (Our choice; Joint-DetNAS searches for the matching teacher by training with it.)

    Args:
        context: data, base and settings.
        pool: the teachers besides the base; None where there are none.
        base_map: of the base on the images that select.
    """

    def __init__(self, context: SearchContext, pool: TeacherPool | None, base_map: float) -> None:
        self.context, self.pool, self.base_map = context, pool, base_map
        self._seen: dict[Teacher, Sequence[PyramidSnapshot]] = {}  # what some make of the probe
        self._room = ROOM

    def of(self, student: nn.Module, parent: Candidate, rng: random.Random, *, anyone: bool = False) -> Teacher | None:
        """The teacher of a student that inherits from ``parent``, measured without training.

        With ``anyone``, for a student that is trained both with and without, it is the best of all where none is ahead.
        """
        teaching = self.context.config.method.teaching
        if teaching == "none":
            return None
        if teaching == "base" or self.pool is None:
            return BASE
        if teaching in ("fixed", "given"):
            known = [one for one in self.pool.members if teaching == "fixed" or one.teacher in self.pool.foreign]
            return max(known, key=lambda member: (member.map == member.map, member.map)).teacher
        if isinstance(parent.teacher, Subnet):
            self._look_around(parent.teacher, rng)
        everyone = {BASE: self.base_map} | {member.teacher: member.map for member in self.pool.members}
        ahead = {teacher: map - parent.map for teacher, map in everyone.items() if map > parent.map}
        if anyone and not ahead:
            scored = [teacher for teacher, map in everyone.items() if map == map]
            ahead = {max(scored, key=everyone.__getitem__): 1.0} if scored else {}
        ours = pyramids(student, self.context.probe()) if ahead else []
        scores = {teacher: lead * self._explained(teacher, ours) for teacher, lead in ahead.items()}
        promising = {teacher: score for teacher, score in scores.items() if score > 0}  # NaN is not
        return max(promising, key=promising.get, default=None)  # of equals the first, the base before all

    def _look_around(self, present: Subnet, rng: random.Random) -> None:
        """Scores subnets near the present teacher that have no score yet."""
        known = {member.teacher for member in self.pool.members}
        drawn = [subnet for _ in range(NEIGHBOURS) if (subnet := self.pool.space.mutate(present, rng)) not in known]
        near = dict.fromkeys(drawn)
        for done, subnet in enumerate(near, start=1):
            with self.context.spent.on("scoring"):
                detector = self.pool.teacher(subnet)
                self.pool.members.append(self.pool.scored(subnet, detector, self.context.selection.dataset))
            self._made(subnet, detector)
            self.context.progress("scoring teachers", done, len(near), {"mAP": self.pool.members[-1].map})

    def _explained(self, teacher: Teacher, ours: Sequence[PyramidSnapshot]) -> float:
        """How well a teacher's features follow from a student's; 0 where the two cannot be compared, which is said."""
        theirs = self._made(teacher)
        try:
            return explained(ours, theirs)
        except InputError as error:
            say_once(f"{teacher} does not teach this student: {error}", key=f"no teacher {teacher}")
            return 0.0

    def _made(self, teacher: Teacher, detector: nn.Module | None = None) -> Sequence[PyramidSnapshot]:
        """What a teacher makes of the probe; of large images at most a few are kept, as they fill a GPU."""
        if teacher in self._seen:
            return self._seen[teacher]
        if detector is None:
            detector = self.context.base if teacher == BASE else self.pool.teacher(teacher)
        seen = pyramids(detector, self.context.probe())
        if (left := self._room - _bytes(seen)) >= 0:
            self._seen[teacher], self._room = seen, left
        return seen


def _bytes(seen: Sequence[PyramidSnapshot]) -> int:
    return sum(level.nbytes for one in seen for level in one.pyramid.values())
