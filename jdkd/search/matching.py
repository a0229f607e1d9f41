"""Dynamic distillation: which teacher of the pool matches this student?"""

import random
from collections.abc import Sequence

from torch import nn

from jdkd.distill import correlations
from jdkd.pool import Subnet, TeacherPool
from jdkd.search.context import SearchContext

NEIGHBOURS = 3  # unscored subnets that are looked at, around the present teacher


def match(
    student: nn.Module,
    student_map: float,
    feature_channels: Sequence[Sequence[int]],
    present: Subnet,
    pool: TeacherPool,
    context: SearchContext,
    rng: random.Random,
) -> tuple[Subnet, str]:
    """The teacher that promises the student most, measured without training.

    A teacher's score is what it is ahead of the student in mAP, times the mean r of their features. One that is far
    ahead but whose features have nothing to do with the student's (r of 0 or less, or undefined) has none, nor has one
    that is no better than the student. Where none has any the present one stays, as nothing speaks for another; it also
    stays where another scores just as much. (Our choice; Joint-DetNAS searches for the matching teacher by training
    with it.)

    Args:
        student: the detector to be taught.
        student_map: its score on the images that select.
        feature_channels: for every level, the teachers' channel opposite each of the student's.
        present: its teacher so far.
        pool: the teachers; neighbours of the present one that had no score are scored and remembered.
        context: data and device of the search.
        rng: the source of chance.

    Returns:
        The teacher, and what is done, in words.
    """
    known = {member.teacher for member in pool.members}
    fresh = [subnet for _ in range(NEIGHBOURS) if (subnet := pool.space.mutate(present, rng)) not in known]
    for done, subnet in enumerate(dict.fromkeys(fresh), start=1):
        pool.members.append(pool.score(subnet, context.selection.dataset))
        context.progress("scoring teachers", done, len(fresh), {"mAP": pool.members[-1].map})
    scores = {}
    for member in sorted(pool.members, key=lambda member: member.teacher != present):  # of equals the first stays
        ahead = member.map - student_map
        if ahead > 0:
            probe = context.probe()
            distances = correlations(student, pool.teacher(member.teacher), probe, channels=feature_channels).values()
            scores[member.teacher] = ahead * (1 - sum(distances) / len(distances))
    scores = {subnet: score for subnet, score in scores.items() if score > 0}
    if not scores:
        return present, f"stay with {present}, no related teacher is ahead"
    best = max(scores, key=scores.get)
    return best, f"learn from {best}" if best != present else f"stay with {present}"
