"""Screening: many students proposed, none trained, one chosen."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from jdkd.detect.contract import architecture_of
from jdkd.detect.input_size import input_size, require_visible
from jdkd.distill import correlations, pyramids
from jdkd.distill.correlation import PyramidSnapshot
from jdkd.errors import InputError, ModelError
from jdkd.graph import Topology
from jdkd.morph import draw
from jdkd.notices import say_once
from jdkd.search.context import SearchContext
from jdkd.search.timing import pooled

MOST_ACTIONS = 3  # actions that one proposal may combine, as SP-NAS draws them (Jiang et al., CVPR 2020)
LATENCY_PENALTY = 2.0  # what a latency above the aim costs, against the mean r that a proposal keeps
TARGET_MARGIN = 0.93  # of the target is aimed at: training changes what NMS has to do


@dataclass(frozen=True)
class Proposal:
    """A student that could be: its weights, and what is known of it before training.

    Args:
        action: what was done, in words.
        student: the child, with its inherited weights and recalibrated.
        kept: for every level of its pyramid, the parent's channel opposite each of its own.
        similarity: mean r between its features and its parent's.
        latency_ratio: latency over the base's.
    """

    action: str
    student: nn.Module
    kept: tuple[tuple[int, ...], ...]
    similarity: float
    latency_ratio: float = float("nan")

    @property
    def architecture_id(self) -> str:
        return architecture_of(self.student, "search").id

    def score(self, target: float) -> float:
        """What training it promises: features kept, less what it is slower than a little under the target."""
        score = self.similarity - LATENCY_PENALTY * max(0.0, self.latency_ratio / (TARGET_MARGIN * target) - 1)
        return score if score == score else -math.inf  # features that are not numbers keep nothing


def screen(parent: nn.Module, known: Mapping[str, float], context: SearchContext, rng: random.Random) -> Proposal:
    """Proposes students, rewrites each physically, measures it, and returns the most promising.

    Nothing is trained. What an action has damaged is read off the correlation of the child's features with
    its parent's; what it has saved is timed against the base, all in one interleaved measurement. An architecture that
    the search knows is not timed again. These times only rank proposals: detections, and with them the cost of NMS,
    change in training, so they are not pooled with those of candidates.

    Args:
        parent: the detector to change.
        known: latency ratios of the architectures that the search has timed, by id.
        context: data, base and device of the search.
        rng: the source of chance.
    """
    count = context.config.proposals
    seen, topology = pyramids(parent, context.probe()), context.read(parent)
    proposals = []
    for done in range(1, count + 1):
        try:
            proposals.append(_propose(parent, topology, seen, context, rng))
        except ModelError as error:  # too small for some of the images
            if done == count and not proposals:
                raise
            say_once(f"a student that was proposed is left out: {error}")
        else:
            context.progress("screening students", done, count, {"r": proposals[-1].similarity})
    unknown = {p.architecture_id: p.student for p in proposals if p.architecture_id not in known}
    timings = context.timed(unknown) if unknown else {}
    ratios = {name: pooled([timing]).ratio.value for name, timing in timings.items()} | dict(known)
    timed = [replace(proposal, latency_ratio=ratios[proposal.architecture_id]) for proposal in proposals]
    return max(timed, key=lambda proposal: proposal.score(context.config.target_latency))


def _propose(
    parent: nn.Module, topology: Topology, seen: Sequence[PyramidSnapshot], context: SearchContext, rng: random.Random
) -> Proposal:
    most = max((len(blocks.blocks) for blocks in context.topology.block_lists), default=0) + 1
    student, actions, kept = parent, [], [tuple(range(len(level))) for level in topology.followed]
    for _ in range(rng.randint(1, MOST_ACTIONS)):
        try:
            morph = draw(student, topology, rng, _resolutions(context), max_depth=most)
        except InputError:
            if not actions:
                raise
            break
        left = [morph.rewrite.surviving(level) for level in topology.followed]
        kept = [tuple(level[channel] for channel in own) for level, own in zip(kept, left, strict=True)]
        student = morph.apply(student, topology)
        topology = morph.rewrite.foreseen(topology, student) or context.read(student)
        actions.append(morph.action)
    require_visible(student, context.image_sizes)
    context.calibrated(student)
    distances = correlations(student, seen, context.probe(), channels=kept).values()
    return Proposal("; ".join(actions), student, tuple(kept), 1 - sum(distances) / len(distances))


def _resolutions(context: SearchContext) -> list[int]:
    """Short sides that a student may choose from, in pixels; none where the base's input size is not its own."""
    base = input_size(context.base)
    shares = context.config.resolutions if base else ()
    return sorted({max(32, round(base[0] * share / 32) * 32) for share in shares})
