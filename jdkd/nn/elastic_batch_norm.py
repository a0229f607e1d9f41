"""The elastic batch normalisation: torch's own, of which a forward uses only what is active."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from jdkd.errors import InputError
from jdkd.nn.elastic import Elastic, explained, filled, part_of
from jdkd.ops.active_channels import Channels, ChannelsLike, active_channels, on_device
from jdkd.ops.elastic_conv import check_channels


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
            raise explained(self, error) from None
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
        weight, bias = part_of(self.weight, active), part_of(self.bias, active)  # [C]
        mean, variance = part_of(self.running_mean, active), part_of(self.running_var, active)  # [C]
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
        parts = {name: part_of(getattr(self, name), active) for name in names}
        return filled(plain, self, **parts, num_batches_tracked=self.num_batches_tracked)

    def extra_repr(self) -> str:
        return f"active={self.active_channels}/{self.num_features}, {super().extra_repr()}"
