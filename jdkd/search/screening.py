"""Screening: many students proposed, none trained, one chosen."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from jdkd.distill import correlations, pyramids
from jdkd.distill.correlation import PyramidSnapshot
from jdkd.errors import InputError
from jdkd.latency import deployable
from jdkd.morph import draw
from jdkd.search.setting import Setting

MOST_ACTIONS = 3  # actions that one proposal may combine, as SP-NAS draws them (Jiang et al., CVPR 2020)
SLOWNESS = 2.0  # what a latency above the aim costs, against the mean r that a proposal keeps
HEADROOM = 0.93  # of the target is aimed at: training changes what NMS has to do


@dataclass(frozen=True)
class Proposal:
    """A student that could be: its weights, and what is known of it before training.

    Args:
        action: what was done, in words.
        student: the child, with its inherited weights and recalibrated.
        kept: the parent's FPN channel opposite each of its own.
        similarity: mean r between its features and its parent's.
        latency_ratio: latency over the base's.
    """

    action: str
    student: nn.Module
    kept: tuple[int, ...]
    similarity: float
    latency_ratio: float = float("nan")

    def worth(self, target: float) -> float:
        """What training it promises: features kept, less what it is slower than a little under the target."""
        return self.similarity - SLOWNESS * max(0.0, self.latency_ratio / (HEADROOM * target) - 1)


def screen(parent: nn.Module, setting: Setting, rng: random.Random) -> Proposal:
    """Proposes students, rewrites each physically, measures it, and returns the most promising.

    Nothing is trained. What an action has damaged is read off the correlation of the child's features with
    its parent's; what it has saved is timed against the base, all in one interleaved measurement.

    Args:
        parent: the detector to change.
        setting: data, base and device of the search.
        rng: the source of chance.
    """
    count = setting.config.proposals
    seen = pyramids(parent, setting.probe())
    proposals = []
    for done in range(count):
        proposals.append(_propose(parent, seen, setting, rng))
        setting.progress("screening students", done + 1, count, {"r": proposals[-1].similarity})
    report = setting.timed({str(i): deployable(proposal.student) for i, proposal in enumerate(proposals)})
    timed = [replace(p, latency_ratio=setting.quiet_ratio(report, str(i))) for i, p in enumerate(proposals)]
    return max(timed, key=lambda proposal: proposal.worth(setting.config.target_latency))


def _propose(parent: nn.Module, seen: Sequence[PyramidSnapshot], setting: Setting, rng: random.Random) -> Proposal:
    base = setting.base.spec
    sizes = sorted({max(32, round(base.min_size * share / 32) * 32) for share in setting.config.resolutions})
    student, actions, kept = parent, [], tuple(range(parent.spec.fpn))
    for _ in range(rng.randint(1, MOST_ACTIONS)):
        try:
            morph = draw(student, rng, sizes, max_depth=max(base.depths) + 1)
        except InputError:
            if not actions:
                raise
            break
        student = morph.apply(student)
        kept = tuple(kept[channel] for channel in morph.channels.get("fpn", range(len(kept))))
        actions.append(morph.action)
    setting.calibrated(student)
    distances = correlations(student, seen, setting.probe(), channels=kept).values()
    return Proposal("; ".join(actions), student, kept, 1 - sum(distances) / len(distances))
