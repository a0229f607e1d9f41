"""A convolution as it runs in an accelerated model: see :class:`Convolution`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jdkd import _backend
from jdkd._dispatch import Candidate, Table
from jdkd._verdicts import dtype_name
from jdkd.errors import InputError
from jdkd.latency.folding import folded, is_hooked
from jdkd.ops.elastic_pointwise import elastic_pointwise_conv2d
from jdkd.patch.overrides import Override

Weights = tuple[Tensor, Tensor | None]
SIZES = 6  # of inputs, that a convolution keeps a packed weight for: five levels, and one more


@dataclass(frozen=True)
class Form:
    """How the layers of a model run.

    Args:
        channels_last: whether weights lie so.
        packed: whether they are in the layout that oneDNN multiplies, reordered once.
        fused: whether what follows a convolution runs in the same pass.
    """

    channels_last: bool = False
    packed: bool = False
    fused: bool = False


@dataclass(frozen=True)
class Call:
    """What the choice of an implementation depends on.

    Args:
        conv: the convolution.
        how: it is to run.
        device, dtype: of its weight.
        form: of the operator whose kernel may run.
    """

    conv: nn.Conv2d
    how: Form
    device: torch.device
    dtype: torch.dtype
    form: str = "forward"


class Onednn:
    """The operators that torch's own compiler calls on a CPU; they take reordered weights, and add and rectify."""

    name, why = "oneDNN", "the weight is reordered once, and the epilogue runs while the output is in cache"
    kernel = None
    dtypes = torch.float32, torch.bfloat16

    def why_not(self, call: Call) -> str | None:
        if not (call.how.packed or call.how.fused):
            return "neither packed weights nor an epilogue are asked for"
        if isinstance(call.conv.padding, str):
            return f"its padding is {call.conv.padding!r}"
        return no_onednn(call.device, call.dtype)

    def run(self, x: Tensor, weights: Weights, conv: nn.Conv2d, residual: Tensor | None, relu: bool) -> Tensor:
        weight, bias = weights
        place = conv.padding, conv.stride, conv.dilation, conv.groups
        after, run = "relu" if relu else "none", torch.ops.mkldnn._convolution_pointwise
        if residual is None:
            return run(x, weight, bias, *place, after, [], "")
        return run.binary(x, residual, weight, bias, *place, "add", 1.0, after if relu else None, [], "")


class Pointwise:
    """This package's Triton kernel of 1x1 convolutions, where it was seen right or is asked for."""

    name, why = "triton", "a 1x1 product with everything that follows it in one launch"
    kernel = _backend.Kernel("elastic_pointwise", "triton")

    def why_not(self, call: Call) -> str | None:
        conv = call.conv
        if not call.how.fused or call.device.type != "cuda":
            return "it fuses an epilogue on a GPU"
        square = conv.kernel_size == (1, 1) and conv.stride in ((1, 1), (2, 2))
        usual = square and conv.groups == 1 and conv.padding in ((0, 0), "valid", "same")
        return None if usual else "it takes 1x1 convolutions"

    def run(self, x: Tensor, weights: Weights, conv: nn.Conv2d, residual: Tensor | None, relu: bool) -> Tensor:
        weight, bias = weights
        epilogue = {"shift": bias, "residual": residual, "activation": "relu" if relu else "none"}
        with _backend.use_backend("triton"):
            return elastic_pointwise_conv2d(x, weight, stride=conv.stride[0], **epilogue)


class Cudnn:
    """cuDNN's convolution with a bias, a residual and a ReLU, which it always ends with."""

    name, why = "cuDNN", "the epilogue runs while the output is on chip"
    kernel = None

    def why_not(self, call: Call) -> str | None:
        if not call.how.fused or call.device.type != "cuda":
            return "it fuses an epilogue on a GPU"
        return "its padding has no number" if isinstance(call.conv.padding, str) else None

    def run(self, x: Tensor, weights: Weights, conv: nn.Conv2d, residual: Tensor | None, relu: bool) -> Tensor:
        if not relu:
            return ATEN.run(x, weights, conv, residual, relu)
        (weight, bias), place = weights, (conv.stride, conv.padding, conv.dilation, conv.groups)
        if residual is None:
            return torch.cudnn_convolution_relu(x, weight, bias, *place)
        return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *place)


class Aten:
    """torch's convolution, and what follows it in place."""

    name, why = "ATen", "runs everywhere"
    kernel = None

    def why_not(self, call: Call) -> str | None:
        return None

    def run(self, x: Tensor, weights: Weights, conv: nn.Conv2d, residual: Tensor | None, relu: bool) -> Tensor:
        y = F.conv2d(x, *weights, conv.stride, conv.padding, conv.dilation, conv.groups)
        if residual is not None:
            y = y.add_(residual) if residual.shape == y.shape and residual.dtype == y.dtype else y + residual
        return y.relu_() if relu else y


ATEN = Aten()
IMPLEMENTATIONS = {each.name: each for each in (Onednn(), Pointwise(), Cudnn(), ATEN)}
TABLE = Table(
    "accelerated convolution",
    tuple(
        Candidate(each.name, each.why, can_run=each.why_not, kernel=each.kernel) for each in IMPLEMENTATIONS.values()
    ),
)


def no_onednn(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why oneDNN's operators cannot run in a dtype on a device; None if they can."""
    if device.type != "cpu":
        return f"oneDNN runs on a CPU, and the model is on {device.type}"
    if dtype not in Onednn.dtypes:
        return f"oneDNN takes float32 and bfloat16, and the model is in {dtype_name(dtype)}"
    names = "_convolution_pointwise", "_reorder_convolution_weight", "_linear_pointwise", "_reorder_linear_weight"
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, name) for name in names):
        return f"torch {torch.__version__} has no oneDNN operators with packed weights"
    return None


class Layer(Override):
    """A layer with weights of its own making; they are made again once the module's have changed.

    Args:
        module: the layer; its parameters stay as they are.
        form: how it runs.
    """

    def __init__(self, module: nn.Module, form: Form) -> None:
        super().__init__(module)
        self.form = form
        self._kind = module.weight.device, module.weight.dtype
        self._seen: tuple[Any, ...] = ()
        self._packed: dict[tuple[int, ...], Tensor] = {}
        self._weights: Weights = (torch.empty(0), None)

    def sources(self) -> Sequence[Tensor | None]:
        """The tensors that its weights are made of."""
        return self.module.weight, self.module.bias

    def made(self) -> Weights:
        """Makes the weights."""
        raise NotImplementedError

    def weights(self, x: Tensor) -> Weights:
        """The weights for an input, up to date.

        Raises:
            InputError: the layer trains, or was moved since.
        """
        if self.module.training:
            raise InputError(refusal(f"a {type(self.module).__name__} of it is in training mode"))
        if x.requires_grad and torch.is_grad_enabled():
            raise InputError(refusal("a gradient is asked of it"))
        seen = tuple(map(state, self.sources()))
        if seen != self._seen:
            self._require_as_before()
            with torch.inference_mode(False), torch.no_grad():
                self._weights, self._seen, self._packed = self.made(), seen, {}
        return self._weights

    def packed(self, size: tuple[int, ...], weight: Tensor, most: int) -> Tensor:
        """The weight as oneDNN wants it for a size of input; in the order for another size it may run ten times longer.

        Args:
            size: of the input.
            weight: as it is.
            most: sizes that a weight is kept for; the first that was seen goes.
        """
        if size not in self._packed:
            while len(self._packed) >= most:
                self._packed.pop(next(iter(self._packed)), None)
            with torch.inference_mode(False), torch.no_grad():
                self._packed[size] = self.reordered(weight, size)
        return self._packed[size]

    def reordered(self, weight: Tensor, size: tuple[int, ...]) -> Tensor:
        """A weight in the order for a size."""
        raise NotImplementedError

    def _require_as_before(self) -> None:
        before, now = self._kind, (self.module.weight.device, self.module.weight.dtype)
        if before != now:
            raise InputError(
                f"the model was accelerated on {before[0]} in {dtype_name(before[1])} and is now on {now[0]} in "
                f"{dtype_name(now[1])}, where nothing was checked or timed; call restore() and accelerate it again."
            )


class Convolution(Layer):
    """A convolution, with the normalisation behind it folded in, and with a residual and a ReLU if asked for.

    Args:
        conv: the convolution.
        norm: what normalises its output, which is to do nothing from now on; or None.
        form: how it runs.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.Module | None, form: Form) -> None:
        super().__init__(conv, form)
        self.norm = norm
        self._run: Any = ATEN

    def sources(self) -> Sequence[Tensor | None]:
        if self.norm is None:
            return super().sources()
        norm = self.norm
        return *super().sources(), norm.weight, norm.bias, norm.running_mean, norm.running_var

    def made(self) -> Weights:
        weight, bias = self._dense()
        chosen, _ = TABLE.choose(Call(self.module, self.form, weight.device, weight.dtype))
        self._run = IMPLEMENTATIONS[chosen.name]
        return weight, bias

    def _dense(self) -> Weights:
        conv = self.module
        weight, bias = (conv.weight, conv.bias) if self.norm is None else folded(conv, self.norm)
        if self.form.channels_last:
            weight = weight.contiguous(memory_format=torch.channels_last)
        return weight.detach(), None if bias is None else bias.detach()

    def run(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """Convolves ``[N, Cin, H, W]``, adds a residual ``[N, Cout, OH, OW]``, and rectifies."""
        if not self.is_folded:
            return type(self.module).forward(self.module, x)
        weight, bias = self.weights(x)
        usual = self._run is not ATEN and self._usual(x, residual)
        if usual and self.form.packed:
            weight = self.packed(tuple(x.shape), weight, SIZES)
        return (self._run if usual else ATEN).run(x, (weight, bias), self.module, residual, relu)

    def reordered(self, weight: Tensor, size: tuple[int, ...]) -> Tensor:
        conv = self.module
        place = conv.padding, conv.stride, conv.dilation, conv.groups
        return torch.ops.mkldnn._reorder_convolution_weight(weight, *place, size)

    @property
    def is_folded(self) -> bool:
        """Whether its output is normalised; where somebody hears it, or the normalisation, both run as they are."""
        return self.norm is None or not (is_hooked(self.module) or is_hooked(self.norm))

    def _usual(self, x: Tensor, residual: Tensor | None) -> bool:
        """Whether an input is what kernels take: a batch of the weights' dtype, a residual of the output's shape."""
        conv = self.module
        if x.dim() != 4 or x.dtype != conv.weight.dtype or not x.numel() or torch.is_autocast_enabled(x.device.type):
            return False
        if residual is None:
            return True
        padding = (0, 0) if isinstance(conv.padding, str) else conv.padding  # in words: only 1x1 ones get here
        steps = zip(x.shape[2:], conv.kernel_size, padding, conv.dilation, conv.stride, strict=True)
        size = [(side + 2 * pad - far * (taps - 1) - 1) // stride + 1 for side, taps, pad, far, stride in steps]
        return residual.shape == (x.shape[0], conv.out_channels, *size) and residual.dtype == x.dtype


class Linear(Layer):
    """A matrix product with a weight that oneDNN has reordered."""

    def made(self) -> Weights:
        weight, bias = self.module.weight.detach(), self.module.bias
        return weight, None if bias is None else bias.detach()

    def run(self, x: Tensor) -> Tensor:
        weight, bias = self.weights(x)
        if x.dtype != weight.dtype or not x.numel() or torch.is_autocast_enabled(x.device.type):
            return F.linear(x, weight, bias)
        rows = x.numel() // x.shape[-1]
        return torch.ops.mkldnn._linear_pointwise(x, self.packed((rows,), weight, 1), bias, "none", [], "")

    def reordered(self, weight: Tensor, size: tuple[int, ...]) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight, *size)


class Folded(Override):
    """A normalisation that the convolution before it has done.

    Args:
        convolution: that one.
    """

    def __init__(self, convolution: Convolution) -> None:
        super().__init__(convolution.norm)
        self._convolution = convolution

    def run(self, x: Tensor) -> Tensor:
        if self.module.training:
            raise InputError(refusal(f"a {type(self.module).__name__} of it is in training mode"))
        return x if self._convolution.is_folded else self.inner(x)


def refusal(reason: str) -> str:
    """Why an accelerated model does not run, and the remedy."""
    return (
        f"this model was accelerated, which is for inference, and {reason}; call restore() first, and accelerate it "
        "again when it has been trained."
    )


def state(tensor: Tensor | None) -> tuple[Any, ...]:
    """What changes when a tensor is written, exchanged or moved; not by ``.data``, nor inside of inference mode."""
    if tensor is None:
        return ()
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.device, tensor.dtype, id(tensor), tensor.data_ptr(), version
