"""A convolution with what follows it as one unit: batch normalisation, residual, ReLU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jdkd.errors import InputError
from jdkd.nn.elastic import Elastic
from jdkd.nn.elastic_batch_norm import ElasticBatchNorm2d
from jdkd.nn.elastic_conv import ElasticConv2d
from jdkd.nn.subnet import Subnet
from jdkd.nn.symbolic import Proxy, as_node
from jdkd.ops import elastic_kernels
from jdkd.ops.active_channels import Channels, ChannelsLike, active_part, crop
from jdkd.ops.elastic_conv import check_channels, convolve
from jdkd.ops.elastic_pointwise import elastic_pointwise_conv2d
from jdkd.ops.kernel_size import KernelLike


class ConvBNAct(nn.Module):
    """A convolution, its batch normalisation, a residual and a ReLU, in this order: plain layers, one after another.

    Residual and ReLU work in place on what ``bn`` returns, as torchvision's ``nn.ReLU(inplace=True)`` does. Where one
    of them follows, a hook of ``bn`` that keeps its output sees it overwritten, and torch refuses full backward hooks
    of ``bn``.

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
            y = _joined(y, residual)
        return F.relu(y, inplace=True) if self.relu else y

    def extra_repr(self) -> str:
        return f"relu={self.relu}"


def _joined(y: Tensor, residual: Tensor) -> Tensor:
    """The sum, in place where it has the dtype of ``y``."""
    if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript compiles both sides of an "and"
        if isinstance(y, Proxy):  # a graph of torch.fx has no branches
            return y + residual
    return y.add_(residual) if y.dtype == residual.dtype else y + residual


class ElasticConvBNAct(ConvBNAct):
    """See :class:`ConvBNAct`; of an elastic convolution without bias and an elastic batch normalisation.

    In training the parts run one after another. In evaluation the normalisation is folded into a scale and a shift of
    each active channel, and there are three ways to run it, of which :func:`explain
    <jdkd.experimental.explain>` names the one taken:

    - the kernel of 1x1 convolutions applies scale, shift, residual and ReLU while it writes the output;
    - where the active filters are smaller than the output, the filters are multiplied by the scale and the shift is the
      bias, computed at every forward since weights and statistics may have changed;
    - elsewhere the parts run one after another, as in training.

    Hooks of the parts run only where the parts do.

    ``bn`` is to stay elastic. ``nn.SyncBatchNorm.convert_sync_batchnorm`` would replace it; the unit refuses to run
    then, to be set and to be exported, in training too. Export the subnet first, and convert what comes out.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode: as for ``nn.Conv2d``.
        relu: whether a ReLU ends the unit.
        kernel_transform: see :class:`ElasticConv2d`.
        eps, momentum, statistics, subnets: of the normalisation, see :class:`ElasticBatchNorm2d`.
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
        *,
        padding_mode: str = "zeros",
        relu: bool = True,
        kernel_transform: bool = False,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        statistics: str = "shared",
        subnets: Iterable[Subnet | str] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        where = {"device": device, "dtype": dtype}
        conv = ElasticConv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, False, padding_mode,
            kernel_transform=kernel_transform, **where,
        )  # fmt: skip
        bn = ElasticBatchNorm2d(out_channels, eps, momentum, statistics=statistics, subnets=subnets, **where)
        super().__init__(conv, bn, relu)

    def set_active(
        self, in_channels: ChannelsLike = None, out_channels: ChannelsLike = None, kernel_size: KernelLike = None
    ) -> None:
        """Chooses what the next forwards use; see :meth:`ElasticConv2d.set_active`.

        Raises:
            InputError: if the supernet has no such channels or taps; the active ones stay as they were.
        """
        bn = self._norm
        try:
            part = self.conv.part(in_channels, out_channels, kernel_size)
        except InputError as error:
            raise InputError(f"{type(self).__name__}.set_active: {error}") from None
        self.conv._put(part)
        bn._put(bn.part(part.outputs))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if isinstance(x, Proxy):
            return as_node(self, x, x, residual)
        compiled = torch.compiler.is_compiling() and self._norm._in_regions  # the compiler folds by itself
        if compiled or self._normalises_by_batch():
            return super().forward(x, residual)
        active, normed = self._active(x)
        route, conv = self._route(x, active), self.conv
        if route == "parts":
            return super().forward(x, residual)
        scale, shift = self._folded(normed)
        if route == "one pass":
            return self._in_one_pass(x, active, scale, shift, residual)
        filters = conv._filters(active)  # [Cout, Cin / groups, kh, kw]
        filters = (filters * scale[:, None, None, None]).to(filters.dtype)
        x, padding = conv._padded(x, active)
        whole, window = self._whole(active), (conv.stride, padding, conv.dilation, active.groups)
        return self._ended(convolve(x, filters, shift.to(filters.dtype), *whole, *window), residual)

    __prepare_scriptable__ = Elastic.__prepare_scriptable__

    @property
    def _norm(self) -> ElasticBatchNorm2d:
        """The elastic normalisation; raises InputError where something has replaced it. Wrappers of it may."""
        bn = self.bn
        if not hasattr(bn, "_now"):
            raise InputError(
                f"{type(self).__name__}: bn is a {type(bn).__name__} and no ElasticBatchNorm2d any more; leave the "
                "layers of a supernet elastic, and convert what jdkd.nn.export makes of a subnet"
            )
        return bn

    def _whole(self, active: Any) -> tuple[Channels, Channels]:
        """The channels of folded filters, all of which are active."""
        return Channels(active.inputs.count), Channels(active.outputs.count)

    def _normalises_by_batch(self) -> bool:
        bn = self._norm
        return bn.training or bn.running_mean is None

    def _active(self, x: Tensor) -> tuple[Any, Channels]:
        """What is active of the convolution and of the normalisation; raises InputError where they do not fit."""
        active, normed = self.conv._now(), self.bn._now().channels
        where = type(self).__name__
        self.bn._check_input_dim(x)
        check_channels(x, active.inputs.count, dim=1, where=where)
        if normed.count != active.outputs.count:
            raise InputError(
                f"{where}: conv makes {active.outputs.count} channels and bn has {normed.count} active; set both, or "
                "the unit"
            )
        return active, normed

    def _route(self, x: Tensor, active: Any) -> str:
        """How an evaluation runs: in ``"one pass"``, with ``"folded"`` filters, or as ``"parts"``."""
        conv, only_aten = self.conv, elastic_kernels.only_aten(x.device)
        takes_one = not only_aten and active.border is None and not conv._is_transformed(active)
        if takes_one and elastic_kernels.select(conv._call(x, active)) == "pointwise":
            return "one pass"
        columns = active.inputs.count if conv.groups == 1 else conv.weight.shape[1]
        kernel = active.kernel or conv.kernel_size
        filters = active.outputs.count * columns * kernel[0] * kernel[1]
        outputs = x.shape[0] * active.outputs.count * x.shape[2] * x.shape[3] // (conv.stride[0] * conv.stride[1])
        return "parts" if filters > outputs else "folded"

    def _in_one_pass(self, x: Tensor, active: Any, scale: Tensor, shift: Tensor, residual: Tensor | None) -> Tensor:
        """The 1x1 product with everything that follows it, unless the residual needs promotion or broadcasting."""
        conv = self.conv
        size = elastic_kernels.out_size(x.shape[2:], (1, 1), conv.stride, (0, 0), (1, 1))
        shape = (x.shape[0], active.outputs.count, *size)
        joins = residual is None or (residual.shape == shape and residual.dtype == elastic_kernels.dtype_of(x))
        weight = conv._packed_weight()
        y = elastic_pointwise_conv2d(
            x,
            crop(conv.weight, active.kernel) if weight is None else weight,
            out_channels=active.outputs.count,
            stride=conv.stride[0],
            scale=scale,
            shift=shift,
            residual=residual if joins else None,
            activation="relu" if joins and self.relu else "none",
        )
        return y if joins else self._ended(y, residual)

    def _folded(self, active: Channels) -> tuple[Tensor, Tensor]:
        """Scale and shift of the active channels, ``[Cout]``, in float32 at least."""
        bn, own = self.bn, self.bn.active_statistics
        mean, variance, weight, bias = (
            active_part(vector, active).to(torch.promote_types(vector.dtype, torch.float32))
            for vector in (own.running_mean, own.running_var, bn.weight, bn.bias)
        )
        scale = weight * torch.rsqrt(variance + bn.eps)
        return scale, bias - mean * scale

    def export(self) -> ConvBNAct:
        """Returns: the unit of plain layers, with a copy of what is active, equal in output up to rounding."""
        return self.exported({id(layer): layer.export() for layer in (self.conv, self._norm)})

    def exported(self, plain: dict[int, Any]) -> ConvBNAct:
        """The same of layers that were exported before; ``plain`` holds them by identity."""
        unit = ConvBNAct(plain[id(self.conv)], plain[id(self._norm)], self.relu)
        unit.training = self.training
        return unit
