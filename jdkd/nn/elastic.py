"""Layers of a supernet: torch's own, of which a forward uses only what is active."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jdkd.errors import InputError
from jdkd.nn.recomputation import Elastic
from jdkd.ops.active_channels import Channels, ChannelsLike, Kernel, active_channels, active_part, on_device
from jdkd.ops.elastic_conv import check_channels, conv_channels, convolve
from jdkd.ops.kernel_size import (
    KernelLike,
    Padding,
    active_kernel,
    active_padding,
    pair,
    transform_sizes,
    transformed,
)

_Plain = TypeVar("_Plain", bound=nn.Module)


class _Convolution(NamedTuple):
    """The active part of a convolution."""

    inputs: Channels
    outputs: Channels
    groups: int
    kernel: Kernel
    padding: Padding
    border: tuple[int, ...] | None  # left, right, above, below, in pixels, where padding is not of zeros


class ElasticConv2d(Elastic, nn.Conv2d):
    """See :func:`jdkd.functional.elastic_conv2d`; built as ``nn.Conv2d``, with its state dict.

    ``active_in_channels``, ``active_out_channels`` and ``active_kernel_size`` say what is active now.

    Args:
        args, kwargs: as for ``nn.Conv2d``.
        kernel_transform: learn a matrix for every step from a kernel size to the next smaller one, ``transform_5to3``
            and so on, shared by all channels and the identity at birth (Cai et al., Once-for-All, ICLR 2020, section
            3.2). They are in the state dict. Filters are transformed at every forward, and ATen convolves with them.
    """

    def __init__(self, *args, kernel_transform: bool = False, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.kernel_transform = kernel_transform
        if kernel_transform:
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

    def set_active(
        self, in_channels: ChannelsLike = None, out_channels: ChannelsLike = None, kernel_size: KernelLike = None
    ) -> None:
        """Chooses what the next forwards use; no weight is copied and the host does not wait.

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
        try:
            part = self.part(in_channels, out_channels, kernel_size)
        except InputError as error:
            raise _explained(self, error) from None
        self._put(part)

    def part(
        self, in_channels: ChannelsLike = None, out_channels: ChannelsLike = None, kernel_size: KernelLike = None
    ) -> _Convolution:
        """Reads what :meth:`set_active` is given, and activates nothing."""
        inputs, outputs, groups = conv_channels(self.weight, self.groups, in_channels, out_channels)
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
    def active_in_channels(self) -> int:
        return self._record.active.inputs.count

    @property
    def active_out_channels(self) -> int:
        return self._record.active.outputs.count

    @property
    def active_kernel_size(self) -> tuple[int, int]:
        return self._record.active.kernel or pair(self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        active = self._now()
        check_channels(x, active.inputs.count, dim=-3, where=type(self).__name__)
        x, padding = self._padded(x, active)
        if self._is_transformed(active):
            return F.conv2d(x, self._filters(active), _part(self.bias, active.outputs), self.stride, padding,
                            self.dilation, active.groups)  # fmt: skip
        return convolve(
            x,
            self.weight,
            self.bias,
            active.inputs,
            active.outputs,
            self.stride,
            padding,
            self.dilation,
            active.groups,
            active.kernel,
        )

    def _padded(self, x: Tensor, active: _Convolution) -> tuple[Tensor, Padding]:
        """The image, and the zeros that are still to be put around it."""
        if active.border is None:
            return x, active.padding
        return F.pad(x, active.border, mode=self.padding_mode), 0

    def _is_transformed(self, active: _Convolution) -> bool:
        return self.kernel_transform and active.kernel is not None

    def _filters(self, active: _Convolution) -> Tensor:
        """Returns: the active filters, ``[Cout, Cin / groups, kh, kw]``."""
        columns = active.inputs if self.groups == 1 else None
        if not self._is_transformed(active):
            return active_part(self.weight, active.outputs, columns, active.kernel)
        return transformed(active_part(self.weight, active.outputs, columns), active.kernel, self._transforms())

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
        return _filled(plain, self, weight=self._filters(active), bias=_part(self.bias, active.outputs))

    def extra_repr(self) -> str:
        kernel = (
            ""
            if self._record.active.kernel is None
            else "{}x{}/{}x{} taps, ".format(*self.active_kernel_size, *self.kernel_size)
        )
        transform = ", kernel_transform=True" if self.kernel_transform else ""
        return _active_over_all(self, self.in_channels, self.out_channels) + kernel + super().extra_repr() + transform


class _Features(NamedTuple):
    """The active part of a linear layer."""

    inputs: Channels
    outputs: Channels


class ElasticLinear(Elastic, nn.Linear):
    """A linear layer over active features; built as ``nn.Linear``, with its state dict.

    ``active_in_channels`` and ``active_out_channels`` say how many are active now.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.set_active()

    def set_active(self, in_channels: ChannelsLike = None, out_channels: ChannelsLike = None) -> None:
        """Chooses the features that the next forwards use; no weight is copied and the host does not wait.

        Args:
            in_channels: input features: None (all), the number of leading ones, or distinct indices.
            out_channels: output features, likewise.

        Raises:
            InputError: if the supernet has no such features; the active ones stay as they were.
        """
        try:
            part = self.part(in_channels, out_channels)
        except InputError as error:
            raise _explained(self, error) from None
        self._put(part)

    def part(self, in_channels: ChannelsLike = None, out_channels: ChannelsLike = None) -> _Features:
        """Reads what :meth:`set_active` is given, and activates nothing."""
        return _Features(
            active_channels(in_channels, self.in_features, "in_channels"),
            active_channels(out_channels, self.out_features, "out_channels"),
        )

    @property
    def active_in_channels(self) -> int:
        return self._record.active.inputs.count

    @property
    def active_out_channels(self) -> int:
        return self._record.active.outputs.count

    def forward(self, x: Tensor) -> Tensor:
        inputs, outputs = self._now()
        check_channels(x, inputs.count, dim=-1, where=type(self).__name__)
        weight = active_part(self.weight, outputs, inputs)  # [out, in]
        return F.linear(x, weight, _part(self.bias, outputs))

    def export(self) -> nn.Linear:
        """Returns: a plain linear layer with a copy of the active features, equal in output."""
        inputs, outputs = self._record.active
        plain = nn.Linear(inputs.count, outputs.count, self.bias is not None, device="meta")
        weight = active_part(self.weight, outputs, inputs)  # [out, in]
        return _filled(plain, self, weight=weight, bias=_part(self.bias, outputs))

    def extra_repr(self) -> str:
        return _active_over_all(self, self.in_features, self.out_features) + super().extra_repr()


class _Norm(NamedTuple):
    """The active part of a batch normalisation."""

    channels: Channels


class ElasticBatchNorm2d(Elastic, nn.BatchNorm2d):
    """Batch normalisation of the active channels; built as ``nn.BatchNorm2d``, with its state dict.

    Training updates the running statistics of the active channels in place and leaves the others alone. All
    subnets share them, and another width upstream means other activations: recalibrate
    (``jdkd.train.calibrate.calibrate_bn``) before a subnet is scored or exported. ``momentum=None`` averages
    over every batch that the layer saw, whichever subnet was active. ``active_channels`` says how many are
    active now.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.set_active()

    def set_active(self, channels: ChannelsLike = None) -> None:
        """Chooses the channels that the next forwards normalise; the host does not wait.

        Args:
            channels: None (all), the number of leading channels, or distinct indices in the order of the
                input.

        Raises:
            InputError: if the supernet has no such channels; the active ones stay as they were.
        """
        try:
            part = self.part(channels)
        except InputError as error:
            raise _explained(self, error) from None
        self._put(part)

    def part(self, channels: ChannelsLike = None) -> _Norm:
        """Reads what :meth:`set_active` is given, and activates nothing."""
        return _Norm(active_channels(channels, self.num_features, "channels"))

    @property
    def active_channels(self) -> int:
        return self._record.active.channels.count

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        active = self._now().channels
        check_channels(x, active.count, dim=1, where=type(self).__name__)
        if active.index is None and active.count == self.num_features:
            return super().forward(x)
        weight, bias = _part(self.weight, active), _part(self.bias, active)  # [C]
        mean, variance = _part(self.running_mean, active), _part(self.running_var, active)  # [C]
        tracks = self.training and mean is not None
        if tracks:
            self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:
            momentum = 1.0 / float(self.num_batches_tracked) if tracks else 0.0
        from_batch = self.training or mean is None
        y = F.batch_norm(x, mean, variance, weight, bias, from_batch, momentum, self.eps)
        if tracks and active.index is not None:
            index = on_device(active.index, mean.device)
            # Past the version counter, as batch_norm writes: another subnet in the graph may hold a view.
            self.running_mean.data.index_copy_(0, index, mean)
            self.running_var.data.index_copy_(0, index, variance)
        return y

    def export(self) -> nn.BatchNorm2d:
        """Returns: a plain batch normalisation with a copy of the active channels, equal in output."""
        active = self._record.active.channels
        plain = nn.BatchNorm2d(
            active.count, self.eps, self.momentum, self.affine, self.track_running_stats, device="meta"
        )
        names = ("weight", "bias", "running_mean", "running_var")
        parts = {name: _part(getattr(self, name), active) for name in names}
        return _filled(plain, self, **parts, num_batches_tracked=self.num_batches_tracked)

    def extra_repr(self) -> str:
        return f"active={self.active_channels}/{self.num_features}, {super().extra_repr()}"


def _explained(layer: nn.Module, error: InputError) -> InputError:
    return InputError(f"{type(layer).__name__}.set_active: {error}")


def _part(vector: Tensor | None, channels: Channels) -> Tensor | None:
    return None if vector is None else active_part(vector, channels)


def _active_over_all(layer: ElasticConv2d | ElasticLinear, inputs: int, outputs: int) -> str:
    return f"active={layer.active_in_channels}/{inputs}->{layer.active_out_channels}/{outputs}, "


def _filled(plain: _Plain, source: nn.Module, **tensors: Tensor | None) -> _Plain:
    """Gives a layer built without memory copies of ``tensors``, and the modes of its source."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        copy = tensor.detach().clone(memory_format=torch.contiguous_format)
        if name in plain._parameters:
            copy = nn.Parameter(copy, requires_grad=getattr(source, name).requires_grad)
        setattr(plain, name, copy)
    return plain.train(source.training)
