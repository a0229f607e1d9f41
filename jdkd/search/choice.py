"""Which candidate is worth a child, which ones may be the student, and which one is."""

from collections.abc import Container, Sequence

from jdkd.search.archive import Candidate

LATENCY_EXPONENT = 2.0  # in a parent's fitness (the form is MnasNet's, Tan et al., CVPR 2019)


def pareto_front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other beats in mAP without being slower; fastest first."""
    front: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.latency_ratio, -c.map)):
        if not front or candidate.map > front[-1].map:
            front.append(candidate)
    return front


def fitness(candidate: Candidate, target: float) -> float:
    """mAP, reduced where the latency misses the target: what is too slow yet is worth little as a parent."""
    return candidate.map * min(1.0, target / candidate.latency_ratio) ** LATENCY_EXPONENT


def contenders(candidates: Sequence[Candidate], target: float) -> list[Candidate]:
    """Who may be trained on for a target, one of an architecture: who meets it from the best down, then the fittest."""

    def rank(candidate: Candidate) -> tuple[bool, float, float]:
        return candidate.latency_ratio > target, -fitness(candidate, target), candidate.latency_ratio

    best: dict[str, Candidate] = {}
    for candidate in sorted(candidates, key=rank):
        best.setdefault(candidate.architecture_id, candidate)
    return list(best.values())


def choose(candidates: Sequence[Candidate], target: float, least: float | None = None) -> Candidate:
    """The best of those that meet the target latency, or the fastest where none does.

    Of equals it is the faster or the better, and then the one whose lineage was trained longer.

    Args:
        candidates: all that can be chosen.
        target: wanted latency over the base's.
        least: mAP that is enough: the fastest that reaches it is chosen, or the best where none does.
    """
    fast = [candidate for candidate in candidates if candidate.latency_ratio <= target]
    if not fast:
        return min(candidates, key=lambda c: (c.latency_ratio, -c.map, -c.lineage_steps))
    good = [candidate for candidate in fast if least is not None and candidate.map >= least]
    if good:
        return min(good, key=lambda c: (c.latency_ratio, -c.map, -c.lineage_steps))
    return max(fast, key=lambda c: (c.map, -c.latency_ratio, c.lineage_steps))


def contender(
    candidates: Sequence[Candidate], target: float, timed: Container[str], least: float | None = None
) -> Candidate | None:
    """The next candidate that has to be timed at length before one can be chosen.

    From the best mAP down, that is whoever may meet the target by the interval of its ratio, until one that was
    timed at length does meet it; where none does, the fastest. Where an mAP is enough, it is the one that would be
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
            elif min(candidate.latency_ratio, candidate.latency_interval[0]) <= target:
                return candidate
    chosen = choose(candidates, target, least)
    return None if chosen.architecture_id in timed else chosen
