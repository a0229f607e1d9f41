"""The log of a training: JSON lines."""

import json
from pathlib import Path
from typing import Any

from jdkd.errors import InputError
from jdkd.files import unwritable, write_whole

BEGINS = b'{"step": '  # as every log does


class Log:
    """Appends JSON lines to ``file``; for a run that stands at ``step``, it keeps the lines up to there.

    Raises:
        InputError: the file cannot be written, or a run that begins would write over what is no log of a training.
    """

    def __init__(self, file: Path, step: int) -> None:
        self.file = file
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            if not step and file.is_file() and not _begins_as_one(file):
                raise InputError(f"{file} is not the log of a training and would be lost; give another folder.")
            lines = file.read_bytes().splitlines(keepends=True) if step and file.exists() else []
        except OSError as error:
            raise unwritable(file, error) from error
        write_whole(file, b"".join(line for line in lines if _step(line) <= step))

    def add(self, row: dict[str, Any]) -> None:
        try:
            with self.file.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
        except OSError as error:
            raise unwritable(self.file, error) from error


def _begins_as_one(file: Path) -> bool:
    """Whether a file may be a log, of which a full disk may have left the first bytes, or none."""
    with file.open("rb") as stream:
        return BEGINS.startswith(stream.read(len(BEGINS)))


def _step(line: bytes) -> float:
    """The step of a log line; one that a crash cut short, or that is none of ours, counts as the future."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return float("inf")
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int | float) and not isinstance(step, bool) else float("inf")
