"""What the folder of a detector says of how it was trained."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from jdkd.errors import InputError
from jdkd.run_folder import RunFolder


def trained_on(detector: Path) -> str | None:
    """Fingerprint of the images that a detector was trained on, where its training or its search recorded it.

    Args:
        detector: its folder; a student's lies in that of its search, which has the record.
    """
    for folder in (detector, detector.resolve().parent):
        with suppress(InputError, KeyError, TypeError):  # no record, or one of something else
            return _identity(folder)["data"]["train"]
    return None


def trained_at(detector: Path) -> tuple[int, ...]:
    """The short sides in pixels that the images were resized to where a detector was trained at several.

    Args:
        detector: its folder.

    Returns:
        Nothing where it was trained at its own input size, or no training recorded it.
    """
    with suppress(InputError, KeyError, TypeError):
        return tuple(_identity(detector)["training"]["sizes"] or ())
    return ()


def _identity(folder: Path) -> dict[str, Any]:
    return RunFolder(folder).read()["identity"]
