"""The state of an unfinished training on disk: written whole or not at all, read without running code."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from jdkd.errors import InputError
from jdkd.files import unwritable, write_whole

CHECKPOINT = "checkpoint.pt"
FIELDS = {
    "step": int,
    "seconds": float,
    "losses": dict,
    "model": dict,
    "optimizer": dict,
    "scaler": dict,
    "config": dict,
    "data": dict,
}  # and of what kind each is
LATER = {"auxiliary": dict, "average": dict, "identity": dict}  # which older ones do not have


def write(folder: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint into ``folder``, made where it is missing; if that fails, the one there is untouched.

    Raises:
        InputError: the disk is full, or the folder cannot be written.
    """
    buffer = io.BytesIO()  # torch.save hides the reason why a file could not be written
    torch.save(state, buffer)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder / CHECKPOINT, error) from error
    write_whole(folder / CHECKPOINT, buffer.getbuffer())


def read(folder: Path) -> dict[str, Any] | None:
    """The checkpoint in ``folder``, on the CPU; None if there is none.

    Raises:
        InputError: the file is damaged, or none of ours.
    """
    file = folder / CHECKPOINT
    return _read(file) if file.is_file() else None


def read_parent(place: Path) -> dict[str, Any]:
    """The checkpoint in a folder, or in a file, on the CPU.

    Raises:
        InputError: there is none, it is damaged, or none of ours.
    """
    file = place / CHECKPOINT if place.is_dir() else place
    if not file.is_file():
        raise InputError(
            f"inherit names {place}, where no checkpoint is; give the folder of a training, or the {CHECKPOINT} in it."
        )
    return _read(file)


def _read(file: Path) -> dict[str, Any]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error type of its own
        reason = str(error).partition("\n")[0].partition(". ")[0]
        what = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
        raise InputError(f"checkpoint {file} cannot be read ({what}); delete it to start again.") from error
    if not isinstance(state, dict) or not state.keys() >= FIELDS.keys():
        got = f"the fields {', '.join(map(str, list(state)[:5]))}" if isinstance(state, dict) else type(state).__name__
        raise InputError(
            f"checkpoint {file} is not one that a training left: it holds {got}, not {', '.join(sorted(FIELDS))}; move "
            "it away, or give another folder."
        )
    for name, kind in (FIELDS | LATER).items():
        if name in state and not isinstance(state[name], kind):
            raise InputError(
                f"checkpoint {file} is not one that a training left: its {name} is a {type(state[name]).__name__}, not "
                f"a {kind.__name__}; move it away, or give another folder."
            )
    return state


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
            f"cannot resume with other {what}: {'; '.join(differing)}; resume with the same {what}, or train into "
            "another folder."
        )


def data_identity(dataset: Any) -> dict[str, Any]:
    """What makes a dataset this one, wherever it lies: its classes, how many images, and its fingerprint."""
    return {"classes": list(dataset.classes), "images": len(dataset), "fingerprint": dataset.fingerprint}
