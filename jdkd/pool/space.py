"""The teachers a pool holds, as data: elastic depth and width per stage."""

import math
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from jdkd.errors import InputError
from jdkd.graph import Topology
from jdkd.pool.stages import pool_groups, read_stages

WIDEST = 100.0  # times the base: what is more is a slip


@dataclass(frozen=True)
class Subnet:
    """One teacher: how many blocks of each stage run, and which share of the channels inside of it.

    A subnet runs the first blocks of a stage and the leading channels of a group (Cai et al., ICLR 2020).
    """

    depths: tuple[int, ...]
    widths: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Subnet":
        return cls(tuple(fields["depths"]), tuple(fields["widths"]))

    def __str__(self) -> str:
        stages = zip(self.depths, self.widths, strict=True)
        return " ".join(f"{depth}x{_told(width)}" for depth, width in stages)


@dataclass(frozen=True)
class Space:
    """Every subnet of a supernet.

    Args:
        depths: per stage, the numbers of blocks that may run, ascending; see :func:`jdkd.pool.stages.read_stages`.
        widths: shares of the elastic channels that may run, ascending to 1.
        growth: elastic channels of the largest network over those of the base that it is grown from.

    Raises:
        InputError: depths or widths do not ascend, or the largest width is not 1.
    """

    depths: tuple[tuple[int, ...], ...]
    widths: tuple[float, ...]
    growth: float = 1.0

    def __post_init__(self) -> None:
        rise = all(list(choices) == sorted(set(choices)) != [] for choices in (*self.depths, self.widths))
        if not rise or not math.isclose(self.widths[-1], 1):
            raise InputError(
                f"the depths of every stage and the widths of a space must ascend, widths to 1, got {self.depths} and "
                f"{self.widths}; sort them."
            )

    @classmethod
    def from_base(cls, topology: Topology, extra_depth: int = 1, width: float = 1.5, steps: int = 3) -> "Space":
        """The space from the base's size up to one deeper and wider.

        Args:
            topology: of the detector that the pool grows from.
            extra_depth: blocks that the largest network has more, in every stage that can grow.
            width: elastic channels of the largest network over the base's.
            steps: number of widths from the base's to the largest.

        Raises:
            InputError: the largest network would be smaller than the base, or larger than anybody means, or two widths
                would have one name.
        """
        if extra_depth < 0 or not 1 <= width <= WIDEST or steps < 1:
            raise InputError(
                f"a pool is grown: extra_depth must be at least 0, width in 1..{WIDEST:g} and the number of widths at "
                f"least 1, got {extra_depth}, {width} and {steps}."
            )
        depths = []
        for stage in read_stages(topology, ()):
            more = extra_depth if stage.blocks is not None and stage.blocks.can_grow else 0
            depths.append(tuple(range(stage.depth, stage.depth + more + 1)))
        least = 1 / width
        single = width == 1 or steps == 1 or not pool_groups(topology)
        widths = (1.0,) if single else tuple(least + (1 - least) * i / (steps - 1) for i in range(steps))
        names = [_told(each) for each in widths]
        if shared := next((name for name in names if names.count(name) > 1), None):
            raise InputError(
                f"{steps} widths up to {width:g} times the base's lie so near to each other that {shared} is the name "
                "of more than one; give fewer widths, or a larger width."
            )
        return cls(tuple(depths), widths, width)

    @property
    def largest(self) -> Subnet:
        """The largest subnet: the supernet itself."""
        return Subnet(tuple(choices[-1] for choices in self.depths), (self.widths[-1],) * len(self.depths))

    @property
    def smallest(self) -> Subnet:
        return Subnet(tuple(choices[0] for choices in self.depths), (self.widths[0],) * len(self.depths))

    def top_fraction(self, share: float) -> "Space":
        """The upper ``share`` of every range: 0 is the largest network alone, 1 the whole space."""

        def upper(choices: Sequence) -> tuple:
            return tuple(choices[round((1 - share) * (len(choices) - 1)) :])

        return replace(self, depths=tuple(upper(choices) for choices in self.depths), widths=upper(self.widths))

    def sample(self, rng: random.Random) -> Subnet:
        """A subnet drawn uniformly, stage by stage."""
        return Subnet(
            tuple(rng.choice(choices) for choices in self.depths),
            tuple(rng.choice(self.widths) for _ in self.depths),
        )

    def mutate(self, subnet: Subnet, rng: random.Random) -> Subnet:
        """Another subnet, one notch away in the depth or the width of one or two stages."""
        depths, widths = list(subnet.depths), list(subnet.widths)
        choices: list[tuple[list[Any], int, tuple[Any, ...]]]
        choices = [(depths, stage, self.depths[stage]) for stage in range(len(depths)) if len(self.depths[stage]) > 1]
        choices += [(widths, stage, self.widths) for stage in range(len(widths)) if len(self.widths) > 1]
        for values, stage, allowed in rng.sample(choices, min(len(choices), rng.randint(1, 2))):
            at = allowed.index(values[stage])
            values[stage] = rng.choice([allowed[i] for i in (at - 1, at + 1) if 0 <= i < len(allowed)])
        return Subnet(tuple(depths), tuple(widths))

    def named(self, name: str) -> Subnet:
        """The subnet that a text names: ``largest``, ``smallest``, or what ``str`` makes of one, such as "2x0.67 1x1".

        Raises:
            InputError: it names none, or the supernet does not hold it.
        """
        if name in ("largest", "smallest"):
            return getattr(self, name)
        listed = re.split(r"[,\s]+", name.strip())
        parts = [part for part in (re.fullmatch(r"(\d+)x(\d*\.?\d+)", each) for each in listed) if part is not None]
        if len(parts) < len(listed):
            raise InputError(
                f"{name!r} names no subnet; give largest, smallest, best, or blocks x width for each of the "
                f"{len(self.depths)} stages, such as '{self.smallest}'."
            )
        exact = {_told(width): width for width in self.widths}  # what a name rounds
        widths = [float(part[2]) for part in parts]
        subnet = Subnet(tuple(int(part[1]) for part in parts), tuple(exact.get(_told(w), w) for w in widths))
        self.check(subnet)
        return subnet

    def check(self, subnet: Subnet) -> None:
        """Refuses what the supernet does not hold.

        Raises:
            InputError: names the subnet and the ranges.
        """
        if len(subnet.depths) != len(self.depths) or len(subnet.widths) != len(self.depths):
            raise InputError(
                f"subnet {subnet} has {len(subnet.depths)} depths and {len(subnet.widths)} widths for "
                f"{len(self.depths)} stages; give one of each per stage."
            )
        for stage, (depth, width, choices) in enumerate(zip(subnet.depths, subnet.widths, self.depths, strict=True), 1):
            if not 1 <= depth <= choices[-1] or not 0 < width <= 1:
                raise InputError(
                    f"subnet {subnet} does not fit its supernet: stage {stage} asks for {depth} blocks at width "
                    f"{width:g} and the supernet has {choices[-1]} blocks at width 1; ask for no more than that."
                )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Space":
        depths = tuple(tuple(choices) for choices in fields["depths"])
        return cls(depths, tuple(fields["widths"]), fields["growth"])


def _told(width: float) -> str:
    """A share of the channels in the name of a subnet."""
    return f"{width:.2g}"
