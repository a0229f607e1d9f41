"""A module as a folder of data: ``architecture.json`` and ``weights.safetensors``, never a pickled module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor, nn

from jdkd.errors import InputError
from jdkd.files import claim_folder, read_text, write_whole
from jdkd.nn.unwrapping import unwrapped
from jdkd.rewrite.architecture import Architecture, set_architecture
from jdkd.rewrite.building import build, exchange
from jdkd.rewrite.channels import tensors_by_name

ARCHITECTURE, WEIGHTS = "architecture.json", "weights.safetensors"
ORIGIN = "give a folder written by `jdkd train` or `jdkd import`"


def save_architecture(folder: Path | str, model: nn.Module, architecture: Architecture) -> None:
    """Writes a model into ``folder`` (created if missing); each file appears whole or not at all.

    Tensors that are tied are written once, by their first name. A buffer that is not persistent is written where the
    builder makes another.

    Args:
        folder: where to.
        model: what the architecture describes, wrapped or not.
        architecture: of :func:`jdkd.rewrite.describe`.

    Raises:
        InputError: the architecture builds other tensors than the model has, or the model has state that is no tensor;
            or ``folder`` cannot be written to; nothing is written.
    """
    folder, model = Path(folder), unwrapped(model)
    fresh = build(architecture, "meta")
    ours, theirs = tensors_by_name(model), tensors_by_name(fresh)
    _require_same(ours, theirs, "the model", "the architecture", "describe the model again")
    if strange := [name for name, value in model.state_dict().items() if not isinstance(value, Tensor)]:
        raise InputError(f"the model's state {strange[0]} is no tensor, and a checkpoint holds tensors alone.")
    optional = _not_persistent(model)
    state = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)  # safetensors refuses shared memory
        for name, tensor in ours.items()
        if name not in optional or not _equal(tensor, theirs[name])
    }
    claim_folder(folder, "the folder of the model")
    write_whole(folder / WEIGHTS, serialise(state))
    write_whole(folder / ARCHITECTURE, architecture.to_json() + "\n")


def load_architecture(folder: Path | str, device: torch.device | str = "cpu") -> nn.Module:
    """Rebuilds the model that :func:`save_architecture` wrote, in evaluation mode.

    This imports and calls the builder that ``architecture.json`` names, so look at that line in folders of strangers.

    Args:
        folder: what was written.
        device: where the model goes.

    Returns:
        The model; its ``architecture`` attribute is what it was built from.

    Raises:
        InputError: a file is missing or unreadable, the builder cannot be called, or the weights do not fit or are not
            finite.
    """
    folder = Path(folder)
    for name in (ARCHITECTURE, WEIGHTS):
        if not (folder / name).is_file():
            found = sorted(folder.glob(f"*/{ARCHITECTURE}")) if folder.is_dir() else []
            there = f" (there is one in {', '.join(str(file.parent) for file in found[:3])})" if found else ""
            raise InputError(f"{folder} is no detector: it has no {name}{there}; {ORIGIN}.")
    text = read_text(folder / ARCHITECTURE, ORIGIN)
    architecture = Architecture.from_json(text, source=str(folder / ARCHITECTURE))
    try:
        model = build(architecture, "meta")
    except InputError as error:
        raise InputError(f"{folder / ARCHITECTURE}: {error}") from error
    return _with_weights(model, folder, architecture).to(device).eval()


def _with_weights(model: nn.Module, folder: Path, architecture: Architecture) -> nn.Module:
    """Gives a model the weights that lie in a folder, and the architecture that it was built from; returns it.

    Raises:
        InputError: the file is unreadable, or its weights do not fit or are not finite.
    """
    try:
        state = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise InputError(f"{folder / WEIGHTS} cannot be read ({error}); copy or write it again.") from None
    wanted, optional = tensors_by_name(model), _not_persistent(model)
    required = {name: t for name, t in wanted.items() if name in state or name not in optional}
    remedy = "keep the two files of one model together"
    _require_same(state, required, f"{folder / WEIGHTS}", ARCHITECTURE, remedy)
    for name, tensor in state.items():
        if count := tensor.numel() - int(tensor.isfinite().sum()):
            raise InputError(
                f"{folder / WEIGHTS}: {name} holds {count} of {tensor.numel()} numbers that are not finite; write it "
                "again from weights that are."
            )
    with torch.no_grad():
        for name, values in state.items():
            old, values = wanted[name], values.clone()  # aligned, as kernels sum in another order where it is not
            new = nn.Parameter(values, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else values
            exchange(model, old, new)
    set_architecture(model, architecture)
    return model


def _require_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], who: str, whose: str, remedy: str) -> None:
    for name in sorted(ours.keys() | theirs.keys()):
        one, other = (list(each[name].shape) if name in each else "nothing" for each in (ours, theirs))
        if one != other:
            raise InputError(
                f"{who} does not fit {whose}: {name} is {one} in the first and {other} in the second; {remedy}."
            )


def _not_persistent(model: nn.Module) -> set[str]:
    """Names of the buffers that a state dict leaves out."""
    return {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.detach().cpu(), other.detach().cpu())
