"""Screening: many students proposed, none trained, few chosen."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from jdkd.detect.architecture import architecture_of
from jdkd.detect.input_size import input_size, require_visible
from jdkd.distill import correlations, pyramids
from jdkd.distill.alignment import PyramidSnapshot
from jdkd.errors import InputError, ModelError
from jdkd.graph import Topology
from jdkd.latency.table import LatencyTable, regions_of
from jdkd.latency.versions import fewer_regions
from jdkd.morph import Morph, can_shorten, change_regions, channel_importance, cut_to, grow, shorten
from jdkd.morph.importance import LEARNT
from jdkd.morph.origins import names_before
from jdkd.notices import say_once
from jdkd.rewrite import Rewrite
from jdkd.search.archive import Candidate
from jdkd.search.budget import MARGIN, SAFE
from jdkd.search.context import SearchContext
from jdkd.search.inheriting import inherit
from jdkd.search.timing import BRIEF, LONG, pooled

STRUCTURE, CHANNELS = "structure", "channels"  # what may be changed
TEMPERATURE = 0.3  # of a cut that is to be another than the plain one, see jdkd.morph.cut_to
DEEPER = 0.25  # chance that blocks come or move, and the channels pay for it; else blocks may go
MOST_SHORTER = 2  # lists that lose a block in one proposal
LATENCY_PENALTY = 2.0  # what a latency above the aim costs, against the mean r that a proposal keeps
FLOOR = 0.5  # of its channels that each group keeps in one cut, where that reaches the aim
LOSS = 0.002  # mAP that fewer regions may cost the base; our choice
CLOSE = -0.03, 1 / MARGIN - 1  # shares by which a student may be faster and slower than aimed at


@dataclass(frozen=True)
class Screened:
    """A student that could be.

    Args:
        action: what is done to its parent, in words.
        rewrites: the same as data, one after the other.
        student: the child, with everything that it inherits.
        similarity: mean r between its features and its parent's.
        predicted: its latency over the base's, by the table.
        latency_ratio: the same as it was measured, NaN before.
    """

    action: str
    rewrites: tuple[Rewrite, ...]
    student: nn.Module
    similarity: float
    predicted: float
    latency_ratio: float = math.nan

    @property
    def architecture_id(self) -> str:
        return architecture_of(self.student, "search").id


@dataclass(frozen=True)
class Recipe:
    """How a student comes to be, but for its latency: equal recipes give equal students at one.

    Args:
        grown: what is added, or moved, before the cut; None for nothing.
        shorter: lists of blocks that lose one.
        min_size: short side of the input, where it changes.
        regions: how many are proposed, where that changes.
        channels: whether channels are cut until the latency is reached.
        temperature, seed: of the cut.
    """

    grown: Morph | None = None
    shorter: tuple[str, ...] = ()
    min_size: int | None = None
    regions: int | None = None
    channels: bool = True
    temperature: float = 0.0
    seed: int = 0


class Parent:
    """A candidate that students are made of, and what is known of it once for all of them."""

    def __init__(self, candidate: Candidate, table: LatencyTable, context: SearchContext) -> None:
        self.candidate, self.table, self.context = candidate, table, context
        self.model = context.detector(candidate)
        self._grown: dict[str, tuple[nn.Module, Topology, dict[str, Tensor]]] = {}  # by what was added or moved

    @cached_property
    def topology(self) -> Topology:
        """What is coupled to what in it."""
        return self.context.read(self.model)

    @cached_property
    def seen(self) -> Sequence[PyramidSnapshot]:
        """What it makes of the probe."""
        return pyramids(self.model, self.context.probe())

    @cached_property
    def importance(self) -> dict[str, Tensor]:
        """Of its channels."""
        context, criterion = self.context, self.context.config.method.criterion
        how = {"batches": context.weighing, "relative": context.relative} if criterion in LEARNT else {}
        return channel_importance(self.model, self.topology, criterion, **how)

    @cached_property
    def regions(self) -> int | None:
        """The fewest regions that the base can propose and find as much; None where it, or a descendant, keeps its own.

        What a detector finds in fewer regions is seen without training, and what nobody misses pays for channels.
        """
        context, found = self.context, None
        counts = fewer_regions(self.model) if self.candidate.kind == "base" else ()
        for done, count in enumerate(counts, start=1):
            child = change_regions(self.model, count).apply(self.model, self.topology)
            with context.spent.on("scoring"):
                map = context.scored(child, context.selection).map
            enough = map >= self.candidate.map - LOSS
            tried = done if enough else len(counts)
            context.progress("scoring the base with fewer regions", tried, len(counts), {"mAP": map})
            if not enough:
                break
            found = count
        return found

    def plain(self, ways: Sequence[str]) -> Recipe:
        """The recipe that leaves nothing to chance."""
        return Recipe(regions=self.regions if STRUCTURE in ways else None, channels=CHANNELS in ways)

    def draw(self, ways: Sequence[str], rng: random.Random) -> Recipe:
        """A recipe by chance."""
        context, topology, now = self.context, self.topology, input_size(self.model)
        recipe = replace(self.plain(ways), temperature=TEMPERATURE, seed=rng.getrandbits(32))
        if STRUCTURE not in ways:
            return recipe
        sizes = [size for size in context.resolutions if now is not None and size <= now[0]]
        if sizes and (size := rng.choice(sizes)) != now[0]:
            recipe = replace(recipe, min_size=size)
        if rng.random() < DEEPER:
            with contextlib.suppress(InputError):  # no list of blocks can grow
                return replace(recipe, grown=grow(self.model, topology, rng, max_depth=context.most_blocks))
        short = can_shorten(self.model, topology)
        return replace(recipe, shorter=tuple(rng.sample(short, rng.randint(0, min(MOST_SHORTER, len(short))))))

    def make(self, recipe: Recipe, aim: float) -> Screened:
        """The student of a recipe at a predicted latency.

        Raises:
            InputError: no cut reaches it.
            ModelError: the student does not see some of the images.
        """
        context, model, topology, importance = self.context, self.model, self.topology, self.importance
        if recipe.grown:
            model, topology, importance = self._with(recipe.grown)
        around = {"shorter": recipe.shorter, "min_size": recipe.min_size, "regions": recipe.regions}
        if recipe.channels:
            how = {"temperature": recipe.temperature, "rng": random.Random(recipe.seed)}
            last = self._cut(model, topology, aim, importance, **around, **how)
        else:
            last = shorten(model, topology, **around)
        morphs = [morph for morph in (recipe.grown, last) if morph and morph.rewrite != Rewrite()]
        rewrites = tuple(morph.rewrite for morph in morphs)
        child = inherit(model, topology, rewrites and (last.rewrite,), context)
        require_visible(child.model, context.image_sizes)
        distances = correlations(child.model, self.seen, context.probe(), channels=child.kept).values()
        action = "; ".join(morph.action for morph in morphs) or "change nothing"
        kept = 1 - sum(distances) / len(distances)
        return Screened(action, rewrites, child.model, kept, self.table.predict(child.model))

    def _cut(self, model: nn.Module, topology: Topology, aim: float, *given: Any, **how: Any) -> Morph:
        """A cut that leaves no group the bottleneck of the rest, as long as the aim is reached without one.

        Raises:
            InputError: it is not reached.
        """
        with contextlib.suppress(InputError):
            return cut_to(model, topology, self.table, aim, *given, **how, floor=FLOOR)
        return cut_to(model, topology, self.table, aim, *given, **how)

    def measured(self, recipe: Recipe, screened: Screened, aim: float) -> Screened:
        """A student with its measured latency, made once more where that is not what was predicted.

        Of the two it is the one that is nearer to the aim; one that is too slow comes last.
        """
        timed = self._timed(screened, aim)
        if not recipe.channels or _is_close(timed, aim):
            return timed
        with contextlib.suppress(InputError):  # it cannot be cut more
            again = self._timed(self.make(recipe, screened.predicted * aim / timed.latency_ratio), aim)
            return min(timed, again, key=lambda one: _miss(one.latency_ratio / aim))
        return timed

    def _timed(self, screened: Screened, aim: float) -> Screened:
        """A student with its measured latency; a brief timing that contradicts the table is taken again, at length.

        Else a student is cut, or spared, for what disturbed the clock: of three students of ours two ended at 0.43 and
        0.44 of the latency where 0.525 was aimed at.
        """
        timed = replace(screened, latency_ratio=self._ratio(screened, BRIEF))
        if _is_close(timed, aim):
            return timed
        return replace(screened, latency_ratio=self._ratio(screened, LONG))

    def _ratio(self, screened: Screened, stage: str) -> float:
        own = screened.architecture_id
        timing = self.context.timed({own: screened.student}, stage, kept=self.table.kept)[own]
        return self.table.with_nms(pooled([timing]).value, regions_of(screened.student))

    def _with(self, grown: Morph) -> tuple[nn.Module, Topology, dict[str, Tensor]]:
        """It with more blocks, or with some moved, what is coupled to what in that, and how much its parts matter.

        What is new does not matter to any loss: it stays in the cut that pays for it. What was there matters as it did:
        on two FCOS, importance that was read anew where a block had left chose no better cuts.
        """
        rewrite, known = grown.rewrite, repr(grown.rewrite)
        if known not in self._grown:
            model = grown.apply(self.model, self.topology)
            topology = self.context.read(model)
            before = names_before(self.model, self.topology, rewrite, topology)
            matters = {name: self.importance[was] for name, was in before.items() if was in self.importance}
            self._grown[known] = model, topology, matters
        return self._grown[known]


def _is_close(timed: Screened, aim: float) -> bool:
    return CLOSE[0] < timed.latency_ratio / aim - 1 < CLOSE[1]


def _miss(ratio: float) -> tuple[bool, float]:
    """How far a latency over the one aimed at is off, to be sorted by."""
    return ratio > 1 + CLOSE[1], abs(math.log(ratio))


def screen(
    parents: Sequence[Parent], aim: float, count: int, ways: Sequence[str], rng: random.Random
) -> list[tuple[Candidate, Screened]]:
    """Proposes students at one latency, makes each, and returns the most promising.

    Nothing is trained. What a change has damaged is read off the correlation of the child's features with its
    parent's, each at its own input size; latencies are predicted, and those of the chosen measured. Of children of the
    base the best of every input size come first: smaller images correlate less with larger ones, whatever they are
    worth in the end. Which size is worth its latency is known from the first generation on.

    Args:
        parents: detectors to change, the best first; it gets half of the proposals or more.
        aim: wanted latency over the base's.
        count: students to return at most, each of another architecture.
        ways: what may be changed.
        rng: the source of chance.

    Raises:
        InputError: none can be made at this latency.
    """
    context, made, why = parents[0].context, {}, None
    total, best = context.config.proposals, max(parent.candidate.map for parent in parents)
    for number in range(total):
        parent = parents[number // 2 % len(parents)] if number % 2 else parents[0]
        recipe = parent.draw(ways, rng) if number else parent.plain(ways)
        try:
            screened = parent.make(recipe, aim)
        except (InputError, ModelError) as error:  # too slow all the same, or too small for some of the images
            why = error
            context.progress("screening students", number + 1, total, {})
            continue
        context.progress("screening students", number + 1, total, {"r": screened.similarity})
        lead = parent.candidate.map / best if best else 1.0
        score = lead * screened.similarity - LATENCY_PENALTY * max(0.0, screened.predicted / aim - 1)
        made.setdefault(screened.architecture_id, (score if score == score else -math.inf, parent, recipe, screened))
    if not made:
        raise InputError(f"no student at {aim:.2f} of the base's latency can be made: {str(why).partition(';')[0]}.")
    ranked = sorted(made.values(), key=lambda entry: (-entry[0], entry[3].predicted))
    sound = [(number, screened) for number, (score, *_, screened) in enumerate(ranked) if score > -math.inf]
    from_base = parents[0].candidate.kind == "base"
    firsts = {input_size(screened.student): number for number, screened in reversed(sound)} if from_base else {}
    varied = sorted(range(len(ranked)), key=lambda number: (number not in firsts.values(), number))
    chosen = [ranked[number] for number in varied[:count]]
    return [(parent.candidate, parent.measured(recipe, screened, aim)) for _, parent, recipe, screened in chosen]


def trimmed(parent: Parent, target: float) -> Screened:
    """A candidate as it is where it reaches a target safely, or with its channels cut once more.

    What is left to cut is a few per cent of a latency that was measured at length, and is taken from the table: to time
    an untrained student, without NMS, says less of so little. The base's own ratio is 1 without being measured, so it
    needs no room to be mistaken in.
    """
    candidate = parent.candidate
    room = 1.0 if candidate.architecture_id == parent.context.base_id else SAFE
    if candidate.latency_ratio <= room * target:
        return unchanged(parent)
    aim = MARGIN * target * parent.table.predict(parent.model) / candidate.latency_ratio
    try:
        return parent.make(Recipe(), aim)
    except InputError as error:
        say_once(f"candidate {candidate.number} stays at {candidate.latency_ratio:.2f} of the base's latency: {error}")
        return unchanged(parent)


def unchanged(parent: Parent) -> Screened:
    """A candidate as it is, to be trained on."""
    ratio = parent.candidate.latency_ratio
    return Screened("train on", (), parent.model, 1.0, ratio, ratio)
