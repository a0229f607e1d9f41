"""Dynamic distillation: which teacher of the pool matches this student?"""

import random
from collections.abc import Sequence

from torch import nn

from jdkd.distill import correlations
from jdkd.pool import Member, Subnet, TeacherPool
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
) -> Subnet:
    """The teacher that promises the student most, measured without training.

    A teacher promises what it is ahead of the student in mAP, times the mean r of their features: one that is
    far ahead but speaks of something else has nothing to say, nor has one that is the student's equal. (Our
    choice; Joint-DetNAS searches for the matching teacher by training with it.)

    Args:
        student: the detector to be taught.
        student_map: its score on the selection split.
        feature_channels: pool FPN channel opposite each of the student's.
        present: its teacher so far.
        pool: the teachers; neighbours of the present one that had no score are scored and remembered.
        setting: data and device of the search.
        rng: the source of chance.
    """
    known = {member.subnet for member in pool.members}
    fresh = [subnet for _ in range(NEIGHBOURS) if (subnet := pool.space.mutate(present, rng)) not in known]
    for done, subnet in enumerate(dict.fromkeys(fresh), start=1):
        pool.members.append(pool.score(subnet, setting.base, setting.selection))
        setting.progress("scoring teachers", done, len(fresh), {"mAP": pool.members[-1].map})

    def promise(member: Member) -> float:
        distances = correlations(
            student, pool.teacher(member.subnet), setting.probe(), channels=feature_channels
        ).values()
        return (member.map - student_map) * (1 - sum(distances) / len(distances))

    return max(pool.members, key=promise).subnet
