"""Convolutions that all levels of a pyramid share, as the heads of RPN, RetinaNet and FCOS have them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jdkd.errors import InputError
from jdkd.nn.elastic import filled, part_of
from jdkd.nn.elastic_conv import ElasticConv2d, _TracedConvolution
from jdkd.nn.packed_weight import packed_bias
from jdkd.nn.symbolic import Proxy, as_node
from jdkd.ops.active_channels import Channels
from jdkd.ops.elastic_levels import convolve_levels
from jdkd.ops.elastic_levels_kernels import ACTIVATIONS

Levels = Tensor | Iterable[Tensor] | Mapping


def listed(levels: Levels) -> list[Tensor]:
    """The levels without their names."""
    if isinstance(levels, Tensor):
        return [levels]
    return list(levels.values() if isinstance(levels, Mapping) else levels)


def _each(levels: Levels, convolve: Callable[[list[Tensor]], list[Tensor]]) -> Tensor | list[Tensor] | dict:
    """Hands all levels over at once, and returns the results as the levels were given."""
    ys = convolve(listed(levels))
    if isinstance(levels, Tensor):
        return ys[0]
    return dict(zip(levels, ys, strict=True)) if isinstance(levels, Mapping) else ys


def _proxy(levels: Levels) -> Proxy | None:
    """What stands for a level while ``torch.fx`` traces."""
    if isinstance(levels, Proxy):
        return levels
    entries = listed(levels) if isinstance(levels, Mapping | Sequence) else ()  # an iterator could be read but once
    return next((level for level in entries if isinstance(level, Proxy)), None)


def _checked(activation: str) -> str:
    if activation not in ACTIVATIONS:
        raise InputError(f"activation={activation!r}; choose one of {', '.join(ACTIVATIONS)}")
    return activation


class LevelsConv2d(nn.Conv2d):
    """``nn.Conv2d`` with its state dict, that runs on every level it is given.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            for ``nn.Conv2d``.
        activation: ``"none"`` or ``"relu"``, applied to the result.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "none",
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self.activation = _checked(activation)

    def forward(self, levels: Levels) -> Tensor | list[Tensor] | dict:
        """Args and Returns: as :class:`ElasticLevelsConv2d`."""
        if (proxy := _proxy(levels)) is not None:
            return as_node(self, proxy, levels)
        return _each(levels, lambda xs: [self._convolved(x) for x in xs])

    def __prepare_scriptable__(self) -> Any:  # what torch.jit.script asks for
        raise InputError(
            f"torch.jit.script cannot compile {type(self).__name__}, which takes one level, a list or a dict; use "
            "torch.jit.trace or torch.export"
        )

    def _convolved(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return F.relu(y) if self.activation == "relu" else y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class ElasticLevelsConv2d(ElasticConv2d):
    """See :func:`jdkd.functional.elastic_conv2d_levels`; an :class:`ElasticConv2d` shared by the levels of a pyramid.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype,
            kernel_transform: as for :class:`ElasticConv2d`; stride and dilation 1, one group, padding with zeros.
        activation: ``"none"`` or ``"relu"``, applied to the result.

    Raises:
        InputError: on other strides, dilations, groups, paddings or activations.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        kernel_transform: bool = False,
        activation: str = "none",
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,
            device, dtype, kernel_transform=kernel_transform,
        )  # fmt: skip
        self.activation = _checked(activation)
        window = {"stride": self.stride, "dilation": self.dilation, "groups": self.groups}
        if window != {"stride": (1, 1), "dilation": (1, 1), "groups": 1} or self.padding_mode != "zeros":
            raise InputError(
                f"ElasticLevelsConv2d: stride={self.stride}, dilation={self.dilation}, groups={self.groups}, "
                f"padding_mode={self.padding_mode!r}; leave them as they are by default, or use an ElasticConv2d"
            )

    def forward(self, levels: Levels) -> Tensor | list[Tensor] | dict:
        """Convolves every level.

        Args:
            levels: ``[N, Cin, H, W]`` each: a sequence, a mapping from names, or a single one.

        Returns:
            ``[N, Cout, OH, OW]`` each: a list, a dict of the same names, or a single one.
        """
        if (proxy := _proxy(levels)) is not None:
            return as_node(self, proxy, levels)
        return _each(levels, self._convolved)

    def _convolved(self, xs: list[Tensor]) -> list[Tensor]:
        active = self._now()
        if isinstance(active, _TracedConvolution):
            ys = [self._forward_traced(x, active) for x in xs]
            return [F.relu(y) for y in ys] if self.activation == "relu" else ys
        weight, bias, inputs, outputs, kernel = self.weight, self.bias, active.inputs, active.outputs, active.kernel
        packed = self._packed_weight()
        if packed is not None:
            weight, bias = packed, packed_bias(bias, outputs, packed.dtype)
        elif self._is_transformed(active):
            weight, bias = self._shared_filters(active), part_of(bias, outputs)
        if weight is not self.weight:
            inputs, outputs, kernel = Channels(inputs.count), Channels(outputs.count), None
        return convolve_levels(xs, weight, bias, inputs, outputs, active.padding, kernel, self.activation)

    def export(self) -> LevelsConv2d:
        """Returns: a plain convolution of levels with a copy of what is active, equal in output."""
        active = self._record.active
        plain = LevelsConv2d(
            active.inputs.count, active.outputs.count, self.active_kernel_size, padding=active.padding,
            bias=self.bias is not None, device="meta", activation=self.activation,
        )  # fmt: skip
        return filled(plain, self, weight=self._shared_filters(active), bias=part_of(self.bias, active.outputs))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"
