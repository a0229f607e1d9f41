"""A subnet of a whole model as data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jdkd.errors import InputError
from jdkd.ops.active_channels import check_distinct
from jdkd.ops.integers import integer, integers

Pairs = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Subnet:
    """What is active in a model: data, hashable, and JSON by :meth:`to_json`.

    Args:
        channels: of groups of coupled channels, by name: the number of leading ones, or distinct indices. A group that
            is not named is active as a whole. Integers of every kind and sequences, arrays and tensors in host memory
            of them are taken, and kept as ints and tuples.
        kernel_sizes: of convolutions, by their path in the model, in taps. The others run with their whole kernel.
        depths: blocks that run, by the name of the stage. The others run as a whole.

    Subnets are equal as data. ``{"a": 2}`` and ``{"a": [0, 1]}`` activate the same channels and are two subnets, with
    two ids and, in layers with ``statistics="own"``, two sets of statistics; so are a group at the number of all its
    channels and a group that is not named. Write what is to be one subnet in one way.
    """

    channels: Mapping[str, int | Sequence[int]] | Pairs = field(default=())
    kernel_sizes: Mapping[str, int | Sequence[int]] | Pairs = field(default=())
    depths: Mapping[str, int] | Pairs = field(default=())

    def __post_init__(self) -> None:
        for name, read in _READERS.items():
            given = _mapping(getattr(self, name), name)
            pairs = tuple((key, read(given[key], f"Subnet: {name}[{key!r}]")) for key in sorted(given))
            object.__setattr__(self, name, pairs)

    @property
    def id(self) -> str:
        """A short name of what is active, by its contents: ``s`` and 12 hexadecimal digits."""
        return "s" + hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:12]

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Returns: what :meth:`from_json` reads, of ints, lists and dicts alone."""
        return {
            name: {key: list(value) if isinstance(value, tuple) else value for key, value in getattr(self, name)}
            for name in ("channels", "kernel_sizes", "depths")
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Subnet:
        """Reads what :meth:`to_json` gave; raises InputError on fields that it does not have."""
        if not isinstance(fields, Mapping):
            raise InputError(f"Subnet.from_json: fields={fields!r}; give the dict that to_json returns")
        if unknown := sorted(fields.keys() - cls.__dataclass_fields__.keys()):
            raise InputError(f"Subnet: there are no fields {unknown}; give {', '.join(cls.__dataclass_fields__)}")
        return cls(**fields)


def _mapping(value: Any, what: str) -> dict[str, Any]:
    """Reads a field of a subnet: a mapping, or pairs."""
    try:
        given = dict(value)
    except (TypeError, ValueError):
        raise InputError(f"Subnet: {what}={value!r}; give a mapping from names, such as {{'a': 4}}") from None
    for name in given:
        if not isinstance(name, str):
            raise InputError(f"Subnet: {what} has the name {name!r}, a {type(name).__name__}; give names as text")
    return {str(name): entry for name, entry in given.items()}


def _channels(value: Any, what: str) -> int | tuple[int, ...]:
    indices = integers(value)
    if indices:
        check_distinct(indices, None, what)
        return tuple(indices)
    return _count(value, what, "an int, or a list of ints in host memory, of at least one channel")


def _taps(value: Any, what: str) -> int | tuple[int, ...]:
    sizes = integers(value)
    if sizes and len(sizes) == 2 and min(sizes) >= 1:
        return tuple(sizes)
    return _count(value, what, "an int or two, in taps, from 1")


def _blocks(value: Any, what: str) -> int:
    return _count(value, what, "an int, the number of blocks, from 1")


def _count(value: Any, what: str, wanted: str) -> int:
    count = integer(value)
    if count is None or count < 1:
        raise InputError(f"{what}={value!r} is not {wanted}; give that, or leave the name out for all there is")
    return count


_READERS: dict[str, Callable[[Any, str], Any]] = {"channels": _channels, "kernel_sizes": _taps, "depths": _blocks}
