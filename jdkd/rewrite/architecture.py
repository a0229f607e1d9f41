"""See :class:`Architecture`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jdkd.errors import InputError

if TYPE_CHECKING:
    from torch import nn

REMEDY = "give what `Architecture.to_json` wrote"


@dataclass(frozen=True)
class Architecture:
    """What a module is made of, as data: who builds it, and what was changed since.

    Two models of the same architecture compute the same from the same weights. What is recorded is only what differs
    from the builder's own.

    Args:
        builder: import path ``"package.module:function"`` of what returns the module.
        arguments: what it is called with, by name; only what JSON has (a tuple becomes a list).
        blocks: container -> which of the builder's children stand there, in order; a repeated number is a copy.
        shapes: parameter or buffer -> its shape.
        attributes: ``"path.name"`` -> number, text or list of such that was set on a module after it was built, such as
            the size to which a detector resizes its input; or how many regions it proposes, a mapping.
        classes: names of the object classes, label k is ``classes[k - 1]``; empty: not known.

    Raises:
        InputError: a field is of another kind.
    """

    builder: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    blocks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        module, _, function = self.builder.partition(":") if isinstance(self.builder, str) else ("", "", "")
        if not module or not function:
            raise InputError(f"builder must be an import path 'package.module:function', got {self.builder!r:.80}.")
        for name, least in (("blocks", 0), ("shapes", 1)):
            lists = _mapping(name, getattr(self, name))
            object.__setattr__(self, name, {key: _integers(name, key, each, least) for key, each in lists.items()})
        if empty := [key for key, order in self.blocks.items() if not order]:
            raise InputError(f"blocks must leave at least one child in {empty[0]!r}.")
        for name in ("arguments", "attributes"):
            object.__setattr__(self, name, _json_like(name, _mapping(name, getattr(self, name))))
        listed = isinstance(self.classes, list | tuple)
        if not listed or not all(isinstance(name, str) for name in self.classes):
            raise InputError(f"classes must be a list of names, got {self.classes!r:.80}.")
        object.__setattr__(self, "classes", tuple(self.classes))

    def __hash__(self) -> int:
        return hash(self.id)

    @property
    def id(self) -> str:
        """SHA-256 of the canonical JSON form."""
        return hashlib.sha256(self.to_json(indent=None).encode()).hexdigest()

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(dataclasses.asdict(self), indent=indent, sort_keys=True)

    @classmethod
    def from_json(cls, text: str, source: str = "the architecture") -> Architecture:
        """Reads what :meth:`to_json` wrote.

        Raises:
            InputError: ``text`` is no JSON object, lacks the builder, or has a field that is unknown or of another
                kind. ``source`` names it in the message.
        """
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{source} is not JSON ({error}); {REMEDY}.") from None
        known = [each.name for each in dataclasses.fields(cls)]
        if not isinstance(fields, dict) or "builder" not in fields or not fields.keys() <= set(known):
            got = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
            raise InputError(
                f"{source} must be a JSON object with a builder and of the fields {known}, got {got}; {REMEDY}."
            )
        try:
            return cls(**fields)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None
        except TypeError as error:
            raise InputError(f"{source} describes no architecture ({error}); {REMEDY}.") from None

    def replace(self, **changes: Any) -> Architecture:
        return dataclasses.replace(self, **changes)


def _mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise InputError(f"{name} must map names to values, got {value!r:.80}.")
    return dict(value)


def _integers(name: str, key: str, values: Any, least: int) -> tuple[int, ...]:
    whole = isinstance(values, list | tuple) and all(type(value) is int and value >= least for value in values)
    if not whole:
        raise InputError(f"{name} of {key!r} must be a list of whole numbers of at least {least}, got {values!r:.80}.")
    return tuple(values)


def _json_like(name: str, value: Any) -> Any:
    try:
        copied = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{name} can hold only what JSON has, finite numbers, text, lists and mappings of names, got "
            f"{value!r:.120} ({error}); give such a value, or a builder that makes it itself."
        ) from None
    return copied


def set_architecture(model: nn.Module, architecture: Architecture) -> None:
    """Lets a model carry what it is made of, as its attribute ``architecture``."""
    vars(model)["architecture"] = architecture
