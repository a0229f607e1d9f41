"""See :func:`taught_section`."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from torch import nn

from jdkd.data import CocoDetectionDataset
from jdkd.detect import load
from jdkd.distill.responses import responses
from jdkd.errors import InputError
from jdkd.pool import load_pool
from jdkd.pool.members import BASE, Teacher
from jdkd.report.outcome import Outcome, Student
from jdkd.report.predictions import examples
from jdkd.report.responses import responses_section
from jdkd.search.config import POOL

CHANNELS = 8  # of each level that are drawn


def taught_section(outcome: Outcome) -> str:
    """What the channels of the fastest student and of its last teacher respond to, on the images that are shown.

    Args:
        outcome: of a finished search whose data and teachers still lie where they lay.

    Returns:
        HTML; empty where nobody taught a student or the result names no images, and a sentence where it cannot be
        shown.
    """
    part = outcome.result.get("report")
    names = part.get("examples") if isinstance(part, dict) else None
    taught = [one for one in outcome.students if _last_teacher(one, outcome) is not None]
    if not names or not taught:
        return ""
    student = min(taught, key=lambda one: one.target)
    teacher = _last_teacher(student, outcome)
    try:
        dataset = examples(part, names)
        images = [image for image, _ in dataset]
        shown = [image.float() / 255 for image in images]
        levels = responses(load(student.folder), _teacher(teacher, outcome, dataset), shown)
    except InputError as error:
        return f'<p class="faint">Not shown: {escape(str(error))}</p>'
    titles = student.title, f"its last teacher ({teacher})"
    return responses_section(levels, images[0], len(images), CHANNELS, titles)


def _last_teacher(student: Student, outcome: Outcome) -> Teacher | None:
    """Who taught a student, or the youngest of its ancestors that anybody taught."""
    if student.candidate not in outcome.by_id:
        return None
    line = outcome.line(outcome.by_id[student.candidate])
    return next((one.teacher for one in reversed(line) if one.teacher is not None), None)


def _teacher(teacher: Teacher, outcome: Outcome, dataset: CocoDetectionDataset) -> nn.Module:
    """The detector of a name. Norms of a subnet are measured anew, on the images that are shown.

    Raises:
        InputError: it is not there any more.
    """
    where: Mapping[str, Any] = outcome.run.get("where") or {}
    if teacher == BASE:
        return load(Path(where.get("base", "")))
    folders = where.get("teachers") or {}
    if isinstance(teacher, str) and teacher in folders:
        return load(Path(folders[teacher]))
    grown = outcome.folder / POOL  # which moves with the search, whatever its record says
    given = Path(where.get("pool") or grown)
    return load_pool(grown if grown.is_dir() else given, None, dataset).teacher(teacher)
