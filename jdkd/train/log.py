"""The log of a training: JSON lines."""

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from jdkd.errors import InputError
from jdkd.files import unwritable, write_whole

BEGINS = b'{"step": '  # as every log does


class Log:
    """Appends JSON lines to ``file``; for a run that stands at ``step``, it keeps the lines up to there.

    Of a run that begins, the first line makes the file, and its folder: what is refused before it has left nothing.

    What is not finite, as the gradient of a step that a loss scale was too large for, is null: JSON has no infinity.

    Raises:
        InputError: the file cannot be written, or a run that begins would write over what is no log of a training.
    """

    def __init__(self, file: Path, step: int) -> None:
        self.file = file
        try:
            made = [folder for folder in file.parents if not folder.exists()]
            file.parent.mkdir(parents=True, exist_ok=True)
            if not step and file.is_file() and not _begins_as_one(file):
                raise InputError(f"{file} is not the log of a training and would be lost; give another folder.")
            lines = file.read_bytes().splitlines() if step and file.exists() else []
            if not file.exists():
                file.touch()  # now, if it cannot be written
                file.unlink()
                with suppress(OSError):  # somebody else has written there meanwhile
                    for folder in made:
                        folder.rmdir()
                return
        except OSError as error:
            raise unwritable(file, error) from error
        write_whole(file, "".join(_line(row) for row in map(row_of, lines) if _step(row) <= step))

    def add(self, row: dict[str, Any]) -> None:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as stream:
                stream.write(_line(row))
        except OSError as error:
            raise unwritable(self.file, error) from error


def _line(row: dict[str, Any]) -> str:
    return json.dumps(_finite(row), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """The same, with None in the place of numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _begins_as_one(file: Path) -> bool:
    """Whether a file may be a log, of which a full disk may have left the first bytes, or none."""
    with file.open("rb") as stream:
        return BEGINS.startswith(stream.read(len(BEGINS)))


def row_of(line: bytes) -> dict[str, Any]:
    """What a line says; nothing of one that a crash cut short, or that is none of ours."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, dict) else {}


def _step(row: dict[str, Any]) -> float:
    """The step of a row; one without counts as the future."""
    step = row.get("step")
    return step if isinstance(step, int | float) and not isinstance(step, bool) else float("inf")
