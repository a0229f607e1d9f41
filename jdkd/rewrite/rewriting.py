"""See :class:`Rewrite`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from jdkd.errors import InputError
from jdkd.graph import Topology
from jdkd.nn.unwrapping import unwrapped
from jdkd.rewrite.architecture import Architecture
from jdkd.rewrite.blocks import arrange
from jdkd.rewrite.building import set_attribute
from jdkd.rewrite.channels import duplicate, prune, widen
from jdkd.rewrite.description import describe

NUMBERS = int, float
KINDS = (bool, NUMBERS, str, (list, tuple))  # of plain attributes


@dataclass(frozen=True)
class Rewrite:
    """What is to be done to a model, as data: which channels and blocks stay, which are added.

    Args:
        keep: units to keep, by the name of their channel group; groups that are not named stay whole.
        extra: units to add, by the name of their group; nothing reads them yet.
        blocks: by the name of a block list, which of its blocks stand there, in order; one that is named again is a
            copy, born as the identity.
        attributes: plain attributes to set, ``"path.name"`` -> value, such as the size of the input.

    Raises:
        InputError: channels are both kept and added, which takes two rewrites.
    """

    keep: Mapping[str, Sequence[int]] = field(default_factory=dict)
    extra: Mapping[str, int] = field(default_factory=dict)
    blocks: Mapping[str, Sequence[int]] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.keep and self.extra:
            raise InputError("a rewrite either keeps channels or adds some; apply one, trace, and apply the other.")

    def apply(self, model: nn.Module, topology: Topology) -> nn.Module:
        """The rewritten model, a copy; one that carries its ``architecture`` gets the new one.

        Args:
            model: what ``topology`` was read off, in torch's wrappers if it was in them; it stays as it is.
            topology: what is coupled to what.

        Raises:
            InputError: a group, a block or an attribute is not there or cannot be so, or ``topology`` is of another
                model.
        """
        child = model
        if self.keep:
            child = prune(child, topology, self.keep)
        if self.extra:
            child = widen(child, topology, self.extra)
        if self.blocks:
            child = arrange(child, topology, self.blocks)
        if child is model:
            child = duplicate(model)
        for name, value in self.attributes.items():
            _require_alike(child, name, value)
            set_attribute(child, name, value)
        inner = unwrapped(child)
        known = getattr(inner, "architecture", None)
        if isinstance(known, Architecture):
            inner.architecture = describe(inner, known.builder, known.arguments, classes=known.classes)
        return child

    def surviving(self, channels: Sequence[tuple[str, int] | None]) -> tuple[int, ...]:
        """Places of those channels, given as :attr:`Topology.followed` has them, that are left, in order."""
        kept = {name: set(units) for name, units in self.keep.items()}
        return tuple(
            place
            for place, channel in enumerate(channels)
            if channel is None or channel[0] not in kept or channel[1] in kept[channel[0]]
        )


def _require_alike(model: nn.Module, name: str, value: Any) -> None:
    """Refuses a value of another kind than the one that is there; what is not there :func:`set_attribute` refuses.

    Raises:
        InputError: a list stands for a number, say.
    """
    owner, _, leaf = name.rpartition(".")
    now = getattr(dict(model.named_modules()).get(owner), leaf, None)
    kinds = next((kinds for kinds in KINDS if isinstance(now, kinds)), None)
    wrong = kinds and (not isinstance(value, kinds) or (isinstance(value, bool) and kinds is NUMBERS))
    if wrong:
        raise InputError(
            f"attributes: {name!r} is {now!r:.80}, a {type(now).__name__}, and cannot become {value!r:.80}."
        )
