"""What a search tries next: evolution over a Pareto archive, generation by generation."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import nn

from jdkd.errors import InputError
from jdkd.latency.table import Features, LatencyTable
from jdkd.notices import say_once
from jdkd.pool.members import Teacher
from jdkd.rewrite.channels import duplicate
from jdkd.search.archive import Archive, Candidate
from jdkd.search.budget import Plan, Rung
from jdkd.search.choice import contenders, fitness, pareto_front
from jdkd.search.context import SearchContext
from jdkd.search.matching import Matching
from jdkd.search.proposal import Cycle, Proposal
from jdkd.search.screening import CHANNELS, STRUCTURE, Parent, Screened, screen, trimmed, unchanged
from jdkd.search.timing import LONG

Made = tuple[Candidate, str, Screened, Teacher | None, float | None]  # parent, kind, what is changed, teacher, target
PARENTS = 2  # members of the last generation's front that have children
NO_CUT = 0.98  # of the parents' latency: where not even that can be reached, nothing can be cut


class Strategy:
    """Decides a whole generation at a time, from the archive alone.

    So any number of workers, in whatever order they finish, gives the same search. Two processes are joined, as in
    Joint-DetNAS (Yao et al., CVPR 2021): the student's architecture changes and it inherits weights, and the teacher is
    chosen anew for what the student has become. First the generations go down to the wanted latencies, with short
    trainings for several students each; then the fittest of each target are trained on, and one of them alone.

    Args:
        context: data, base and settings.
        plan: the generations.
        matching: who teaches whom.
        table: what the base's parts cost.
    """

    def __init__(self, context: SearchContext, plan: Plan, matching: Matching, table: LatencyTable) -> None:
        self.context, self.plan, self.matching, self.table = context, plan, matching, table
        self._features: dict[str, Features] = {}  # of the architectures that were measured

    def ask(self, archive: Archive) -> list[Proposal]:
        """The next generation; none where the search is at its end.

        Args:
            archive: everything that has been tried, the last generation as a whole.
        """
        generation = 1 + max(candidate.generation for candidate in archive.candidates)
        if generation > len(self.plan.rungs):
            return []
        rung = self.plan.rungs[generation - 1]
        rng = random.Random(f"{self.context.config.seed}/{generation}")
        torch.manual_seed(rng.getrandbits(63))  # fresh weights of what is added
        made = self._explored(rung, archive, rng) if rung.explores else self._trained_on(rung, archive, rng)
        first = len(archive)
        self.context.children = self._children(made, first)
        for _, _, screened, *_ in made:
            self._features[screened.architecture_id] = self.table.features(screened.student)
        to_come = sum(later.steps for later in self.plan.rungs[generation - 1 :])  # all end with their cycle
        return [
            Proposal(
                number=first + place,
                generation=generation,
                parent=parent.id,
                kind=kind,
                action=screened.action,
                rewrites=screened.rewrites,
                predicted=screened.predicted,
                teacher=teacher,
                cycle=self._cycle(rung, parent, to_come),
                target=target,
            )
            for place, (parent, kind, screened, teacher, target) in enumerate(made)
        ]

    def _children(self, made: Sequence[Made], first: int) -> dict[int, nn.Module]:
        """The students that are to be trained in this process, by their numbers; one that is trained twice is copied.

        Those without a rewrite are their parents, which lie on disk.
        """
        config, seen, children = self.context.config, set[int](), dict[int, nn.Module]()
        if config.workers > 1 or config.ray is not None:
            return children
        for number, (_, _, screened, *_) in enumerate(made, start=first):
            if screened.rewrites:
                again = id(screened.student) in seen
                children[number] = duplicate(screened.student) if again else screened.student
                seen.add(id(screened.student))
        return children

    def _cycle(self, rung: Rung, parent: Candidate, to_come: int) -> Cycle:
        """The learning rate of a candidate's steps: high while students compete, a cycle for each that goes on alone.

        Such warm restarts are SGDR's (Loshchilov & Hutter, ICLR 2017).
        """
        lr = self.context.config.lr
        if rung.alone:
            return Cycle(rung.steps, 0, rung.steps, lr)
        return Cycle(rung.steps, parent.lineage_steps, parent.lineage_steps + to_come, lr)

    def _explored(self, rung: Rung, archive: Archive, rng: random.Random) -> list[Made]:
        """Students at the rung's latency, of the best of the generation before."""
        (aim,) = rung.aims
        best = sorted(pareto_front(_latest(archive)), key=lambda one: -fitness(one, aim))[:PARENTS]
        table = self._table(archive)
        parents = [Parent(candidate, table, self.context) for candidate in best]
        screened = self._screened(parents, aim, rung.candidates, self._ways(archive), rng)
        taught = self.context.config.method.order == "joint"  # in a pipeline distillation comes last
        teachers = [self.matching.of(one.student, parent, rng) if taught else None for parent, one in screened]
        return [
            (parent, _kind(parent, one, who), one, who, None)
            for (parent, one), who in zip(screened, teachers, strict=True)
        ]

    def _screened(
        self, parents: list[Parent], aim: float, count: int, ways: tuple[str, ...], rng: random.Random
    ) -> list[tuple[Candidate, Screened]]:
        """Students at the aim; where none can be made, nearer to what the parents are by now, or these as they are.

        Raises:
            InputError: not even the base can be cut.
        """
        now, wanted = min(parent.candidate.latency_ratio for parent in parents), aim
        while True:
            try:
                found = screen(parents, aim, count, ways, rng)
            except InputError as error:
                aim = math.sqrt(aim * now)
                if aim <= NO_CUT * now:
                    continue
                if parents[0].candidate.kind == "base":
                    raise InputError(
                        f"{error} What is left of the latency is none of the channels, blocks and images that can be "
                        "cut, so no student gets faster than the base: search into another folder, from a base or "
                        "at an input size where convolutions take the time."
                    ) from None
                say_once(f"no student gets faster than {now:.2f} of the base's latency: the parents are trained on.")
                return [(parent.candidate, unchanged(parent)) for parent in parents[:count]]
            if aim > wanted:
                say_once(
                    f"no student can be made at {wanted:.2f} of the base's latency; this generation has {aim:.2f}."
                )
            return found

    def _trained_on(self, rung: Rung, archive: Archive, rng: random.Random) -> list[Made]:
        """For every target, the fittest, trained on; one that is still too slow is cut once more.

        Whether a teacher is worth its time is found by training with it and without, as Joint-DetNAS finds teachers: on
        photographs of ours it was worth 0.02 mAP, on drawn ones it cost 0.015. The better ends as it was trained. So
        the best of all is tried even where none seems ahead: a student that was chosen for its score seems better than
        it is.
        """
        made, table, parents = [], self._table(archive), dict[tuple[int, float], Parent]()
        tried = rung.alone and not rung.trial and self.context.config.method.teaching == "dynamic"
        for target in rung.aims:
            for parent in self._finalists(archive, target, 1 if rung.alone else rung.candidates):
                own = parent.number, parent.latency_ratio
                if own not in parents:  # targets may share a finalist
                    parents[own] = Parent(parent, table, self.context)
                cut = trimmed(parents[own], target)
                teacher = parent.teacher if tried else self.matching.of(cut.student, parent, rng, anyone=rung.trial)
                for who in dict.fromkeys((teacher, None) if rung.trial else (teacher,)):
                    made.append((parent, _kind(parent, cut, who), cut, who, target))
        return made

    def _finalists(self, archive: Archive, target: float, count: int) -> list[Candidate]:
        """Who is trained on for a target, each timed at length before: what is too slow is cut while it can learn."""
        context = self.context
        while True:
            best = contenders(self._running(archive, target), target)[:count]
            brief = [one for one in best if not archive.was_timed(one.architecture_id, LONG, context.machine)]
            if not brief:
                return best
            own = brief[0].architecture_id
            archive.add_timing(context.timed({own: context.detector(brief[0])}, LONG)[own])

    def _table(self, archive: Archive) -> LatencyTable:
        """The table, corrected by every architecture that was measured."""
        measured = []
        for candidate in archive.scored[1:]:
            own = candidate.architecture_id
            if own not in self._features:
                self._features[own] = self.table.features(self.context.detector(candidate))
            measured.append((self._features[own], candidate.latency_ratio))
        return self.table.corrected(measured)

    def _running(self, archive: Archive, target: float) -> list[Candidate]:
        """Who may be trained on for a target: the last of its own that did not fail, all that explored, or the base."""
        base, *others = archive.scored
        own = [one for one in others if one.target == target]
        last = max((one.generation for one in own), default=0)  # others may have more, where all of its own failed
        return [one for one in own if one.generation == last] or [one for one in others if one.target is None] or [base]

    def _ways(self, archive: Archive) -> tuple[str, ...]:
        """What a generation may change: all at once, or, in a pipeline, first the architecture and then channels."""
        if self.context.config.method.order == "joint":
            return STRUCTURE, CHANNELS
        done = max(one.generation for one in archive.candidates)
        return (CHANNELS,) if done + 1 == self.plan.exploring else (STRUCTURE,)


def _kind(parent: Candidate, screened: Screened, teacher: Teacher | None) -> str:
    """What is new about a candidate, see :class:`jdkd.search.proposal.Proposal`."""
    if screened.rewrites:
        return "morph"
    return "train" if teacher == parent.teacher else "teacher"


def _latest(archive: Archive) -> list[Candidate]:
    """The scored candidates of the last generation that has some."""
    last = max(one.generation for one in archive.scored)
    return [one for one in archive.scored if one.generation == last]
