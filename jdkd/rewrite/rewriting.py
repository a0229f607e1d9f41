"""See :class:`Rewrite`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import nn

from jdkd.errors import InputError
from jdkd.graph import ChannelGroup, Topology
from jdkd.nn.unwrapping import unwrapped
from jdkd.rewrite.architecture import Architecture
from jdkd.rewrite.blocks import arrange_in_place
from jdkd.rewrite.building import set_attribute
from jdkd.rewrite.channels import checked, duplicate, leaving, prune, widen
from jdkd.rewrite.description import describe

NUMBERS = int, float
PLACES = "keep", "blocks"  # of a rewrite, that are lists of places by a name
KINDS = (bool, NUMBERS, str, (list, tuple))  # of plain attributes


@dataclass(frozen=True)
class Rewrite:
    """What is to be done to a model, as data: which channels and blocks stay, which are added.

    Args:
        keep: units to keep, by the name of their channel group; groups that are not named stay whole.
        extra: units to add, by the name of their group; nothing reads them yet.
        blocks: by the name of a block list, which of its blocks stand there, in order; one that is named again is a
            copy, born as the identity.
        attributes: plain attributes to set, ``"path.name"`` -> value, such as the size of the input, and the numbers of
            regions that are proposed.

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

    def to_json(self) -> dict[str, Any]:
        """The rewrite as JSON; what :meth:`from_json` makes of it is equal."""
        shown = {name: {key: list(map(int, own)) for key, own in getattr(self, name).items()} for name in PLACES}
        return {**shown, "extra": dict(self.extra), "attributes": dict(self.attributes)}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Rewrite:
        places = {name: {key: tuple(own) for key, own in fields[name].items()} for name in PLACES}
        attributes = {name: tuple(own) if isinstance(own, list) else own for name, own in fields["attributes"].items()}
        return cls(**places, extra=fields["extra"], attributes=attributes)

    def apply(self, model: nn.Module, topology: Topology) -> nn.Module:
        """The rewritten model, a copy; one that carries its ``architecture`` gets the new one.

        Args:
            model: what ``topology`` was read off, in torch's wrappers if it was in them; it stays as it is.
            topology: what is coupled to what.

        Raises:
            InputError: a group, a block or an attribute is not there or cannot be so, or ``topology`` is of another
                model.
        """
        if self.keep:
            child = prune(model, topology, self.keep)
        elif self.extra:
            child = widen(model, topology, self.extra)
        else:
            child = duplicate(model)
        if self.blocks:
            arrange_in_place(child, topology, self.blocks)
        for name, value in self.attributes.items():
            _require_alike(child, name, value)
            set_attribute(child, name, value)
        inner: Any = unwrapped(child)
        known = getattr(inner, "architecture", None)
        if isinstance(known, Architecture):
            inner.architecture = describe(inner, known.builder, known.arguments, classes=known.classes)
        return child

    def foreseen(self, topology: Topology, child: nn.Module) -> Topology | None:
        """What a trace would read of the child, where it follows from what was read of the parent.

        Args:
            topology: of the parent; what was verified of it holds of the child.
            child: what :meth:`apply` returned.

        Returns:
            The child's topology; None where blocks or added channels changed what there is to read.
        """
        if self.blocks or self.extra:
            return None
        kept = {name: checked(topology, name, units) for name, units in self.keep.items()}
        removed = leaving(topology, kept)

        def cut(group: ChannelGroup) -> ChannelGroup:
            units = kept.get(group.name, np.arange(group.units))
            slots = []
            for slot in group.slots:
                places = slot.places[units]
                before = np.searchsorted(removed.get((slot.tensor, slot.dim), places[:0, 0]), places)
                slots.append(replace(slot, places=places - before))
            return replace(group, units=len(units), slots=tuple(slots))

        def renumbered(channel: tuple[str, int] | None) -> tuple[str, int] | None:
            if channel is None or channel[0] not in kept:
                return channel
            return channel[0], int(np.searchsorted(kept[channel[0]], channel[1]))

        return replace(
            topology,
            groups=tuple(map(cut, topology.groups)),
            sizes={name: parameter.numel() for name, parameter in unwrapped(child).named_parameters()},
            followed=tuple(
                tuple(renumbered(level[place]) for place in self.surviving(level)) for level in topology.followed
            ),
        )

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
