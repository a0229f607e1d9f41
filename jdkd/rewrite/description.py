"""See :func:`describe`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jdkd.errors import InputError
from jdkd.nn.unwrapping import unwrapped
from jdkd.notices import say_once
from jdkd.rewrite.architecture import Architecture
from jdkd.rewrite.building import REGISTERED, are_counts, arrange_children, build, reshape
from jdkd.rewrite.channels import tensors_by_name

SIZES = {  # attributes that follow from tensors
    "in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "num_channels",
    "num_groups", "normalized_shape", "num_parameters",
}  # fmt: skip
PLAIN = bool | int | float | str
OURS = REGISTERED | {"architecture"}  # attributes that torch and this package give a module


def describe(
    model: nn.Module,
    builder: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    classes: Sequence[str] = (),
) -> Architecture:
    """The architecture of a model: its builder, and how it differs from what that makes.

    Nobody needs to remember what was done to the model: a block is found again by its structure and attributes, and
    where several blocks are alike any of them stands for the others, so equal models have equal architectures.

    Args:
        model: what the builder made, or was made of that by :mod:`jdkd.rewrite`, in any number of steps.
        builder: import path ``"package.module:function"``.
        arguments: what the builder is called with.
        classes: names of the object classes, taken as they are.

    Raises:
        InputError: the builder cannot be called, or the model differs from it in more than blocks, shapes and plain
            attributes: in the class of a module, say.
    """
    model = unwrapped(model)
    found, fresh = _compared(model, Architecture(builder, dict(arguments or {}), classes=tuple(classes)))
    if unsaid := next(_unsaid(model, fresh), None):
        say_once(
            f"{unsaid} of the {type(model).__name__} is not what {builder} makes, and an architecture says nothing of "
            "it but plain attributes: whoever builds it gets the builder's; where that matters, set it in a function "
            "of your own, and describe the model with that one",
            key=f"{builder} {unsaid}",
        )
    return found


def can_describe(model: nn.Module, builder: str, arguments: Mapping[str, Any]) -> bool:
    """Whether :func:`describe` says all of a model but its weights: what it leaves out is as the builder makes it."""
    model = unwrapped(model)
    try:
        _, fresh = _compared(model, Architecture(builder, arguments))
    except InputError:
        return False
    return next(_unsaid(model, fresh), None) is None


def _compared(model: nn.Module, found: Architecture) -> tuple[Architecture, nn.Module]:
    """The architecture of a model, and what its builder makes, with the model's blocks and shapes.

    Args:
        model: without torch's wrappers.
        found: the builder, its arguments and the classes.

    Raises:
        InputError: as :func:`describe`.
    """
    builder, fresh = found.builder, build(found, "meta")
    blocks = _blocks(model, fresh, "", strict=False)
    if blocks:
        found = found.replace(blocks=blocks)
        for name, order in blocks.items():
            arrange_children(fresh, name, order)
    ours, theirs = tensors_by_name(model), tensors_by_name(fresh)
    for name in sorted(ours.keys() ^ theirs.keys()):
        who = "the model has" if name in ours else f"{builder} makes"
        raise InputError(f"only {who} a tensor {name}; describe it with the builder that made it.")
    shapes = {name: tuple(t.shape) for name, t in ours.items() if t.shape != theirs[name].shape}
    reshape(fresh, shapes)
    return found.replace(shapes=shapes, attributes=_attributes(model, fresh)), fresh


def _blocks(ours: nn.Module, theirs: nn.Module, path: str, strict: bool) -> dict[str, tuple[int, ...]]:
    """Containers whose children are others, or stand in another order.

    Args:
        ours, theirs: the model's module, and the builder's.
        path: of both.
        strict: whether attributes must agree too, so that a block that was moved is not taken for one that was changed.
    """
    if _kind(ours) != _kind(theirs) or (strict and _facts(ours) != _facts(theirs)):
        raise InputError(
            f"{path or 'the model'} is a {_kind(ours)}, and the builder makes a {_kind(theirs)} there; only channels, "
            "blocks and plain attributes may have changed, so describe it with a builder that makes its modules."
        )
    if theirs._modules and not ours._modules:
        raise InputError(f"nothing is left in {path or 'the model'}, where the builder makes blocks; keep one of them.")
    if list(ours._modules) == list(theirs._modules):
        for exact in (True, False):
            try:
                return _inside(ours, theirs, path, exact)
            except InputError:
                if (order := _order(ours, theirs, _signature)) is not None:
                    return {path: order}
                if strict or not exact:
                    raise
    order = _order(ours, theirs, _signature) or (None if strict else _order(ours, theirs, _structure))
    if order is None:
        raise InputError(
            f"{path or 'the model'} has the children {', '.join(ours._modules)[:80]}, which are not all among the "
            f"{', '.join(theirs._modules)[:80]} of the builder; describe it with a builder that makes its modules."
        )
    return {path: order}


def _inside(ours: nn.Module, theirs: nn.Module, path: str, strict: bool) -> dict[str, tuple[int, ...]]:
    """The same of the children of two modules, by name."""
    found: dict[str, tuple[int, ...]] = {}
    for name, child in ours._modules.items():
        other = theirs._modules[name]
        if child is not None and other is not None:
            found |= _blocks(child, other, f"{path}.{name}".lstrip("."), strict)
    return found


def _order(
    ours: nn.Module, theirs: nn.Module, identity: Callable[[nn.Module | None], Hashable]
) -> tuple[int, ...] | None:
    """Which of the builder's children each of ours is: the next one that is alike, else a copy of the last such."""
    known = [(_origin(theirs, name), identity(child)) for name, child in theirs._modules.items()]
    order: list[int] = []
    for name, child in ours._modules.items():
        wanted = _origin(ours, name), identity(child)
        alike = [place for place, each in enumerate(known) if each == wanted]
        if not alike:
            return None
        later = [place for place in alike if place > max(order, default=-1)]
        unused = [place for place in alike if place not in order]
        order.append((later or unused or alike[::-1])[0])
    return tuple(order) or None


def _origin(container: nn.Module, name: str) -> str:
    """What of a child's name says which one it is; a number in a sequence says nothing."""
    name = name.partition("+")[0]
    return "" if type(container) in (nn.Sequential, nn.ModuleList) and name.isdigit() else name


def _structure(module: nn.Module | None) -> Hashable:
    """What a module consists of, whatever its sizes."""
    if module is None:
        return None
    tensors = tuple(
        (name, None if tensor is None else tensor.dim())
        for table in (module._parameters, module._buffers)
        for name, tensor in table.items()
    )
    return _kind(module), tensors, tuple((name, _structure(child)) for name, child in module._modules.items())


def _signature(module: nn.Module | None) -> Hashable:
    """The same, and the attributes of all of it."""
    if module is None:
        return None
    return _structure(module), tuple(_facts(each) for each in module.modules())


def _facts(module: nn.Module) -> Hashable:
    """Attributes that say what a module does, but for its sizes: plain ones, and functions by name."""
    known = {name: value for name, value in _plain(module).items() if name not in SIZES}
    functions = {
        name: value.__qualname__
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, nn.Module) and hasattr(value, "__qualname__")
    }
    return repr(sorted((known | functions).items()))


def _plain(module: nn.Module) -> dict[str, Any]:
    """Attributes that JSON has too, but for torch's own."""
    return {
        name: value
        for name, value in vars(module).items()
        if name not in REGISTERED and (are_counts(name, value) or (not name.startswith("_") and _is_plain(value)))
    }


def _is_plain(value: Any) -> bool:
    return type(value) in PLAIN.__args__ or (type(value) in (list, tuple) and all(map(_is_plain, value)))


def _attributes(model: nn.Module, theirs: nn.Module) -> dict[str, Any]:
    """Attributes that were set since the builder returned; what it does not make itself is the user's own."""
    found = {}
    builders = dict(theirs.named_modules())
    for path, module in model.named_modules():
        made = _plain(builders[path])
        for name, value in _plain(module).items():
            if name in made and made[name] != value:
                found[f"{path}.{name}".lstrip(".")] = value
    return found


def _unsaid(model: nn.Module, theirs: nn.Module) -> Iterator[str]:
    """Attributes that both have and that are no plain ones, such as tables and objects of numbers, and that differ."""
    builders = dict(theirs.named_modules())
    for path, module in model.named_modules():
        made = vars(builders[path])
        for name, value in vars(module).items():
            said = _is_plain(value) or (are_counts(name, value) and are_counts(name, made.get(name)))
            if name in made and name not in OURS and not said and _differs(value, made[name]):
                yield f"{path}.{name}".lstrip(".")


def _differs(ours: Any, theirs: Any, depth: int = 4) -> bool:
    """Whether two values hold other numbers or texts; what a builder left empty is filled when a model runs."""
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        if ours.is_meta or theirs.is_meta or not theirs.numel():
            return False
        same = ours.shape == theirs.shape  # of half precision, and moved to a device, they are rounded
        return not (same and torch.allclose(ours.detach().cpu().float(), theirs.detach().cpu().float(), 1e-2, 0))
    if isinstance(theirs, PLAIN) and isinstance(ours, PLAIN):
        return ours != theirs
    if type(ours) is not type(theirs) or isinstance(ours, nn.Module | type) or callable(ours) or not depth:
        return False
    if isinstance(ours, list | tuple):
        ours, theirs = dict(enumerate(ours)), dict(enumerate(theirs))
    elif not isinstance(ours, dict):
        ours, theirs = getattr(ours, "__dict__", {}), getattr(theirs, "__dict__", {})
    if not theirs:
        return False
    return ours.keys() != theirs.keys() or any(_differs(ours[key], theirs[key], depth - 1) for key in theirs)


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
