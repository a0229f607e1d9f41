"""The elastic linear layer: torch's own, of which a forward uses only what is active."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jdkd.nn.elastic import active_over_all, filled, part_of
from jdkd.nn.packed_weight import ElasticWeight, packed_bias
from jdkd.nn.symbolic import Proxy, as_node
from jdkd.ops.active_channels import Channels, ChannelsLike, active_channels, active_part
from jdkd.ops.elastic_conv import check_channels
from jdkd.ops.pack import Part


class _Features(NamedTuple):
    """The active part of a linear layer."""

    inputs: Channels
    outputs: Channels


class ElasticLinear(ElasticWeight, nn.Linear):
    """A linear layer over active features; built as ``nn.Linear``, with its state dict.

    ``active_in_channels`` and ``active_out_channels`` say how many are active now.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.set_active()

    def set_active(self, in_channels: ChannelsLike = None, out_channels: ChannelsLike = None) -> None:
        """Chooses the features that the next forwards use; no weight is copied, no device synchronisation.

        Args:
            in_channels: input features: None (all), the number of leading ones, or distinct indices.
            out_channels: output features, likewise.

        Raises:
            InputError: if the supernet has no such features; the active ones stay as they were.
        """
        self._activate(in_channels, out_channels)

    def part(self, in_channels: ChannelsLike = None, out_channels: ChannelsLike = None) -> _Features:
        """Reads what :meth:`set_active` is given, and activates nothing."""
        return _Features(
            active_channels(in_channels, self.in_features, "in_channels"),
            active_channels(out_channels, self.out_features, "out_channels"),
        )

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return as_node(self, x, x)
        inputs, outputs = self._now()
        check_channels(x, inputs.count, dim=-1, where=type(self).__name__)
        if (packed := self._packed_weight()) is not None:
            return F.linear(x, packed, packed_bias(self.bias, outputs, packed.dtype))
        weight = active_part(self.weight, outputs, inputs)  # [out, in]
        return F.linear(x, weight, part_of(self.bias, outputs))

    def _weight_part(self) -> Part:
        inputs, outputs = self._record.active
        return Part(outputs, inputs)

    def export(self) -> nn.Linear:
        """Returns: a plain linear layer with a copy of the active features, equal in output."""
        inputs, outputs = self._record.active
        plain = nn.Linear(inputs.count, outputs.count, self.bias is not None, device="meta")
        weight = active_part(self.weight, outputs, inputs)  # [out, in]
        return filled(plain, self, weight=weight, bias=part_of(self.bias, outputs))

    def extra_repr(self) -> str:
        return active_over_all(self, self.in_features, self.out_features) + super().extra_repr()
