"""Elastic forms of the norms that keep no running statistics: frozen batch norm and group norm."""

from __future__ import annotations

from typing import Any, NamedTuple, SupportsIndex

import torch.nn.functional as F
from torch import Tensor, nn

from jdkd.errors import InputError
from jdkd.nn.elastic import Elastic, filled, part_of
from jdkd.nn.symbolic import Proxy, as_node
from jdkd.ops.active_channels import Channels, ChannelsLike, active_channels
from jdkd.ops.elastic_conv import check_channels


class _Norm(NamedTuple):
    """The active part of a norm."""

    channels: Channels


class ElasticNorm(Elastic):
    """A norm of the active channels, built as its plain layer, with its state dict."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.set_active()

    def set_active(self, channels: ChannelsLike = None) -> None:
        """Chooses the channels that the next forwards normalise; no device synchronisation.

        Args:
            channels: None (all), the number of leading channels, or distinct indices in the order of the input.

        Raises:
            InputError: if the supernet has no such channels; the active ones stay as they were.
        """
        self._activate(channels)

    def part(self, channels: ChannelsLike = None) -> _Norm:
        """Reads what :meth:`set_active` is given, and activates nothing."""
        return _Norm(active_channels(channels, self._size, "channels"))

    @property
    def _size(self) -> int:
        raise NotImplementedError

    @property
    def active_channels(self) -> int:
        return self._record.active.channels.count

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return as_node(self, x, x)
        active = self._now().channels
        check_channels(x, active.count, dim=1, where=type(self).__name__)
        if active.index is None and active.count == self._size:
            return super().forward(x)
        return self._normalised(x, active)

    def _normalised(self, x: Tensor, active: Channels) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"active={self.active_channels}/{self._size}, {super().extra_repr()}"


class ElasticGroupNorm(ElasticNorm, nn.GroupNorm):
    """Group normalisation of the active channels, whole norm groups; built as ``nn.GroupNorm``, with its state dict."""

    @property
    def _size(self) -> int:
        return self.num_channels

    def part(self, channels: ChannelsLike = None) -> _Norm:
        """Reads what :meth:`set_active` is given, and activates nothing."""
        part, each = super().part(channels), self.num_channels // self.num_groups
        count, index = part.channels
        if count % each:
            raise InputError(
                f"channels={count} cuts through a norm group of {each} channels (num_groups={self.num_groups}); give "
                f"a multiple of {each}"
            )
        if index is not None and each > 1 and not _are_runs(index, each):
            raise InputError(
                f"channels is a list that is not of whole norm groups of {each} channels; list all channels of a group "
                "together, in order"
            )
        return part

    def _normalised(self, x: Tensor, active: Channels) -> Tensor:
        groups = active.count * self.num_groups // self.num_channels
        return F.group_norm(x, groups, part_of(self.weight, active), part_of(self.bias, active), self.eps)

    def export(self) -> nn.GroupNorm:
        """Returns: a plain group normalisation with a copy of the active channels, equal in output."""
        active = self._record.active.channels
        groups = active.count * self.num_groups // self.num_channels
        plain = nn.GroupNorm(groups, active.count, self.eps, self.affine, device="meta")
        return filled(plain, self, weight=part_of(self.weight, active), bias=part_of(self.bias, active))


def _are_runs(index: Tensor, length: int) -> bool:
    """Whether channels ``[count]`` are whole runs of ``length``; on a device nobody looks."""
    if index.device.type != "cpu":
        return True
    runs = index.reshape(-1, length)
    return bool((runs[:, :1] % length == 0).all() and (runs.diff(dim=1) == 1).all())


class ElasticFrozenBatchNorm2d(ElasticNorm):
    """A batch normalisation whose statistics and affine parameters are buffers; mixed into torchvision's own class."""

    plain: type[nn.Module]
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    eps: float

    @property
    def _size(self) -> int:
        return self.running_mean.shape[0]

    def _normalised(self, x: Tensor, active: Channels) -> Tensor:  # the formula of torchvision's, in its order
        weight, bias, mean, variance = (
            part_of(vector, active)[:, None, None]
            for vector in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = weight * (variance + self.eps).rsqrt()
        return x * scale + (bias - mean * scale)

    def export(self) -> nn.Module:
        """Returns: a plain frozen batch normalisation with a copy of the active channels, equal in output."""
        active = self._record.active.channels
        names = ("weight", "bias", "running_mean", "running_var")
        return filled(self.plain(active.count, self.eps), self, **{n: part_of(getattr(self, n), active) for n in names})

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return _blank, (self.plain,), self.__getstate__()


_made: dict[type[nn.Module], type[ElasticFrozenBatchNorm2d]] = {}


def frozen_class(plain: type[nn.Module]) -> type[ElasticFrozenBatchNorm2d]:
    """The elastic subclass of torchvision's frozen batch normalisation, which is not imported before it is there."""
    if plain not in _made:
        _made[plain] = type(f"Elastic{plain.__name__}", (ElasticFrozenBatchNorm2d, plain), {"plain": plain})
    return _made[plain]


def _blank(plain: type[nn.Module]) -> nn.Module:
    made = frozen_class(plain)
    return made.__new__(made)
