"""What a search came to, in sentences."""

from __future__ import annotations

from typing import Any

from jdkd.report.outcome import Outcome, Student, signed, students_of
from jdkd.search.choice import best_within


def verdict(result: dict[str, Any]) -> str:
    """Whether what was asked for was met, one sentence a student; empty where the result has none."""
    students = students_of(result)
    return " ".join(_latency(student, result, _name(students)) for student in students)


def summary(outcome: Outcome) -> list[str]:
    """The same with the scores: two sentences a student, or how far a search has come.

    Args:
        outcome: of a search, finished or under way.
    """
    result, students = outcome.result, outcome.students
    told = [f"{_latency(one, result, _name(students))} {_score(one, result)}" for one in students]
    return told or [_so_far(outcome)]


def _name(students: list[Student]) -> str:
    return "The student" if len(students) == 1 else "A student"


def _latency(student: Student, result: dict[str, Any], name: str) -> str:
    ratio, target, least = student.entry["latency_ratio"], student.target, result.get("target_map")
    taken = f"{name} takes {_told(ratio, target)} of the base's time"
    if student.met:
        return f"{taken}; {target} was asked for."
    if ratio <= target:
        return f"{taken}, but nothing within {target} has the mAP of {least} on the images that select."
    return f"{taken} and misses the {target} that was asked for; it is the best found for that target."


def _score(student: Student, result: dict[str, Any]) -> str:
    """Its mAP beside the base's and the control's."""
    own, others = student.entry["map"], {"the base": "base", "the base trained as long as it (the control)": "control"}
    scores = {name: (result.get(key) or {}).get("map") for name, key in others.items()}
    beside = [f"{signed(own - score)} against {name}" for name, score in scores.items() if score is not None]
    return f"Its mAP is {own:.3f}{', ' if beside else ''}{' and '.join(beside)}."


def _so_far(outcome: Outcome) -> str:
    """How far a search has come that has no result yet."""
    tried, failed = len(outcome.candidates) - 1, len(outcome.candidates) - len(outcome.scored)
    generations = outcome.candidates[-1].generation
    made = f"{tried} candidate{'s' * (tried != 1)} in {generations} generation{'s' * (generations != 1)}"
    lost = f", {failed} of them failed" if failed else ""
    reached = [(target, best_within(outcome.scored[1:], target)) for target in outcome.targets]
    fast = [f"{best.map:.3f} at most within {target:g} of the base's time" for target, best in reached if best]
    found = f"; mAP {', '.join(fast)}" if fast else ""
    return f"This search is not finished: {made}{lost}{found} (on the images that select)."


def images_of(result: dict[str, Any], role: str) -> str:
    """Which images selected or reported, as a phrase; empty where the result does not say.

    Args:
        result: contents of `result.json`.
        role: `selection` or `report`.
    """
    part = result.get(role)
    if not isinstance(part, dict):
        return ""
    return (
        f"{part['images']:,} images with {part['boxes']:,} boxes of {part['annotations']} in {part['image_folder']} "
        f"({part['which']})"
    )


def _told(ratio: float, target: float) -> str:
    """A ratio in so many digits that it is seen on which side of the target it is."""
    digits = next(n for n in range(3, 20) if (float(f"{ratio:.{n}f}") <= target) == (ratio <= target))
    return f"{ratio:.{digits}f}"
