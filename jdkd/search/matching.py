"""Dynamic distillation: which teacher of the pool matches this student?"""

import random
from collections.abc import Sequence

from torch import nn

from jdkd.distill import correlations
from jdkd.pool import Subnet, TeacherPool
from jdkd.search.setting import Setting

NEIGHBOURS = 3  # unscored subnets that are looked at, around the present teacher


def match(
    student: nn.Module,
    student_map: float,
    feature_channels: Sequence[int],
    present: Subnet,
    pool: TeacherPool,
    setting: Setting,
    rng: random.Random,
) -> tuple[Subnet, str]:
    """The teacher that promises the student most, measured without training.

    A teacher promises what it is ahead of the student in mAP, times the mean r of their features. One that is far ahead
    but whose features have nothing to do with the student's (r of 0 or less, or undefined) promises nothing, nor does
    one that is no better than the student. Where none promises anything the present one stays, as nothing speaks for
    another; it also stays where another promises just as much. (Our choice; Joint-DetNAS searches for the matching
    teacher by training with it.)

    Args:
        student: the detector to be taught.
        student_map: its score on the selection split.
        feature_channels: pool FPN channel opposite each of the student's.
        present: its teacher so far.
        pool: the teachers; neighbours of the present one that had no score are scored and remembered.
        setting: data and device of the search.
        rng: the source of chance.

    Returns:
        The teacher, and what is done, in words.
    """
    known = {member.subnet for member in pool.members}
    fresh = [subnet for _ in range(NEIGHBOURS) if (subnet := pool.space.mutate(present, rng)) not in known]
    for done, subnet in enumerate(dict.fromkeys(fresh), start=1):
        pool.members.append(pool.score(subnet, setting.base, setting.selection.dataset))
        setting.progress("scoring teachers", done, len(fresh), {"mAP": pool.members[-1].map})
    promises = {}
    for member in sorted(pool.members, key=lambda member: member.subnet != present):  # of equals the first stays
        ahead = member.map - student_map
        if ahead > 0:
            probe = setting.probe()
            distances = correlations(student, pool.teacher(member.subnet), probe, channels=feature_channels).values()
            promises[member.subnet] = ahead * (1 - sum(distances) / len(distances))
    promises = {subnet: promise for subnet, promise in promises.items() if promise > 0}
    if not promises:
        return present, f"stay with {present}, no related teacher is ahead"
    best = max(promises, key=promises.get)
    return best, f"learn from {best}" if best != present else f"stay with {present}"
