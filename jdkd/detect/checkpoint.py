"""A checkpoint is ``spec.json`` and ``weights.safetensors`` in a folder: data, never a pickled module."""

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

SPEC, WEIGHTS = "spec.json", "weights.safetensors"


def save(folder: Path | str, model: nn.Module) -> None:
    """Writes the detector into ``folder`` (created if missing); each file appears whole or not at all.

    Raises:
        InputError: ``model`` was not built from a spec or does not fit it any more, or ``folder`` cannot be written;
            nothing is written.
    """
    folder, model = Path(folder), own_detector(model, "save")
    with torch.device("meta"):
        wanted = build(model.spec).state_dict()
    remedy = "give the detector as it was built, without what was replaced or added"
    _require_fit(model.state_dict(), wanted, "the detector to save", remedy)
    claim_folder(folder, "the folder of the detector")
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_whole(folder / WEIGHTS, serialise(state))
    write_whole(folder / SPEC, model.spec.to_json() + "\n")


def load(folder: Path | str, device: torch.device | str = "cpu") -> nn.Module:
    """Rebuilds the detector that :func:`save` wrote, in evaluation mode.

    Raises:
        InputError: a file is missing or unreadable, or the weights do not fit the spec or are not finite.
    """
    folder = Path(folder)
    for name in (SPEC, WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"{folder} is no detector: it has no {name}; give a folder written by `jdkd train`.")
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
