"""See :class:`Declaration`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jdkd.errors import InputError
from jdkd.graph.channels import Channels
from jdkd.graph.rules import KINDS

Place = tuple[str, int]


@dataclass(frozen=True)
class Declaration:
    """What is known of a model that one forward does not show; it corrects a trace.

    Args:
        operators: what operators without a rule do to channels, by name (``"mylib::gate"``): ``"pointwise"`` (every
            element from those at the same place), ``"spatial"`` (inside every channel map ``[N, C, H, W]``) or
            ``"same"`` (its first tensor, changed in no dimension).
        frozen: (tensor, dimension) of channels that must stay.
        coupled: pairs of (tensor, dimension) whose channels live and die together, in order.

    Raises:
        InputError: an operator is declared to be something else.
    """

    operators: Mapping[str, str] = field(default_factory=dict)
    frozen: tuple[Place, ...] = ()
    coupled: tuple[tuple[Place, Place], ...] = ()

    def __post_init__(self) -> None:
        for name, kind in self.operators.items():
            if kind not in KINDS:
                raise InputError(f"operator {name!r} is declared {kind!r}; say one of {', '.join(KINDS)}.")

    def apply(self, channels: Channels) -> None:
        """Freezes and couples what was declared.

        Raises:
            InputError: the forward met no such dimension, or a pair differs in size.
        """
        axes = {(axis.tensor, axis.dim): axis for axis in channels.axes}
        named = [*self.frozen, *(place for pair in self.coupled for place in pair)]
        if missing := [place for place in named if place not in axes]:
            tensor, dim = missing[0]
            raise InputError(
                f"dimension {dim} of {tensor!r} is declared, and the forward met no such dimension of more than one "
                "channel; name a parameter or buffer that it uses."
            )
        for place in self.frozen:
            channels.freeze(axes[place].numbers, "it is declared so")
        for one, other in self.coupled:
            if axes[one].size != axes[other].size:
                raise InputError(
                    f"{one} has {axes[one].size} channels and {other} has {axes[other].size}; couple dimensions of one "
                    "size."
                )
            channels.couple(axes[one].numbers, axes[other].numbers)
