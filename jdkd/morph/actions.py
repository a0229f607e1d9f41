"""Student morphism: the five actions that change a student and let it keep its weights.

The action space follows Joint-DetNAS (Yao et al., CVPR 2021, abstract and figure 2: morphism of the
architecture and removal of redundant parameters, with weight inheritance). Ranges, divisors and floors are
our choice. An action is a pure function of the parent, a detector of :func:`jdkd.detect.build` or
:func:`jdkd.detect.load` (anything else raises InputError): it returns a :class:`Morph` and changes nothing.
"""

import contextlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from jdkd.detect import NEW, DetectorSpec, Stage, inherit, round_width
from jdkd.detect.contract import own_detector
from jdkd.detect.groups import channel_groups, inner_group
from jdkd.errors import InputError
from jdkd.morph.importance import (
    gamma_importance,
    inner_groups,
    magnitude_importance,
    strongest,
    weakest_blocks,
)

DIVISOR = 8  # channel counts stay multiples of it, or a GPU gains nothing from the narrower layer
FLOOR = 0.25  # no group loses more than the rest in one action
MAX_MOVE = 3  # blocks that cross a stage boundary in one rearrangement
COUPLED_SHARES = (0.0, 0.25, 0.5)  # of the FPN and of the box head, dropped in one action
COUPLED = {"fpn": ("fpn", "fpn.top_down", "rpn"), "box_head": ("box_head.fc6", "box_head.fc7")}


@dataclass(frozen=True)
class Morph:
    """One action, decided: the child's spec and where its channels and blocks come from.

    Args:
        action: what was done, e.g. ``"prune 20 % of the inner channels"``.
        spec: the child's architecture.
        channels: parent channel of each child channel, for the groups that changed.
        blocks: per stage, the parent block of each child block (``NEW`` for an added one).
    """

    action: str
    spec: DetectorSpec
    channels: Mapping[str, Sequence[int]] = field(default_factory=dict)
    blocks: tuple[tuple[int, ...], ...] | None = None

    def apply(self, parent: nn.Module) -> nn.Module:
        """The child, with everything it inherits."""
        return inherit(parent, self.spec, channels=self.channels, blocks=self.blocks)


def remove_block(parent: nn.Module, stage: int) -> Morph:
    """Removes the weakest block of a stage, never its first (``stage`` counts from 0).

    Raises:
        InputError: the stage has one block only.
    """
    parent = own_detector(parent, "remove_block")
    spec = parent.spec
    _require_stages(spec, stage)
    if spec.stages[stage].depth < 2:
        raise InputError(f"stage {stage + 1} has 1 block, which also changes the stride; remove from another stage.")
    return _reblock(spec, f"remove a block of stage {stage + 1}", {stage: _without(parent, stage, 1)})


def add_block(parent: nn.Module, stage: int) -> Morph:
    """Appends an identity block to a stage, as wide inside as the last one (``stage`` counts from 0)."""
    parent = own_detector(parent, "add_block")
    spec = parent.spec
    _require_stages(spec, stage)
    return _reblock(spec, f"add a block to stage {stage + 1}", {stage: (*range(spec.stages[stage].depth), NEW)})


def rearrange(parent: nn.Module, source: int, target: int, count: int = 1) -> Morph:
    """Moves the boundary between two neighbouring stages: one loses blocks, the other gains identities.

    The blocks that leave are the weakest of their stage. Those that arrive run at another width and stride,
    where the old weights mean nothing, so they are born as the identity.

    Raises:
        InputError: the stages are not neighbours, or fewer than one block would stay.
    """
    parent = own_detector(parent, "rearrange")
    spec = parent.spec
    _require_stages(spec, source, target)
    if abs(source - target) != 1 or not 1 <= count <= min(MAX_MOVE, spec.stages[source].depth - 1):
        raise InputError(
            f"cannot move {count} block(s) from stage {source + 1} ({spec.stages[source].depth} blocks) to stage "
            f"{target + 1}: stages must be neighbours, at most {MAX_MOVE} blocks move and one stays."
        )
    moved = {
        source: _without(parent, source, count),
        target: (*range(spec.stages[target].depth), *[NEW] * count),
    }
    return _reblock(spec, f"move {count} block(s) from stage {source + 1} to stage {target + 1}", moved)


def prune_channels(parent: nn.Module, ratio: float, *, fpn: float = 0.0, box_head: float = 0.0) -> Morph:
    """Drops the inner channels with the smallest |gamma| of the whole backbone (network slimming).

    Args:
        parent: the detector.
        ratio: share of all inner channels to drop, 0 to below 1. Every group is rounded to a multiple of
            :data:`DIVISOR` and keeps at least :data:`FLOOR` of its channels.
        fpn, box_head: share of the pyramid's channels (with its top-down path and the RPN's hidden layer)
            and of the box head's hidden units to drop, by magnitude, as coupled groups.

    Raises:
        InputError: a share is outside 0 to below 1, or the rounding leaves nothing to drop.
    """
    for name, share in (("ratio", ratio), ("fpn", fpn), ("box_head", box_head)):
        if not 0 <= share < 1:
            raise InputError(f"{name} is the share of channels to drop and must be in [0, 1), got {share}.")
    parent = own_detector(parent, "prune_channels")
    spec = parent.spec
    channels = _slim_inner(parent, ratio) if ratio else {}
    groups = channel_groups(spec)
    sizes = {}
    for name, share in (("fpn", fpn), ("box_head", box_head)):
        sizes[name] = _kept_count(getattr(spec, name), 1 - share)
        if sizes[name] < getattr(spec, name):
            for group in COUPLED[name]:
                channels[group] = strongest(magnitude_importance(parent, groups[group]), sizes[name])
    if not channels:
        raise InputError(
            f"dropping {ratio:.0%} inner, {fpn:.0%} FPN and {box_head:.0%} box-head channels changes nothing after "
            f"rounding to multiples of {DIVISOR}; drop more."
        )
    stages = tuple(
        Stage(
            stage.width,
            tuple(
                tuple(len(channels.get(inner_group(s, b, k), range(width))) for k, width in enumerate(widths))
                for b, widths in enumerate(stage.blocks)
            ),
        )
        for s, stage in enumerate(spec.stages)
    )
    shares = (("inner", ratio), ("FPN", fpn), ("box-head", box_head))
    what = ", ".join(f"{share:.0%} {name}" for name, share in shares if share)
    return Morph(f"prune {what} channels", spec.replace(stages=stages, **sizes), channels)


def change_resolution(parent: nn.Module, min_size: int) -> Morph:
    """Another short side of the input, in pixels; the long side's limit scales with it."""
    parent = own_detector(parent, "change_resolution")
    spec = parent.spec
    max_size = max(min_size, round(spec.max_size * min_size / spec.min_size))
    return Morph(f"input {spec.min_size} -> {min_size} px", spec.replace(min_size=min_size, max_size=max_size))


def draw(parent: nn.Module, rng: random.Random, resolutions: Sequence[int], max_depth: int) -> Morph:
    """One action, drawn at random among those that the parent allows.

    Args:
        parent: the detector to change.
        rng: the source of chance.
        resolutions: short sides that may be chosen, in pixels.
        max_depth: no stage grows beyond so many blocks.
    """
    parent = own_detector(parent, "draw")
    spec = parent.spec
    deep = [s for s, stage in enumerate(spec.stages) if stage.depth > 1]
    roomy = [s for s, stage in enumerate(spec.stages) if stage.depth < max_depth]
    moves = [(s, t) for s in deep for t in (s - 1, s + 1) if t in roomy]
    sizes = [size for size in resolutions if size != spec.min_size]
    for _ in range(100):
        kind = rng.choice(("prune", "prune", "remove", "add", "rearrange", "resolution"))
        if kind == "prune":
            inner, fpn, head = rng.choice((0.0, rng.uniform(0.1, 0.3))), *rng.choices(COUPLED_SHARES, k=2)
            with contextlib.suppress(InputError):  # nothing left to drop after rounding: draw again
                return prune_channels(parent, inner, fpn=fpn, box_head=head)
        elif kind == "remove" and deep:
            return remove_block(parent, rng.choice(deep))
        elif kind == "add" and roomy:
            return add_block(parent, rng.choice(roomy))
        elif kind == "rearrange" and moves:
            source, target = rng.choice(moves)
            room = min(MAX_MOVE, spec.stages[source].depth - 1, max_depth - spec.stages[target].depth)
            return rearrange(parent, source, target, rng.randint(1, room))
        elif kind == "resolution" and sizes:
            return change_resolution(parent, rng.choice(sizes))
    raise InputError(f"no action is left for {spec.summary()}; allow more depth or more input sizes.")


def _require_stages(spec: DetectorSpec, *stages: int) -> None:
    for stage in stages:
        if stage not in range(len(spec.stages)):
            raise InputError(f"stage {stage!r} is none of a detector's stages 0 to {len(spec.stages) - 1}; name one.")


def _without(parent: nn.Module, stage: int, count: int) -> tuple[int, ...]:
    """Blocks that stay when the ``count`` weakest leave."""
    gone = weakest_blocks(parent, stage, count)
    return tuple(i for i in range(parent.spec.stages[stage].depth) if i not in gone)


def _reblock(spec: DetectorSpec, action: str, changed: Mapping[int, tuple[int, ...]]) -> Morph:
    origins = tuple(changed.get(s, tuple(range(stage.depth))) for s, stage in enumerate(spec.stages))
    stages = tuple(
        Stage(stage.width, tuple(stage.blocks[i] for i in origin))  # NEW is -1: as wide inside as the last block
        for stage, origin in zip(spec.stages, origins, strict=True)
    )
    return Morph(action, spec.replace(stages=stages), blocks=origins)


def _slim_inner(parent: nn.Module, ratio: float) -> dict[str, Sequence[int]]:
    importance = {name: gamma_importance(parent, group) for name, group in inner_groups(parent).items()}
    everything = torch.cat(list(importance.values()))
    threshold = everything.kthvalue(max(1, min(len(everything), round(ratio * len(everything))))).values
    channels = {}
    for name, values in importance.items():
        count = _kept_count(len(values), float((values > threshold).sum()) / len(values))
        if count < len(values):
            channels[name] = strongest(values, count)
    return channels


def _kept_count(size: int, share: float) -> int:
    """Channels that stay: rounded, never under the floor, never more than there are."""
    return min(size, round_width(max(share, FLOOR) * size, DIVISOR))
