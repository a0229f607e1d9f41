"""A checkpoint is a folder of data, never a pickled module.

It holds ``weights.safetensors`` and what they are the weights of: ``spec.json`` of a detector of our own, or
``architecture.json`` of one that another builder made.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor, nn

from jdkd.detect.build import build
from jdkd.detect.contract import own_detector
from jdkd.detect.spec import DetectorSpec
from jdkd.errors import InputError
from jdkd.files import claim_folder, read_text, write_whole
from jdkd.nn.unwrapping import unwrapped
from jdkd.rewrite import Architecture, describe, load_architecture, save_architecture
from jdkd.rewrite.checkpoint import ARCHITECTURE, WEIGHTS

SPEC = "spec.json"


def save(folder: Path | str, model: nn.Module) -> None:
    """Writes the detector into ``folder`` (created if missing); each file appears whole or not at all.

    Args:
        folder: where to.
        model: built from a spec, or opened by :func:`jdkd.detect.open_model` and rewritten since or not.

    Raises:
        InputError: ``model`` is neither or does not fit what it was built from any more, or ``folder`` cannot be
            written; nothing is written.
    """
    folder, inner = Path(folder), unwrapped(model)
    known = getattr(inner, "architecture", None)
    if isinstance(known, Architecture) and not hasattr(inner, "spec"):
        save_architecture(folder, inner, describe(inner, known.builder, known.arguments, classes=known.classes))
        (folder / SPEC).unlink(missing_ok=True)
        return
    model = own_detector(model, "save")
    with torch.device("meta"):
        wanted = build(model.spec).state_dict()
    remedy = "give the detector as it was built, without what was replaced or added"
    _require_fit(model.state_dict(), wanted, "the detector to save", remedy)
    claim_folder(folder, "the folder of the detector")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_whole(folder / WEIGHTS, serialise(state))
    write_whole(folder / SPEC, model.spec.to_json() + "\n")
    (folder / ARCHITECTURE).unlink(missing_ok=True)


def load(folder: Path | str, device: torch.device | str = "cpu") -> nn.Module:
    """Rebuilds the detector that :func:`save` wrote, in evaluation mode.

    One of another builder carries its ``architecture`` as ours carry their ``spec``; opening it calls that builder,
    see :func:`jdkd.rewrite.load_architecture`.

    Raises:
        InputError: a file is missing or unreadable, the weights do not fit or are not finite, or the builder cannot be
            called.
    """
    folder = Path(folder)
    if (folder / ARCHITECTURE).is_file():
        if (folder / SPEC).is_file():
            raise InputError(f"{folder} has both {SPEC} and {ARCHITECTURE}; remove the one that is not its detector's.")
        return load_architecture(folder, device)
    for name in (SPEC, WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(
                f"{folder} is no detector: it has no {name}; give a folder written by `jdkd train` or `jdkd import`."
            )
    text = read_text(folder / SPEC, "give a folder written by `jdkd train`")
    model = build(DetectorSpec.from_json(text, source=str(folder / SPEC)))
    try:
        state = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise InputError(f"{folder / WEIGHTS} cannot be read ({error}); copy or train it again.") from None
    _require_fit(state, model.state_dict(), str(folder / WEIGHTS), "keep the two files of one detector together")
    for name, tensor in state.items():
        if count := tensor.numel() - int(tensor.isfinite().sum()):
            raise InputError(
                f"{folder / WEIGHTS}: {name} holds {count} of {tensor.numel()} numbers that are not finite, so the "
                "detector would find nothing; train it again."
            )
    model.load_state_dict(state)
    return model.to(device).eval()


def _require_fit(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str, remedy: str) -> None:
    """Refuses a state dict that is not by name and shape that of a spec's detector."""
    for name in sorted(wanted.keys() | state.keys()):
        ours, theirs = (list(s[name].shape) if name in s else "nothing" for s in (wanted, state))
        if ours != theirs:
            raise InputError(f"{what} does not fit {SPEC}: {name} is {theirs} in it and {ours} in the spec; {remedy}.")
