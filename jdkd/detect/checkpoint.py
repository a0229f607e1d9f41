"""A checkpoint is ``spec.json`` and ``weights.safetensors`` in a folder: data, never a pickled module."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor, nn

from jdkd.detect.build import build
from jdkd.detect.spec import DetectorSpec
from jdkd.errors import InputError
from jdkd.files import read_text, write_whole

SPEC, WEIGHTS = "spec.json", "weights.safetensors"


def save(folder: Path | str, model: nn.Module) -> None:
    """Writes the detector into ``folder`` (created if missing); each file appears whole or not at all."""
    folder = Path(folder)
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


@dataclass(frozen=True)
class LoadReport:
    """What of a foreign state dict found a place: names, by what became of them."""

    matched: tuple[str, ...]
    missing: tuple[str, ...]  # tensors of the detector that the file did not have
    unexpected: tuple[str, ...]  # tensors of the file that the detector has no place for
    misshapen: tuple[str, ...]  # present in both with different shapes, left as they were

    def __str__(self) -> str:
        lines = [f"{len(self.matched)} tensors loaded"]
        for what in ("missing", "unexpected", "misshapen"):
            if names := getattr(self, what):
                more = ", ..." if len(names) > 5 else ""
                lines.append(f"{len(names)} {what}: {', '.join(names[:5])}{more}")
        return "\n".join(lines)


def load_weights(model: nn.Module, file: Path | str) -> LoadReport:
    """Loads a torchvision backbone or detector state dict (``.pth``, ``.pt`` or ``.safetensors``).

    Names of a bare ResNet are looked for in the backbone's body, and the names that torchvision's FPN and
    RPN had before 0.13 are understood. What does not fit keeps its fresh weights and is reported.

    Raises:
        InputError: the file is missing, unreadable, or nothing in it fits.
    """
    state = _read_state(Path(file))
    wanted = model.state_dict()
    placed = {_place(name, wanted): tensor for name, tensor in state.items()}
    fits = {name: t for name, t in placed.items() if name in wanted and t.shape == wanted[name].shape}
    if not any(tensor.dim() > 1 for tensor in fits.values()):
        ours, theirs = next(iter(wanted.items())), next(iter(state.items()), ("nothing", torch.empty(0)))
        raise InputError(
            f"nothing in {file} fits the detector: it begins with {theirs[0]} {list(theirs[1].shape)}, the detector "
            f"with {ours[0]} {list(ours[1].shape)}; give a state dict of the same architecture and width."
        )
    model.load_state_dict(fits, strict=False)
    ignored = {name for name in wanted if name.endswith("num_batches_tracked")}
    return LoadReport(
        matched=tuple(fits),
        missing=tuple(name for name in wanted if name not in placed and name not in ignored),
        unexpected=tuple(name for name in placed if name not in wanted),
        misshapen=tuple(name for name in placed if name in wanted and name not in fits),
    )


def _read_state(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise InputError(f"weights {file} does not exist; give a .safetensors or .pth state dict.")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error type of its own
        raise InputError(f"weights {file} cannot be read ({error}); give a .safetensors or .pth state dict.") from None
    state = state.get("model", state) if isinstance(state, dict) else {}
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _place(name: str, wanted: dict[str, Tensor]) -> str:
    """Where a foreign tensor belongs: under its own name, one level down, or under the body."""
    head, _, leaf = name.rpartition(".")
    for candidate in (name, f"{head}.0.{leaf}", f"{head}.0.0.{leaf}", f"backbone.body.{name}"):
        if candidate in wanted:
            return candidate
    return name
