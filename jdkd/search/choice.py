"""Which candidate is worth a child, which ones may be the student, and which one is."""

from collections.abc import Container, Sequence
from typing import Protocol, TypeVar

from jdkd.search.archive import Candidate

CUT_COST = 0.5  # mAP that a cut costs, as a power of the latency: 0.4 is the median of 30 cuts in ten searches
MISS_COST = 2.0  # the same for students that are still too slow in the end: nobody asked for them
NEAR = 1.15  # of a target: what is slower needs a larger cut than one that nobody chose among others


class Placed(Protocol):
    """What has an mAP and a latency over another's: a candidate, or a teacher of a pool."""

    @property
    def map(self) -> float: ...

    @property
    def latency_ratio(self) -> float: ...


P = TypeVar("P", bound=Placed)


def pareto_front(points: Sequence[P]) -> list[P]:
    """Those that no other beats in mAP without being slower; fastest first."""
    front: list[P] = []
    for point in sorted(points, key=lambda one: (one.latency_ratio, -one.map)):
        if not front or point.map > front[-1].map:
            front.append(point)
    return front


def best_within(points: Sequence[P], target: float) -> P | None:
    """The best of those that meet a target latency, of equals the fastest, then the last; None where none does."""
    fast = [one for one in reversed(points) if one.latency_ratio <= target]
    return max(fast, key=lambda one: (one.map, -one.latency_ratio), default=None)


def fitness(candidate: Candidate, target: float, cost: float = CUT_COST) -> float:
    """mAP, reduced where the latency misses the target (the form is MnasNet's, Tan et al., CVPR 2019).

    By default it is about what a cut down to the target would leave of the candidate.
    """
    return candidate.map * min(1.0, target / candidate.latency_ratio) ** cost


def contenders(candidates: Sequence[Candidate], target: float) -> list[Candidate]:
    """Who may be trained on for a target, one of an architecture, the fittest first.

    One that is a little too slow still can be cut, and is not behind a worse one that is fast enough; those that are
    slower by far come last.
    """

    def rank(one: Candidate) -> tuple[bool, float, float]:
        return one.latency_ratio > NEAR * target, -fitness(one, target), one.latency_ratio

    best: dict[str, Candidate] = {}
    for candidate in sorted(candidates, key=rank):
        best.setdefault(candidate.architecture_id, candidate)
    return list(best.values())


def annealed(candidates: Sequence[Candidate], target: float) -> list[Candidate]:
    """Those of the candidates that may meet a target and were trained to the end of a learning-rate cycle, or all.

    The best of many short trainings owes part of its score to the images that chose it, and is no student that has
    learnt what it can.
    """
    return [one for one in candidates if one.annealed and _may_meet(one, target)] or [*candidates]


def choose(candidates: Sequence[Candidate], target: float, least: float | None = None) -> Candidate:
    """The best of those that meet the target latency, by what timing can tell, or the fittest where none does.

    One whose interval holds the target counts as meeting it, for what it is over it: 0.0002 above a target of 0.53 are
    no reason to take a student that is 0.06 mAP worse. Of equals it is the faster or the better, and then the last,
    whose lineage was trained longer.

    Args:
        candidates: all that can be chosen.
        target: wanted latency over the base's.
        least: mAP that is enough: the fastest that reaches it is chosen, or the best that may meet the target where the
            fittest of those does not reach it.
    """
    near = [one for one in candidates if _may_meet(one, target)] or candidates
    best = max(reversed(near), key=lambda one: (fitness(one, target, MISS_COST), -one.latency_ratio))
    if least is None or best.map < least:
        return best
    return min((c for c in reversed(candidates) if c.map >= least), key=lambda c: (c.latency_ratio, -c.map))


def _may_meet(candidate: Candidate, target: float) -> bool:
    return min(candidate.latency_ratio, candidate.latency_interval[0]) <= target


def contender(
    candidates: Sequence[Candidate], target: float, timed: Container[str], least: float | None = None
) -> Candidate | None:
    """The next candidate that has to be timed at length before one can be chosen.

    From the best mAP down, that is whoever may meet the target by the interval of its ratio, until one that was
    timed at length does meet it; where none does, the fittest. Where an mAP is enough, it is the one that would be
    chosen.

    Args:
        candidates, target, least: as of :func:`choose`.
        timed: ids of the architectures that were timed at length.

    Returns:
        The candidate, or None where :func:`choose` may decide.
    """
    if least is None:
        for candidate in sorted(candidates, key=lambda c: (-c.map, c.latency_ratio)):
            if candidate.architecture_id in timed:
                if candidate.latency_ratio <= target:
                    return None
            elif _may_meet(candidate, target):
                return candidate
    chosen = choose(candidates, target, least)
    return None if chosen.architecture_id in timed else chosen
