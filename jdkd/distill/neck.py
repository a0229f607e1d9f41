"""What a neck returns: the levels in it, whatever holds them, and the same with some of them exchanged."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from jdkd.errors import InputError
from jdkd.ops.pearson_pairs import entries_with_levels
from jdkd.ops.transforms import is_transformed

Pyramid = Tensor | Sequence[Any] | Mapping[str, Any]


def levels_of(pyramid: Pyramid) -> dict[str, Tensor]:
    """Name -> level: every floating ``[N, C, H, W]`` in tensors, sequences and mappings, however they are nested.

    A level in a sequence is named by its index, one in a container within another by the path, ``"feature_maps.0"``.
    """
    return {
        name or "0": level
        for name, level in _leaves(pyramid, "")
        if isinstance(level, Tensor) and level.dim() == 4 and level.is_floating_point()
    }


def addresses_of(pyramid: Pyramid) -> set[int]:
    """Where its levels lie; nowhere while a compiler or ``torch.func`` follows the call, as their tensors do not."""
    if torch.compiler.is_compiling() or is_transformed():
        return set()
    return {level.data_ptr() for level in levels_of(pyramid).values()}


def found_levels(pyramid: Pyramid, who: str) -> dict[str, Tensor]:
    """The levels that :func:`levels_of` finds, if it finds any.

    Raises:
        InputError: it finds none.
    """
    levels = levels_of(pyramid)
    if levels:
        return levels
    inside = ", ".join(
        f"{list(part.shape)} of {part.dtype}" for _, part in _leaves(pyramid, "") if isinstance(part, Tensor)
    )
    holds = f"tensors {inside}" if inside else f"a {type(pyramid).__name__}"
    raise InputError(
        f"the {who}'s neck returned {holds}, in which there is no level of features; let it return a floating tensor "
        "[N, C, H, W], or such levels in lists, tuples or mappings, or name another submodule"
    )


def with_levels(pyramid: Pyramid, before: Sequence[Tensor], after: Sequence[Tensor]) -> Pyramid:
    """The pyramid, its containers of the same types, with some of its levels exchanged."""
    return _exchanged(pyramid, {id(old): new for old, new in zip(before, after, strict=True)})


def _leaves(part: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(part, Mapping):
        entries = [(str(name), value) for name, value in entries_with_levels(part)]
    elif isinstance(part, list | tuple):
        entries = [(str(index), value) for index, value in enumerate(part)]
    else:
        yield path, part
        return
    for name, value in entries:
        yield from _leaves(value, f"{path}.{name}" if path else name)


def _exchanged(part: Any, new: Mapping[int, Tensor]) -> Any:
    if isinstance(part, Mapping):
        changed = {name: _exchanged(value, new) for name, value in part.items()}
        changed = {name: value for name, value in changed.items() if value is not part[name]}
        if not changed:
            return part
        outer = copy.copy(part) if isinstance(part, MutableMapping) else dict(part)
        for name, value in changed.items():
            outer[name] = value
        return outer
    if isinstance(part, list | tuple):
        inside = [_exchanged(value, new) for value in part]
        if all(ours is theirs for ours, theirs in zip(inside, part, strict=True)):
            return part
        if isinstance(part, list):
            return inside
        return part._make(inside) if hasattr(part, "_make") else tuple(inside)
    return new.get(id(part), part)
