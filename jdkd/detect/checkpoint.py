"""A checkpoint is ``spec.json`` and ``weights.safetensors`` in a folder: data, never a pickled module."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import nn

from jdkd.detect.build import build
from jdkd.detect.contract import own_detector
from jdkd.detect.spec import DetectorSpec
from jdkd.errors import InputError
from jdkd.files import read_text, write_whole

SPEC, WEIGHTS = "spec.json", "weights.safetensors"


def save(folder: Path | str, model: nn.Module) -> None:
    """Writes the detector into ``folder`` (created if missing); each file appears whole or not at all.

    Raises:
        InputError: ``model`` was not built from a spec; nothing is written.
    """
    folder, model = Path(folder), own_detector(model, "save")
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_whole(folder / WEIGHTS, serialise(state))
    write_whole(folder / SPEC, model.spec.to_json() + "\n")


def load(folder: Path | str, device: torch.device | str = "cpu") -> nn.Module:
    """Rebuilds the detector that :func:`save` wrote, in evaluation mode.

    Raises:
        InputError: a file is missing or unreadable, or the weights do not fit the spec.
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
    wanted = model.state_dict()
    for name in sorted(wanted.keys() | state.keys()):
        ours, theirs = (list(s[name].shape) if name in s else "nothing" for s in (wanted, state))
        if ours != theirs:
            raise InputError(
                f"{folder / WEIGHTS} does not fit {SPEC}: {name} is {theirs} in the weights and {ours} in the spec; "
                "keep the two files of one detector together."
            )
    model.load_state_dict(state)
    return model.to(device).eval()
