"""A convolution with what follows it as one unit: batch normalisation, residual, ReLU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jdkd.errors import InputError
from jdkd.nn.elastic_batch_norm import ElasticBatchNorm2d
from jdkd.nn.elastic_conv import ElasticConv2d
from jdkd.ops.active_channels import Channels, ChannelsLike, active_part
from jdkd.ops.elastic_conv import check_channels
from jdkd.ops.kernel_size import KernelLike


class ConvBNAct(nn.Module):
    """A convolution, its batch normalisation, a residual and a ReLU, in this order: plain layers, one after another.

    Args:
        conv: any convolution.
        bn: normalises what it makes.
        relu: whether a ReLU ends the unit.
    """

    def __init__(self, conv: nn.Module, bn: nn.Module, relu: bool = True):
        super().__init__()
        self.conv, self.bn, self.relu = conv, bn, relu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Runs the unit.

        Args:
            x: ``[N, Cin, H, W]``.
            residual: ``[N, Cout, OH, OW]``, added before the ReLU; or None.

        Returns:
            ``[N, Cout, OH, OW]``.
        """
        return self._ended(self.bn(self.conv(x)), residual)

    def _ended(self, y: Tensor, residual: Tensor | None) -> Tensor:
        if residual is not None:
            y = y.add_(residual) if y.dtype == residual.dtype else y + residual
        return F.relu(y, inplace=True) if self.relu else y

    def extra_repr(self) -> str:
        return f"relu={self.relu}"


class ElasticConvBNAct(ConvBNAct):
    """See :class:`ConvBNAct`; of an elastic convolution without bias and an elastic batch normalisation.

    In training the parts run one after another. In evaluation the running statistics of the active channels are folded
    into a scale and a shift. Where the active filters have fewer numbers than the output, they take the scale, anew at
    every forward since any of these may change, and no pass over the output is left of the normalisation. Hooks of the
    parts run only where the parts do.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode: as for ``nn.Conv2d``.
        relu: whether a ReLU ends the unit.
        kernel_transform: see :class:`ElasticConv2d`.
        eps, momentum: of the normalisation.
        device, dtype: of both.
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
        padding_mode: str = "zeros",
        *,
        relu: bool = True,
        kernel_transform: bool = False,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        where = {"device": device, "dtype": dtype}
        conv = ElasticConv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, False, padding_mode,
            kernel_transform=kernel_transform, **where,
        )  # fmt: skip
        super().__init__(conv, ElasticBatchNorm2d(out_channels, eps, momentum, **where), relu)

    def set_active(
        self, in_channels: ChannelsLike = None, out_channels: ChannelsLike = None, kernel_size: KernelLike = None
    ) -> None:
        """Chooses what the next forwards use; see :meth:`ElasticConv2d.set_active`.

        Raises:
            InputError: if the supernet has no such channels or taps; the active ones stay as they were.
        """
        try:
            part = self.conv.part(in_channels, out_channels, kernel_size)
        except InputError as error:
            raise InputError(f"{type(self).__name__}.set_active: {error}") from None
        self.conv._put(part)
        self.bn._put(self.bn.part(part.outputs))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        bn = self.bn
        compiled = torch.compiler.is_compiling() and bn._in_regions  # the compiler folds by itself
        if bn.training or bn.running_mean is None or compiled:
            return super().forward(x, residual)
        conv = self.conv
        active, normed = conv._now(), bn._now().channels
        where = type(self).__name__
        bn._check_input_dim(x)
        check_channels(x, active.inputs.count, dim=1, where=where)
        if normed.count != active.outputs.count:
            raise InputError(
                f"{where}: conv makes {active.outputs.count} channels and bn has {normed.count} active; set both, or "
                "the unit"
            )
        filters = conv._filters(active)  # [Cout, Cin / groups, kh, kw]
        if filters.numel() > self._outputs(x, normed.count):
            return super().forward(x, residual)
        scale, shift = self._folded(normed)
        filters = (filters * scale[:, None, None, None]).to(filters.dtype)
        x, padding = conv._padded(x, active)
        y = F.conv2d(x, filters, shift.to(filters.dtype), conv.stride, padding, conv.dilation, active.groups)
        return self._ended(y, residual)

    def _outputs(self, x: Tensor, channels: int) -> int:
        """Numbers in the output, border aside."""
        return x.shape[0] * channels * x.shape[-2] * x.shape[-1] // (self.conv.stride[0] * self.conv.stride[1])

    def _folded(self, active: Channels) -> tuple[Tensor, Tensor]:
        """Scale and shift of the active channels, ``[Cout]``, in float32 at least."""
        bn = self.bn
        mean, variance, weight, bias = (
            active_part(vector, active).to(torch.promote_types(vector.dtype, torch.float32))
            for vector in (bn.running_mean, bn.running_var, bn.weight, bn.bias)
        )
        scale = weight * torch.rsqrt(variance + bn.eps)
        return scale, bias - mean * scale

    def export(self) -> ConvBNAct:
        """Returns: the unit of plain layers, with a copy of what is active, equal in output up to rounding."""
        return self.exported({id(layer): layer.export() for layer in (self.conv, self.bn)})

    def exported(self, plain: dict[int, Any]) -> ConvBNAct:
        """The same of layers that were exported before; ``plain`` holds them by identity."""
        unit = ConvBNAct(plain[id(self.conv)], plain[id(self.bn)], self.relu)
        unit.training = self.training
        return unit
