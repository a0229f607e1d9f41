"""The state of an unfinished training on disk: written whole or not at all, read without running code."""

import hashlib
import io
import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from jdkd.errors import InputError
from jdkd.files import write_whole

CHECKPOINT = "checkpoint.pt"


def write(folder: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint into ``folder``; if that fails, the one that was there is untouched.

    Raises:
        InputError: the disk is full, or the folder cannot be written.
    """
    buffer = io.BytesIO()  # torch.save hides the reason why a file could not be written
    torch.save(state, buffer)
    write_whole(folder / CHECKPOINT, buffer.getbuffer())


def read(folder: Path) -> dict[str, Any] | None:
    """The checkpoint in ``folder``, on the CPU; None if there is none.

    Raises:
        InputError: the file is damaged.
    """
    file = folder / CHECKPOINT
    if not file.is_file():
        return None
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"checkpoint {file} cannot be read ({reason}); delete it to start again.") from error


def require_same(what: str, before: dict[str, Any], now: dict[str, Any], ignore: Iterable[str] = ()) -> None:
    """Refuses to resume with other settings or data than the checkpoint was made with.

    Raises:
        InputError: names every field that differs, with both values.
    """
    names = sorted((before.keys() | now.keys()) - set(ignore))
    missing = "nothing"
    differing = [
        f"{name} was {before.get(name, missing)!r} and is {now.get(name, missing)!r}"
        for name in names
        if before.get(name, missing) != now.get(name, missing)
    ]
    if differing:
        raise InputError(
            f"cannot resume with another {what}: {'; '.join(differing)}; resume with the same {what}, or "
            "train into another folder."
        )


def data_identity(dataset: Any) -> dict[str, Any]:
    """What makes a dataset this one: its classes and a digest of its images' ids."""
    ids = json.dumps(list(dataset.image_ids)).encode()
    return {
        "classes": list(dataset.classes),
        "images": len(dataset),
        "image_ids": hashlib.sha256(ids).hexdigest()[:16],
    }
