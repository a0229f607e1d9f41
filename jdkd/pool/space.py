"""The teachers a pool holds, as data: elastic depth and width per stage."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jdkd.detect import DetectorSpec, Stage, round_width
from jdkd.errors import InputError


@dataclass(frozen=True)
class Subnet:
    """One teacher: how many blocks of each stage run, and which share of their inner channels.

    A subnet runs the first blocks of a stage and the leading channels of a block (Cai et al., ICLR 2020).
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
        return " ".join(f"{depth}x{width:.2g}" for depth, width in stages)


@dataclass(frozen=True)
class Space:
    """Every subnet of a supernet.

    Args:
        largest_spec: the supernet's own architecture.
        depths: per stage, the numbers of blocks that may run, ascending.
        widths: shares of the inner channels that may run, ascending to 1.
    """

    largest_spec: DetectorSpec
    depths: tuple[tuple[int, ...], ...]
    widths: tuple[float, ...]

    @classmethod
    def from_base(cls, base: DetectorSpec, extra_depth: int = 1, width: float = 1.5, steps: int = 3) -> "Space":
        """The space from the base's size up to one deeper and wider.

        Args:
            base: the detector that the pool grows from.
            extra_depth: blocks that the largest network has more, in every stage.
            width: inner channels of the largest network over the base's.
            steps: number of widths from the base's to the largest.

        Raises:
            InputError: the largest network would be smaller than the base.
        """
        if extra_depth < 0 or width < 1 or steps < 1:
            raise InputError(
                f"a pool is grown: extra_depth must be at least 0, width 1 and steps 1, got {extra_depth}, "
                f"{width} and {steps}."
            )
        stages = tuple(
            Stage(
                stage.width,
                tuple(
                    tuple(round_width(width * channels) for channels in block)
                    for block in (*stage.blocks, *[stage.blocks[-1]] * extra_depth)
                ),
            )
            for stage in base.stages
        )
        least = 1 / width
        shares = (
            (1.0,) if width == 1 or steps == 1 else tuple(least + (1 - least) * i / (steps - 1) for i in range(steps))
        )
        depths = tuple(tuple(range(stage.depth, stage.depth + extra_depth + 1)) for stage in base.stages)
        return cls(base.replace(stages=stages), depths, shares)

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

        return Space(self.largest_spec, tuple(upper(choices) for choices in self.depths), upper(self.widths))

    def sample(self, rng: random.Random) -> Subnet:
        """A subnet drawn uniformly, stage by stage."""
        return Subnet(
            tuple(rng.choice(choices) for choices in self.depths),
            tuple(rng.choice(self.widths) for _ in self.depths),
        )

    def mutate(self, subnet: Subnet, rng: random.Random) -> Subnet:
        """Another subnet, one notch away in the depth or the width of one or two stages."""
        depths, widths = list(subnet.depths), list(subnet.widths)
        choices = [(depths, stage, self.depths[stage]) for stage in range(len(depths)) if len(self.depths[stage]) > 1]
        choices += [(widths, stage, self.widths) for stage in range(len(widths)) if len(self.widths) > 1]
        for values, stage, allowed in rng.sample(choices, min(len(choices), rng.randint(1, 2))):
            at = allowed.index(values[stage])
            values[stage] = rng.choice([allowed[i] for i in (at - 1, at + 1) if 0 <= i < len(allowed)])
        return Subnet(tuple(depths), tuple(widths))

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

    def inner_widths(self, subnet: Subnet, stage: int) -> tuple[tuple[int, ...], ...]:
        """Inner channels of every block of ``stage`` that runs."""
        blocks = self.largest_spec.stages[stage].blocks[: subnet.depths[stage]]
        return tuple(tuple(min(full, round_width(subnet.widths[stage] * full)) for full in block) for block in blocks)

    def spec(self, subnet: Subnet) -> DetectorSpec:
        """The subnet as a detector of its own.

        Raises:
            InputError: the supernet does not hold it.
        """
        self.check(subnet)
        stages = tuple(
            Stage(stage.width, self.inner_widths(subnet, number))
            for number, stage in enumerate(self.largest_spec.stages)
        )
        return self.largest_spec.replace(stages=stages)

    def to_json(self) -> dict[str, Any]:
        return {"depths": self.depths, "widths": self.widths}

    @classmethod
    def from_json(cls, largest_spec: DetectorSpec, fields: dict[str, Any]) -> "Space":
        return cls(largest_spec, tuple(tuple(choices) for choices in fields["depths"]), tuple(fields["widths"]))
