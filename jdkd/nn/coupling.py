"""Which channels and blocks of a model a subnet sets, by names: read off a topology, or declared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from jdkd.errors import InputError
from jdkd.nn.elastic_block import ElasticBlock
from jdkd.ops.active_channels import Channels
from jdkd.ops.integers import integer

SIDES = ("in", "out")


class ChannelSlot(NamedTuple):
    """One side of a layer: the channels it reads, or those it makes.

    Args:
        module: path of a convolution, a linear layer or a batch normalisation.
        side: ``"in"`` or ``"out"``; a batch normalisation and a depthwise convolution have one kind of channels, by
            the name of ``"out"``.
        repeat: consecutive features that belong to one channel, where a map was flattened (49 for 7x7).
    """

    module: str
    side: str
    repeat: int = 1


@dataclass(frozen=True)
class ElasticGroups:
    """The groups of coupled channels and the stages of a model, by name.

    Every layer that makes or reads the channels of a residual stream, or of the inputs of a feature pyramid, is in one
    group, so that a subnet sets them once::

        groups = {"inner": [("conv1", "out"), ("bn1", "out"), ("conv2", "in")]}
        model.elastic_groups = ElasticGroups(groups, stages={"blocks": ["blocks.0", "blocks.1"]})
        set_subnet(model, Subnet({"inner": 32}, kernel_sizes={"conv1": 3}, depths={"blocks": 1}))

    Args:
        groups: the sides of layers that share their channels, as :class:`ChannelSlot` or ``(module, side[, repeat])``.
        stages: paths of residual blocks in the order in which they run, by the name of the stage; see
            :func:`jdkd.nn.as_elastic_block`.
        left_out: channel groups of the model that stay whole, by name, with the reason.

    Raises:
        InputError: on what is no side, a side that there is not, or one that is in two groups.
    """

    groups: Mapping[str, Sequence[ChannelSlot | tuple]]
    stages: Mapping[str, Sequence[str]] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, given in (("groups", self.groups), ("stages", self.stages)):
            if not isinstance(given, Mapping):
                raise InputError(f"ElasticGroups: {what}={given!r}; give a mapping from names")
        groups = {name: _sides(name, sides) for name, sides in self.groups.items()}
        object.__setattr__(self, "groups", groups)
        object.__setattr__(self, "stages", {name: _paths(name, paths) for name, paths in self.stages.items()})
        home: dict[tuple[str, str], str] = {}
        for name, sides in groups.items():
            for module, side, repeat in sides:
                if side not in SIDES or repeat < 1:
                    raise InputError(
                        f"ElasticGroups: group {name!r} has side {side!r} and repeat {repeat} of {module}; a side is "
                        f"one of {', '.join(SIDES)}, and repeat at least 1"
                    )
                if (module, side) in home:
                    raise InputError(
                        f"ElasticGroups: side {side!r} of {module} is in the groups {home[module, side]!r} and "
                        f"{name!r}; put what is coupled in one group, and name a side once"
                    )
                home[module, side] = name

    @property
    def slots(self) -> Mapping[str, Sequence[ChannelSlot]]:
        """The sides of every group, as they were read."""
        return cast(Mapping[str, Sequence[ChannelSlot]], self.groups)

    def sizes(self, modules: Mapping[str, nn.Module]) -> dict[str, int]:
        """Channels of every group in a model.

        Args:
            modules: of the model, by path.

        Raises:
            InputError: if the model has no such layers, or those of a group disagree; names group, layers and sizes.
        """
        sizes = {}
        for name, sides in self.slots.items():
            counts = [_channels_of(modules, name, side) for side in sides]
            if not counts:
                raise InputError(f"ElasticGroups: group {name!r} is empty; name the layers that share its channels")
            for side, count in zip(sides, counts, strict=True):
                if count != counts[0]:
                    raise InputError(
                        f"ElasticGroups: group {name!r} has {counts[0]} channels at {sides[0].module} "
                        f"({sides[0].side}) and {count} at {side.module} ({side.side}); couple sides of one size"
                    )
            sizes[name] = counts[0]
        return sizes

    def read_depths(self, modules: Mapping[str, nn.Module], depths: Mapping[str, int]) -> dict[ElasticBlock, tuple]:
        """Reads how many blocks of every stage are to run.

        Args:
            modules: of the model, by path.
            depths: of some of them; the others run as a whole.

        Returns:
            The blocks, each with its part.

        Raises:
            InputError: if there is no such stage, it has fewer blocks, or they cannot be switched off.
        """
        for unknown in depths.keys() - self.stages.keys():
            raise InputError(
                f"set_subnet: the subnet has a depth for the stage {unknown!r} and the model declares "
                f"{', '.join(self.stages) or 'none'}; name one of those"
            )
        parts: dict[ElasticBlock, tuple] = {}
        for name, paths in self.stages.items():
            depth = depths.get(name, len(paths))
            if not 1 <= depth <= len(paths):
                raise InputError(
                    f"set_subnet: depth of stage {name!r}={depth} of {len(paths)} blocks; give a number from 1 to "
                    f"{len(paths)}"
                )
            for number, path in enumerate(paths):
                block = _module(modules, path, f"stage {name!r}")
                if not isinstance(block, ElasticBlock):
                    raise InputError(
                        f"ElasticGroups: stage {name!r} holds {path}, a plain {type(block).__name__}; make it elastic "
                        "with jdkd.nn.as_elastic_block"
                    )
                parts[block] = block.part(number < depth)
        return parts


def _sides(group: str, given: Any) -> tuple[ChannelSlot, ...]:
    """Reads the sides of one group."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise InputError(f"ElasticGroups: group {group!r} is {given!r}; give a list of pairs (module, side)")
    sides = []
    for side in given:
        if not isinstance(side, tuple | list) or len(side) not in (2, 3):
            raise InputError(
                f"ElasticGroups: group {group!r} holds {side!r}; give pairs (module, side), such as ('conv1', 'out'), "
                "or triples (module, side, repeat)"
            )
        slot = ChannelSlot(*side)
        if (repeat := integer(slot.repeat)) is None:
            raise InputError(
                f"ElasticGroups: group {group!r} has repeat {slot.repeat!r} of {slot.module}; give an int, the "
                "features of one channel"
            )
        sides.append(slot._replace(repeat=repeat))
    return tuple(sides)


def _paths(stage: str, given: Any) -> tuple[str, ...]:
    """Reads the blocks of one stage."""
    if isinstance(given, str) or not isinstance(given, Iterable) or not all(isinstance(path, str) for path in given):
        raise InputError(f"ElasticGroups: stage {stage!r} is {given!r}; give a list of the paths of its blocks")
    return tuple(given)


def repeated(channels: Channels, times: int) -> Channels:
    """Returns: the features of active channels, where each channel has ``times`` consecutive ones."""
    if times == 1 or channels.index is None:
        return Channels(channels.count * times, channels.index)
    index = channels.index[:, None] * times + torch.arange(times, device=channels.index.device)
    return Channels(channels.count * times, index.flatten())


def _module(modules: Mapping[str, nn.Module], path: str, where: str) -> nn.Module:
    try:
        return modules[path]
    except KeyError:
        raise InputError(
            f"ElasticGroups: {where} names the module {path!r}, which {type(modules['']).__name__} does not have; give "
            "paths as model.named_modules() does"
        ) from None


def _channels_of(modules: Mapping[str, nn.Module], group: str, side: ChannelSlot) -> int:
    """Channels at one side of a layer."""
    where = f"group {group!r}"
    layer = _module(modules, side.module, where)
    features = _features(layer)[SIDES.index(side.side)]
    if features is None:
        raise InputError(
            f"ElasticGroups: {where} names side {side.side!r} of {side.module}, a {type(layer).__name__}, which has no "
            "such channels; name convolutions, linear layers and the 'out' of batch normalisations"
        )
    if features % side.repeat:
        raise InputError(
            f"ElasticGroups: {where} counts {side.repeat} features a channel at {side.module} ({side.side}), which has "
            f"{features}; give a divisor"
        )
    return features // side.repeat


def _features(layer: nn.Module) -> tuple[int | None, int | None]:
    """Features that a layer reads and makes, by its attributes: the weight may be computed when it is asked for."""
    if isinstance(layer, _ConvNd):
        return layer.in_channels, layer.out_channels
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, _BatchNorm):
        return None, layer.num_features
    if isinstance(layer, nn.GroupNorm):
        return None, layer.num_channels
    kinds = layer._parameters, layer._buffers
    tensors = (kind.get(name) for name in ("weight", "running_mean") for kind in kinds)
    tensor = next((tensor for tensor in tensors if tensor is not None), None)
    if tensor is None:
        return None, None
    return None if tensor.dim() == 1 else tensor.shape[1] * getattr(layer, "groups", 1), tensor.shape[0]
