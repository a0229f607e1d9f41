"""What a search came to, in sentences."""

from __future__ import annotations

from typing import Any

from jdkd.report.outcome import CONTROLS, Outcome, Student, generation_of, signed, students_of


def verdict(result: dict[str, Any]) -> str:
    """Whether the asked latencies were met, one sentence each; empty where the result does not say."""
    students = students_of(result)
    name = "The student" if len(students) == 1 else "A student"
    return " ".join(sentence for student in students if (sentence := _latency(student, name)))


def summary(outcome: Outcome) -> list[str]:
    """The same with the scores: a sentence or two per student, or how far a search has come.

    Args:
        outcome: of a search, finished or under way.
    """
    students = [student for student in outcome.students if student.entry.get("map") is not None]
    if not students:
        return [_so_far(outcome)]
    name = "The student" if len(students) == 1 else "A student"
    return [" ".join(filter(None, (_latency(one, name), _score(one, outcome.result)))) for one in students]


def _latency(student: Student, name: str) -> str:
    ratio, target = student.entry.get("latency_ratio"), student.target
    if target is None or ratio is None:
        return ""
    taken = f"{name} takes {_told(ratio, target)} of the base's time"
    if student.met:
        return f"{taken}; {target} was asked for."
    return f"{taken} and misses the {target} that was asked for; it is the fastest found."


def _score(student: Student, result: dict[str, Any]) -> str:
    """Its mAP beside the base's and the control's."""
    own = student.entry["map"]
    others = {"the base": result.get("base"), "the base trained as long as it (the control)": None}
    control = next((result[name] for name in CONTROLS if isinstance(result.get(name), dict)), None)
    others["the base trained as long as it (the control)"] = control
    known = {name: entry["map"] for name, entry in others.items() if entry and entry.get("map") is not None}
    beside = " and ".join(f"{signed(own - score)} against {name}" for name, score in known.items())
    return f"Its mAP is {own:.3f}{', ' if beside else ''}{beside}."


def _so_far(outcome: Outcome) -> str:
    """How far a search has come that has no result yet."""
    tried, failed = len(outcome.candidates) - 1, len(outcome.candidates) - len(outcome.scored)
    made = f"{tried} candidate{'s' * (tried != 1)} in {max(map(generation_of, outcome.candidates))} generations"
    lost = f", {failed} of them failed" if failed else ""
    fast = [f"{best.map:.3f} at most within {target:g} of the base's time" for target, best in best_so_far(outcome)]
    found = f"; mAP {', '.join(fast)}" if fast else ""
    return f"This search is not finished: {made}{lost}{found} (on the images that select)."


def best_so_far(outcome: Outcome) -> list[tuple[float, Any]]:
    """For every target that some candidate meets, the best such, the slowest target first."""
    found = []
    for target in outcome.targets:
        fast = [one for one in outcome.scored[1:] if one.latency_ratio <= target]
        if fast:
            found.append((target, max(fast, key=lambda one: (one.map, -one.latency_ratio))))
    return found


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
