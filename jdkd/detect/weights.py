"""See :func:`load_weights`."""

import argparse
import hashlib
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from jdkd.detect.architecture import identity
from jdkd.errors import InputError
from jdkd.nn.unwrapping import unwrapped

HOLDERS = ("state_dict", "model_state_dict", "model", "ema", "module")  # keys of a state dict, first choice first
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # parts that wrappers add
OUTERMOST = {"model"}  # parts that a training module adds in front
ADOPTED = "model"  # where :func:`jdkd.detect.adopt` puts a detector
BODY = "backbone.body"
SEQUENCES = ("features.", "trunk_output.")  # where torchvision's classifiers have their layers
COUNTER = "num_batches_tracked"  # a batch norm's, of no use to anyone


@dataclass(frozen=True)
class LoadReport:
    """What of a foreign state dict found a place: names, by what became of them.

    Attributes:
        matched: tensors that were loaded.
        missing: tensors of the detector that the file did not have.
        unexpected: tensors of the file that the detector has no place for.
        misshapen: name -> (shape in the file, shape in the detector) of those left as they were.
        key: where in the file the state dict was, e.g. ``"model"``; empty if it was the whole of it.
        others: keys of the file that hold state dicts too and were not read.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: Mapping[str, tuple[list[int], list[int]]]
    key: str = ""
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        source = f" of {self.key!r}" if self.key else ""
        unread = f" (the file has {', '.join(map(repr, self.others))} too)" if self.others else ""
        lines = [f"{len(self.matched)} tensors loaded{source}{unread}"]
        shapes = [f"{name} ({theirs} in the file, {ours} here)" for name, (theirs, ours) in self.misshapen.items()]
        for what, left in (("missing", self.missing), ("unexpected", self.unexpected), ("misshapen", shapes)):
            if left:
                more = ", ..." if len(left) > 5 else ""
                lines.append(f"{len(left)} {what}: {', '.join(left[:5])}{more}")
        return "\n".join(lines)


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of a model's weights and buffers with their names, 64 hexadecimal digits; wherever they lie."""
    digest = hashlib.sha256()
    for name, tensor in unwrapped(model).state_dict().items():
        digest.update(f"{name} {tensor.dtype} {[*tensor.shape]}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def fingerprint(model: nn.Module) -> dict[str, str | None]:
    """What a run that is resumed is of: the architecture of a detector, and its :func:`weights_hash`."""
    return {"architecture": identity(model), "weights": weights_hash(model)}


def load_weights(model: nn.Module, file: Path | str) -> LoadReport:
    """Loads what fits of a state dict that anyone saved: ``.safetensors``, or ``.pth`` and the like of ``torch.save``.

    The state dict may be the whole file or lie in a training checkpoint under ``state_dict``, ``model_state_dict``,
    ``model`` or ``ema`` (the first of them that is there; several deep, too), and wrappers may have put ``module.`` or
    ``_orig_mod.`` into its names. Names of a bare backbone are looked for in the backbone's body, and the names that
    torchvision's FPN and RPN had before 0.13 are understood. What does not fit keeps its fresh weights and is
    reported: the predictor of a COCO detector in one for other classes, say.

    Args:
        model: any detector.
        file: the weights; nothing pickled in it is run.

    Returns:
        What was loaded and what was not, by name; printed, it is a few lines.

    Raises:
        InputError: the file is missing, unreadable, holds pickled objects or no state dict, nothing in it fits, two
            of its tensors belong in one place, or one that fits is not finite.
    """
    file, model = Path(file), unwrapped(model)
    state = _State(_read(file), file)
    wanted = model.state_dict()
    places = _Places(wanted)
    placed: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for name, tensor in state.tensors.items():
        place = places(name)
        if place in placed:
            raise InputError(f"weights {file} have two tensors for {place}: {origin[place]} and {name}; keep one.")
        placed[place], origin[place] = tensor, name
    fits = {name: t for name, t in placed.items() if name in wanted and t.shape == wanted[name].shape}
    _require_values(fits, wanted, origin, file)
    if not any(tensor.dim() > 1 for tensor in fits.values()):
        ours, theirs = next(iter(wanted.items())), next(iter(state.tensors.items()))
        raise InputError(
            f"nothing in {file} fits the detector: it begins with {theirs[0]} {list(theirs[1].shape)}, the detector "
            f"with {ours[0]} {list(ours[1].shape)}; give a state dict of the same architecture and width."
        )
    model.load_state_dict(fits, strict=False)
    return LoadReport(
        matched=tuple(fits),
        missing=tuple(name for name in wanted if name not in placed and not name.endswith(COUNTER)),
        unexpected=tuple(name for name in placed if name not in wanted and not name.endswith(COUNTER)),
        misshapen={
            name: (list(tensor.shape), list(wanted[name].shape))
            for name, tensor in placed.items()
            if name in wanted and name not in fits
        },
        key=state.key,
        others=state.others,
    )


def placed_names(model: nn.Module, file: Path | str) -> set[str]:
    """Names that the tensors of a file have in a model, for :func:`load_weights`."""
    place = _Places(unwrapped(model).state_dict())
    return {place(name) for name in _State(_read(Path(file)), Path(file)).tensors}


def _require_values(
    fits: Mapping[str, Tensor], wanted: Mapping[str, Tensor], origin: Mapping[str, str], file: Path
) -> None:
    """Refuses what is not finite, and other kinds of numbers than the detector's, which a copy would misread."""
    for place, tensor in fits.items():
        if not wanted[place].is_floating_point():
            continue
        if (kind := _kind(tensor)) != "real numbers":
            raise InputError(
                f"weights {file}: {origin[place]} holds {kind} ({tensor.dtype}), where the detector has "
                f"{wanted[place].dtype}; save it as plain float tensors (dequantised, dense) first."
            )
        if count := tensor.numel() - int(tensor.float().isfinite().sum()):  # float8 knows no isfinite
            raise InputError(
                f"weights {file}: {origin[place]} holds {count} of {tensor.numel()} numbers that are not finite; the "
                "training that wrote it diverged, so give an earlier checkpoint."
            )


def _kind(tensor: Tensor) -> str:
    if tensor.is_meta:
        return "no values, only a shape"
    if tensor.is_quantized:
        return "quantised values"
    if tensor.layout != torch.strided:
        return "a sparse matrix"
    return "real numbers" if tensor.is_floating_point() else "values that are no real numbers"


def _read(file: Path) -> Any:
    """Whatever the file holds, without running anything of it."""
    remedy = "give a .safetensors or .pth state dict"
    if file.is_dir():
        inside = sorted(path.name for path in file.iterdir() if path.suffix in (".safetensors", ".pth", ".pt"))
        raise InputError(f"weights {file} is a folder ({', '.join(inside[:5]) or 'no weights in it'}); {remedy}.")
    if not file.is_file():
        raise InputError(f"weights {file} does not exist; {remedy}.")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with torch.serialization.safe_globals([argparse.Namespace, *_numpy_scalars()]):  # torchvision's ``args``
            return torch.load(file, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise InputError(f"weights {file} cannot be read ({error}); {remedy}.") from None
    except Exception as error:  # torch.load has no error type of its own
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise InputError(
                f"weights {file} hold a pickled object ({found[1]}), and reading it would run its code; load it where "
                "you trust it, with torch.load(..., weights_only=False), and save its state_dict() alone."
            ) from None
        what = re.split(r"\.\s", str(error), maxsplit=1)[0] or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):
            what = "it is not of torch.save"
        if "TorchScript" in what:
            what = "it is a TorchScript archive"
        raise InputError(f"weights {file} cannot be read ({what}); {remedy}.") from None


def _numpy_scalars() -> list[Any]:
    """What a checkpoint needs to hold its best score as numpy's number."""
    import numpy as np

    kinds = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)]
    scalar = cast(Any, np)._core.multiarray.scalar
    return [(scalar, "numpy.core.multiarray.scalar"), scalar, np.dtype, *kinds]


@dataclass
class _State:
    """The state dict in what a file holds.

    Attributes:
        tensors: by name.
        key: where it was, dotted; empty if it was the whole.
        others: keys beside it that hold state dicts too.
    """

    content: Any
    file: Path
    tensors: dict[str, Tensor] = field(default_factory=dict)
    key: str = ""
    others: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        path: list[str] = []
        found = self.content
        while isinstance(found, Mapping):
            keys = list(_state_keys(found))
            if not keys:
                break
            self.others += tuple(".".join((*path, key)) for key in keys[1:])
            path.append(keys[0])
            found = found[keys[0]]
        self.key = ".".join(path)
        if isinstance(found, Mapping):
            self.tensors = {name: t for name, t in found.items() if isinstance(t, Tensor) and isinstance(name, str)}
        if not self.tensors:
            what = f"a {type(found).__name__}"
            if isinstance(found, Mapping):
                what = f"the keys {', '.join(map(str, list(found)[:8]))}" if found else "nothing"
            raise InputError(
                f"weights {self.file} hold no state dict but {what}; give one, or a checkpoint that has it under "
                f"{', '.join(HOLDERS[:4])}."
            )


def _state_keys(content: Mapping[Any, Any]) -> Iterator[str]:
    """Keys of what may hold a state dict: the known ones in order, else those of tensors by name."""
    known = [key for key in HOLDERS if isinstance(content.get(key), Mapping) and content[key]]
    yield from known or (key for key, inside in content.items() if isinstance(key, str) and _is_state(inside))


def _is_state(content: Any) -> bool:
    if not isinstance(content, Mapping):
        return False
    return any(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items())


class _Places:
    """Where a foreign tensor belongs: under its own name, without what wrappers added, below an adopting one, a level
    down, in the body.

    Args:
        wanted: the state dict that it goes into.
    """

    def __init__(self, wanted: Mapping[str, Tensor]) -> None:
        self.wanted = wanted
        staged: dict[str, list[str]] = {}  # layers that stand in stages, by their names without these
        for name in wanted:
            if found := re.match(rf"{re.escape(BODY)}\.stage\d\.(.+)", name):
                staged.setdefault(found[1], []).append(name)
        self.staged = {name: found[0] for name, found in staged.items() if len(found) == 1}

    def __call__(self, name: str) -> str:
        if name in self.wanted:
            return name
        parts = [part for part in name.split(".") if part not in WRAPPERS]
        while len(parts) > 1 and parts[0] in OUTERMOST:
            parts = parts[1:]
        bare = ".".join(parts)
        head, _, leaf = bare.rpartition(".")
        own = bare.removeprefix("backbone.").removeprefix("body.")
        inside = own.partition(".")[2] if own.startswith(SEQUENCES) else own
        flat = re.sub(r"^(\w+)\.(\w+)\.", r"\1_\2.", own)  # as timm names what was one level down
        bodies = [f"{BODY}.{each}" for each in (own, inside, flat)]
        adopted = [f"{ADOPTED}.{each}" for each in (name, bare)]
        listed = [f"{head}.0.{leaf}", f"{head}.0.0.{leaf}"]
        for candidate in (bare, *adopted, *listed, *bodies, self.staged.get(inside, "")):
            if candidate in self.wanted:
                return candidate
        return name


def parameter_count(model: nn.Module) -> int:
    """Number of trainable and frozen parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
