"""The elastic convolution: torch's own, of which a forward uses only what is active."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jdkd.errors import InputError
from jdkd.nn.elastic import active_over_all, filled, part_of
from jdkd.nn.packed_weight import ElasticWeight, packed_bias
from jdkd.nn.symbolic import Proxy, as_node
from jdkd.ops.active_channels import Channels, ChannelsLike, Kernel, active_part
from jdkd.ops.elastic_conv import check_channels, conv_channels, convolve
from jdkd.ops.elastic_conv_traced import convolve_traced, runtime_args, transformed_traced
from jdkd.ops.elastic_kernels import ConvCall, call_of
from jdkd.ops.kernel_size import (
    KernelLike,
    Padding,
    active_kernel,
    active_padding,
    pair,
    transform_sizes,
    transformed,
)
from jdkd.ops.onednn_workaround import conv2d
from jdkd.ops.pack import Part


class _Convolution(NamedTuple):
    """The active part of a convolution."""

    inputs: Channels
    outputs: Channels
    groups: int
    kernel: Kernel
    padding: Padding
    border: tuple[int, ...] | None  # left, right, above, below, in pixels, where padding is not of zeros


class _TracedConvolution(NamedTuple):
    """The same for a compiler, see :mod:`jdkd.ops.elastic_conv_traced`."""

    in_index: Tensor  # [Cin]
    out_index: Tensor  # [Cout]
    runtime_args: Tensor  # [4]
    step: Tensor | None  # [1], of the kernel transform


class ElasticConv2d(ElasticWeight, nn.Conv2d):
    """See :func:`jdkd.functional.elastic_conv2d`; built as ``nn.Conv2d``, with its state dict.

    Kernel transforms are further keys: where there are any, a plain state dict loads with ``strict=False``, and leaves
    them as they are.

    ``active_in_channels``, ``active_out_channels`` and ``active_kernel_size`` say what is active now.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            for ``nn.Conv2d``.
        kernel_transform: learn a matrix for every step from a kernel size to the next smaller one, ``transform_5to3``
            and so on, shared by all channels and the identity at birth (Cai et al., Once-for-All, ICLR 2020, section
            3.2). Filters are transformed at every forward, and ATen convolves with them.
    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    kernel_transform = False  # of a plain layer that was made elastic

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
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        kernel_transform: bool = False,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        if kernel_transform:
            self.kernel_transform = True
            self._add_transforms()
        self.set_active()

    def _add_transforms(self) -> None:
        if self.kernel_size[0] != self.kernel_size[1]:
            raise InputError(
                f"kernel_transform needs a square kernel and kernel_size={self.kernel_size}; give a square one, or "
                "leave the transform out"
            )
        for larger, smaller in transform_sizes(self.kernel_size[0]):
            eye = torch.eye(smaller**2, dtype=self.weight.dtype, device=self.weight.device)  # [k' k', k' k']
            self.register_parameter(f"transform_{larger}to{smaller}", nn.Parameter(eye))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if getattr(self, "kernel_transform", False):  # nn.Conv2d calls this before there are any
            for matrix in self._transforms().values():
                nn.init.eye_(matrix)

    def set_active(
        self, in_channels: ChannelsLike = None, out_channels: ChannelsLike = None, kernel_size: KernelLike = None
    ) -> None:
        """Chooses what the next forwards use; no weight is copied, no device synchronisation.

        Args:
            in_channels: None (all), the number of leading channels, or distinct indices in the order of the
                input.
            out_channels: likewise. Of a grouped convolution one of the two may be left out: it follows the
                other.
            kernel_size: None (all), or the centre of the kernel, in taps: one number or two, of the same parity. The
                padding shrinks with it, so that outputs stay in place.

        Raises:
            InputError: if the supernet has no such channels or taps; the active ones stay as they were.
        """
        self._activate(in_channels, out_channels, kernel_size)

    def part(
        self, in_channels: ChannelsLike = None, out_channels: ChannelsLike = None, kernel_size: KernelLike = None
    ) -> _Convolution:
        """Reads what :meth:`set_active` is given, and activates nothing."""
        shape = self.out_channels, self.in_channels // self.groups  # a weight may be computed when it is asked for
        inputs, outputs, groups = conv_channels(shape, self.groups, in_channels, out_channels)
        kernel = active_kernel(kernel_size, self.kernel_size)
        if self.kernel_transform and kernel is not None and kernel[0] != kernel[1]:
            raise InputError(
                f"kernel_size={kernel_size!r} is not square, as the kernel transform needs; give one number"
            )
        padding = active_padding(kernel, self.kernel_size, self.padding, self.dilation)
        border = None if self.padding_mode == "zeros" else self._border(kernel)
        return _Convolution(inputs, outputs, groups, kernel, padding, border)

    def _border(self, kernel: Kernel) -> tuple[int, ...]:
        less = [
            d * (full - k) // 2
            for d, full, k in zip(self.dilation, self.kernel_size, kernel or self.kernel_size, strict=True)
        ]
        return tuple(whole - less[1 - i // 2] for i, whole in enumerate(self._reversed_padding_repeated_twice))

    @property
    def active_kernel_size(self) -> tuple[int, int]:
        return self._record.active.kernel or pair(self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return as_node(self, x, x)
        active = self._now()
        if isinstance(active, _TracedConvolution):
            return self._forward_traced(x, active)
        check_channels(x, active.inputs.count, dim=-3, where=type(self).__name__)
        x, padding = self._padded(x, active)
        if self._is_transformed(active):
            bias = part_of(self.bias, active.outputs)
            return conv2d(x, self._filters(active), bias, self.stride, padding, self.dilation, active.groups)
        weight, bias, inputs, outputs, kernel = self.weight, self.bias, active.inputs, active.outputs, active.kernel
        if (packed := self._packed_weight()) is not None:
            weight, bias = packed, packed_bias(bias, outputs, packed.dtype)
            inputs, outputs, kernel = Channels(inputs.count), Channels(outputs.count), None
        return convolve(x, weight, bias, inputs, outputs, self.stride, padding, self.dilation, active.groups, kernel)

    def _weight_part(self) -> Part | None:
        active = self._record.active
        if self._is_transformed(active):
            return None
        return Part(active.outputs, active.inputs if self.groups == 1 else None, active.kernel)

    def _padded(self, x: Tensor, active: _Convolution) -> tuple[Tensor, Padding]:
        """The image, and the zeros that are still to be put around it."""
        if active.border is None:
            return x, active.padding
        return F.pad(x, active.border, mode=self.padding_mode), 0

    def _is_transformed(self, active: _Convolution) -> bool:
        return self.kernel_transform and active.kernel is not None

    def _call(self, x: Tensor, active: _Convolution) -> ConvCall:
        """What the path of a forward depends on; nothing is computed."""
        image, padding = x, active.padding
        if active.border is not None:
            image, padding = self._padded(torch.empty_like(x, device="meta"), active)
        inputs, outputs = active.inputs, active.outputs
        if self._packed_weight() is not None:
            inputs, outputs = Channels(inputs.count), Channels(outputs.count)
        call = call_of(image, inputs, outputs, active.kernel or self.kernel_size, self.stride, padding, self.dilation,
                       active.groups)  # fmt: skip
        return call._replace(product=call.product._replace(device=x.device))

    def _filters(self, active: _Convolution) -> Tensor:
        """Returns: the active filters, ``[Cout, Cin / groups, kh, kw]``; packed ones if there are."""
        packed = self._packed_weight()
        return self._shared_filters(active) if packed is None else packed

    def _shared_filters(self, active: _Convolution) -> Tensor:
        columns = active.inputs if self.groups == 1 else None
        if not self.kernel_transform or active.kernel is None:
            return active_part(self.weight, active.outputs, columns, active.kernel)
        return transformed(active_part(self.weight, active.outputs, columns), active.kernel, self._transforms())

    def _traced(self, active: _Convolution) -> _TracedConvolution:
        index = self._traced_index(active.inputs), self._traced_index(active.outputs)
        step = None
        if self.kernel_transform:
            size = (active.kernel or self.kernel_size)[0]
            step = torch.tensor([(self.kernel_size[0] - size) // 2], device=self.weight.device)
        args = runtime_args(active.inputs, active.outputs, active.kernel, self.weight)
        return _TracedConvolution(*index, args, step)

    def _in_graph(self, traced: _TracedConvolution) -> _TracedConvolution:
        return traced

    def _forward_traced(self, x: Tensor, active: _TracedConvolution) -> Tensor:
        check_channels(x, active.in_index.shape[0], dim=-3, where=type(self).__name__)
        weight: Tensor = self.weight
        padding: Padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._border(None), mode=self.padding_mode), 0
        if active.step is not None:
            weight = transformed_traced(weight, active.step, self._transforms())
        return convolve_traced(x, weight, self.bias, *active[:3], self.stride, padding, self.dilation, self.groups)

    def _transforms(self) -> Mapping[tuple[int, int], Tensor]:
        steps = transform_sizes(self.kernel_size[0])
        return {(larger, smaller): getattr(self, f"transform_{larger}to{smaller}") for larger, smaller in steps}

    def export(self) -> nn.Conv2d:
        """Returns: a plain convolution with a copy of what is active, equal in output."""
        active = self._record.active
        plain = nn.Conv2d(
            active.inputs.count, active.outputs.count, self.active_kernel_size, self.stride, active.padding,
            self.dilation, active.groups, self.bias is not None, self.padding_mode, device="meta",
        )  # fmt: skip
        return filled(plain, self, weight=self._shared_filters(active), bias=part_of(self.bias, active.outputs))

    def extra_repr(self) -> str:
        kernel = (
            ""
            if self._record.active.kernel is None
            else "{}x{}/{}x{} taps, ".format(*self.active_kernel_size, *self.kernel_size)
        )
        transform = ", kernel_transform=True" if self.kernel_transform else ""
        return active_over_all(self, self.in_channels, self.out_channels) + kernel + super().extra_repr() + transform
