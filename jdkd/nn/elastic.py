"""Layers of a supernet: torch's own, of which a forward uses only the active channels."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jdkd.errors import InputError
from jdkd.ops.active_channels import Channels, ChannelsLike, active_channels, active_part, on_device
from jdkd.ops.elastic_conv import check_channels, conv_channels, convolve

_Plain = TypeVar("_Plain", bound=nn.Module)


class _Elastic(nn.Module):
    """What elastic layers share: sets of active channels, each a count on the host and perhaps an index list.

    A list is a non-persistent buffer: it moves with the module and stays out of its state dict.
    """

    def _activate(self, name: str, channels: Channels) -> None:
        tensors = (*self._parameters.values(), *self._buffers.values())
        home = next((tensor.device for tensor in tensors if tensor is not None), None)
        index = channels.index if home is None else on_device(channels.index, home)
        setattr(self, f"active_{name}", channels.count)
        self.register_buffer(f"{name}_index", index, persistent=False)

    def _active(self, name: str) -> Channels:
        return Channels(getattr(self, f"active_{name}"), getattr(self, f"{name}_index"))

    def _explained(self, error: InputError) -> InputError:
        return InputError(f"{type(self).__name__}.set_active: {error}")


class ElasticConv2d(_Elastic, nn.Conv2d):
    """See :func:`jdkd.functional.elastic_conv2d`; built as ``nn.Conv2d``, with its state dict.

    ``active_in_channels`` and ``active_out_channels`` say how many are active now.
    """

    active_in_channels: int
    active_out_channels: int

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.set_active()

    def set_active(self, in_channels: ChannelsLike = None, out_channels: ChannelsLike = None) -> None:
        """Chooses the channels that the next forwards use; no weight is copied and the host does not wait.

        Args:
            in_channels: None (all), the number of leading channels, or distinct indices in the order of the
                input.
            out_channels: likewise. Of a grouped convolution one of the two may be left out: it follows the
                other.

        Raises:
            InputError: if the supernet has no such channels; the active ones stay as they were.
        """
        try:
            inputs, outputs, groups = conv_channels(self.weight, self.groups, in_channels, out_channels)
        except InputError as error:
            raise self._explained(error) from None
        self.active_groups = groups
        self._activate("in_channels", inputs)
        self._activate("out_channels", outputs)

    def forward(self, x: Tensor) -> Tensor:
        inputs, outputs = self._active("in_channels"), self._active("out_channels")
        check_channels(x, inputs.count, dim=-3, where=type(self).__name__)
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        return convolve(
            x,
            self.weight,
            self.bias,
            inputs,
            outputs,
            self.stride,
            padding,
            self.dilation,
            self.active_groups,
        )

    def export(self) -> nn.Conv2d:
        """Returns: a plain convolution with a copy of the active channels, equal in output."""
        inputs, outputs = self._active("in_channels"), self._active("out_channels")
        plain = nn.Conv2d(
            inputs.count, outputs.count, self.kernel_size, self.stride, self.padding, self.dilation,
            self.active_groups, self.bias is not None, self.padding_mode, device="meta",
        )  # fmt: skip
        columns = inputs if self.active_groups == 1 else None
        weight = active_part(self.weight, outputs, columns)  # [Cout, Cin / groups, kh, kw]
        return _filled(plain, self, weight=weight, bias=_part(self.bias, outputs))

    def extra_repr(self) -> str:
        return _active_over_all(self, self.in_channels, self.out_channels) + super().extra_repr()


class ElasticLinear(_Elastic, nn.Linear):
    """A linear layer over active features; built as ``nn.Linear``, with its state dict.

    ``active_in_channels`` and ``active_out_channels`` say how many are active now.
    """

    active_in_channels: int
    active_out_channels: int

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
            inputs = active_channels(in_channels, self.in_features, "in_channels")
            outputs = active_channels(out_channels, self.out_features, "out_channels")
        except InputError as error:
            raise self._explained(error) from None
        self._activate("in_channels", inputs)
        self._activate("out_channels", outputs)

    def forward(self, x: Tensor) -> Tensor:
        inputs, outputs = self._active("in_channels"), self._active("out_channels")
        check_channels(x, inputs.count, dim=-1, where=type(self).__name__)
        weight = active_part(self.weight, outputs, inputs)  # [out, in]
        return F.linear(x, weight, _part(self.bias, outputs))

    def export(self) -> nn.Linear:
        """Returns: a plain linear layer with a copy of the active features, equal in output."""
        inputs, outputs = self._active("in_channels"), self._active("out_channels")
        plain = nn.Linear(inputs.count, outputs.count, self.bias is not None, device="meta")
        weight = active_part(self.weight, outputs, inputs)  # [out, in]
        return _filled(plain, self, weight=weight, bias=_part(self.bias, outputs))

    def extra_repr(self) -> str:
        return _active_over_all(self, self.in_features, self.out_features) + super().extra_repr()


class ElasticBatchNorm2d(_Elastic, nn.BatchNorm2d):
    """Batch normalisation of the active channels; built as ``nn.BatchNorm2d``, with its state dict.

    Training updates the running statistics of the active channels in place and leaves the others alone. All
    subnets share them, and another width upstream means other activations: recalibrate
    (``jdkd.train.calibrate.calibrate_bn``) before a subnet is scored or exported. ``momentum=None`` averages
    over every batch that the layer saw, whichever subnet was active. ``active_channels`` says how many are
    active now.
    """

    active_channels: int

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
            self._activate("channels", active_channels(channels, self.num_features, "channels"))
        except InputError as error:
            raise self._explained(error) from None

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        active = self._active("channels")
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
        active = self._active("channels")
        plain = nn.BatchNorm2d(
            active.count, self.eps, self.momentum, self.affine, self.track_running_stats, device="meta"
        )
        names = ("weight", "bias", "running_mean", "running_var")
        parts = {name: _part(getattr(self, name), active) for name in names}
        return _filled(plain, self, **parts, num_batches_tracked=self.num_batches_tracked)

    def extra_repr(self) -> str:
        return f"active={self.active_channels}/{self.num_features}, {super().extra_repr()}"


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
