"""Screening: many students proposed, none trained, few chosen."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from jdkd.detect.contract import architecture_of
from jdkd.detect.input_size import input_size, require_visible
from jdkd.distill import correlations, pyramids
from jdkd.distill.correlation import PyramidSnapshot
from jdkd.errors import InputError, ModelError
from jdkd.graph import Topology
from jdkd.latency.table import LatencyTable
from jdkd.morph import Morph, change_resolution, cut_to, draw, importances
from jdkd.notices import say_once
from jdkd.rewrite import Rewrite
from jdkd.search.archive import Candidate
from jdkd.search.config import MARGIN
from jdkd.search.context import SearchContext
from jdkd.search.inheriting import inherit
from jdkd.search.timing import pooled

ARCHITECTURE, CHANNELS = "architecture", "channels"  # what may be changed
MOST_BLOCKS = 2  # actions on blocks that one proposal may combine
LATENCY_PENALTY = 2.0  # what a latency above the aim costs, against the mean r that a proposal keeps
CLOSE = 0.03  # share by which a student may be slower than aimed at


@dataclass(frozen=True)
class Screened:
    """A student that could be.

    Args:
        action: what is done, in words.
        morphs: what is done, one after the other.
        student: the child, with its inherited weights, repaired and recalibrated.
        similarity: mean r between its features and its parent's.
        latency_ratio: latency over the base's, as it is predicted, or measured where it was.
    """

    action: str
    morphs: tuple[Morph, ...]
    student: nn.Module
    similarity: float = 1.0
    latency_ratio: float = math.nan

    @property
    def rewrites(self) -> tuple[Rewrite, ...]:
        return tuple(morph.rewrite for morph in self.morphs)

    @property
    def architecture_id(self) -> str:
        return architecture_of(self.student, "search").id


class Parent:
    """A detector that students are proposed of, and what is known of it once for all of them."""

    def __init__(self, candidate: Candidate, context: SearchContext) -> None:
        self.candidate, self.context = candidate, context
        self.model = context.detector(candidate)
        self.topology = context.read(self.model)
        self.seen: Sequence[PyramidSnapshot] = pyramids(self.model, context.probe())
        self.importance: dict[str, Tensor] = self.important(self.model, self.topology)

    def important(self, model: nn.Module, topology: Topology) -> dict[str, Tensor]:
        """What every channel of a descendant is worth, by the criterion asked for."""
        return importances(model, topology, self.context.config.method.criterion, self.context.probe())


def screen(
    parents: Sequence[Candidate],
    aim: float,
    count: int,
    ways: Sequence[str],
    table: LatencyTable,
    context: SearchContext,
    rng: random.Random,
) -> list[tuple[Candidate, Screened]]:
    """Proposes students at one latency, makes each, and returns the most promising.

    Nothing is trained. What a change has damaged is read off the correlation of the child's features with its
    parent's, each at its own input size; latencies are predicted, and those of the chosen measured.

    Args:
        parents: detectors to change, the best first; it gets half of the proposals or more.
        aim: wanted latency over the base's.
        count: students to return at most, of as many architectures.
        ways: what may be changed.
        table: what parts of the base cost.
        context: data, base and device of the search.
        rng: the source of chance.
    """
    opened, total = [Parent(candidate, context) for candidate in parents], context.config.proposals
    best, known, drawn = max(one.map for one in parents), set(), []
    for number in range(total):
        parent = opened[number % len(opened)] if number % 2 else opened[0]
        try:
            screened = _propose(parent, aim, ways, table, rng, plain=number == 0)
        except ModelError as error:  # too small for some of the images
            say_once(f"a student that was proposed is left out: {error}")
            continue
        context.progress("screening students", number + 1, total, {"r": screened.similarity})
        if screened.architecture_id not in known:
            known.add(screened.architecture_id)
            lead = parent.candidate.map / best if best else 1.0
            late = max(0.0, screened.latency_ratio / aim - 1)
            drawn.append((lead * screened.similarity - LATENCY_PENALTY * late, parent, screened))
    if not drawn:
        raise InputError(f"no student at {aim:.2f} of the base's latency can be made; ask for a larger target.")
    drawn.sort(key=lambda entry: (-entry[0], entry[2].latency_ratio))
    return [(parent.candidate, _measured(parent, one, aim, table)) for _, parent, one in drawn[:count]]


def trimmed(
    parent: Candidate, student: nn.Module, target: float, table: LatencyTable, context: SearchContext
) -> Screened:
    """A candidate as it is where it reaches a target, or with its channels cut once more."""
    as_it_is = Screened("train on", (), student, latency_ratio=parent.latency_ratio)
    if parent.latency_ratio <= target:
        return as_it_is
    try:
        opened = Parent(parent, context)
        return _measured(opened, _cut(opened, (), MARGIN * target, table), MARGIN * target, table)
    except InputError:  # nothing is left to cut
        return as_it_is


def _propose(
    parent: Parent, aim: float, ways: Sequence[str], table: LatencyTable, rng: random.Random, plain: bool
) -> Screened:
    """One student; a plain one differs by its channels alone."""
    morphs: tuple[Morph, ...] = ()
    if ARCHITECTURE in ways and not plain:
        morphs = _rearranged(parent, rng)
    if CHANNELS in ways:
        with contextlib.suppress(InputError):  # fast enough without a cut, or nothing is left to cut
            return _cut(parent, morphs, aim, table, rng)
    return _made(parent, morphs, table)


def _rearranged(parent: Parent, rng: random.Random) -> tuple[Morph, ...]:
    """Another input size, and some actions on blocks."""
    context, morphs, model, topology = parent.context, [], parent.model, parent.topology
    now = input_size(model)
    sizes = [size for size in context.resolutions if now is not None and size <= now[0]]
    if sizes and (size := rng.choice(sizes)) != now[0]:
        morphs.append(change_resolution(model, size))
    for _ in range(rng.randint(0, MOST_BLOCKS)):
        try:
            morph = draw(model, topology, rng, max_depth=context.most_blocks)
        except InputError:
            break
        morphs.append(morph)
        model = morph.apply(model, topology)
        topology = context.read(model)
    return tuple(morphs)


def _cut(
    parent: Parent, morphs: tuple[Morph, ...], aim: float, table: LatencyTable, rng: random.Random | None = None
) -> Screened:
    """The parent after some morphs, and a cut of its channels down to a latency.

    Raises:
        InputError: no cut reaches it, or none is needed.
    """
    model, topology = parent.model, parent.topology
    for morph in morphs:
        model = morph.apply(model, topology)
        topology = morph.rewrite.foreseen(topology, model) or parent.context.read(model)
    importance = parent.important(model, topology) if any(m.rewrite.blocks for m in morphs) else parent.importance
    return _made(parent, (*morphs, cut_to(model, topology, table, aim, importance, rng=rng)), table)


def _made(parent: Parent, morphs: tuple[Morph, ...], table: LatencyTable) -> Screened:
    context, rewrites = parent.context, tuple(morph.rewrite for morph in morphs)
    child = inherit(parent.model, parent.topology, rewrites, context)
    require_visible(child.model, context.image_sizes)
    distances = correlations(child.model, parent.seen, context.probe(), channels=child.kept).values()
    return Screened(
        "; ".join(morph.action for morph in morphs) or "no change",
        morphs,
        child.model,
        1 - sum(distances) / len(distances),
        table.predict(child.model),
    )


def _measured(parent: Parent, screened: Screened, aim: float, table: LatencyTable) -> Screened:
    """A student with its measured latency; one that was predicted wrongly is cut more, or less."""
    for last in (False, True):
        own = screened.architecture_id
        (ratio,) = [
            pooled([t]).ratio.value for name, t in parent.context.timed({own: screened.student}).items() if name == own
        ]
        screened = replace(screened, latency_ratio=ratio)
        cut = bool(screened.morphs) and bool(screened.morphs[-1].rewrite.keep)
        if last or not cut or -2 * CLOSE < ratio / aim - 1 < CLOSE:
            return screened
        with contextlib.suppress(InputError):
            screened = _cut(parent, screened.morphs[:-1], aim * aim / ratio, table)
    return screened
