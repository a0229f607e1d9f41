"""Which kernel computes an elastic convolution: the first row of :data:`KERNELS` that takes a call.

A Triton kernel runs where it was asked for (``JDKD_BACKEND=triton``, ``use_backend("triton")``), and unasked where it
measured fastest and was seen right: in a :class:`TunedRange` of its row. Ranges are data, filled in from committed
results. The choice depends on shapes, layout and dtype alone; a compiled graph keeps its first answer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from jdkd import _backend, _dispatch
from jdkd.ops.active_channels import Channels
from jdkd.ops.kernel_size import Padding, pair
from jdkd.ops.layout import is_channels_last
from jdkd.ops.transforms import is_looked_into

_ANY = (1, 2**63)
_SIZES = ("positions", "in_channels", "out_channels")
_DEVICES = ("cuda", "cpu")  # where a kernel can run


class Product(NamedTuple):
    """A convolution as a matrix product, ``[positions, Cin kh kw]`` times ``[Cin kh kw, Cout]``.

    Args:
        device: of the image.
        dtype: that it is computed in.
        positions: ``N * OH * OW``.
        in_channels: active.
        out_channels: active.
    """

    device: torch.device
    dtype: torch.dtype
    positions: int
    in_channels: int
    out_channels: int


class ConvCall(NamedTuple):
    """What the choice depends on.

    Args:
        product: its size, where and in which dtype.
        kernel: active taps, vertical and horizontal.
        stride: in pixels, likewise.
        padding: of the active kernel, in pixels, likewise; or ``"same"``.
        groups: active groups.
        is_listed: whether channels are listed, and not the leading ones.
        is_channels_last: whether the image lies in memory so and in no other way.
        is_batch: whether there is a dimension of images.
    """

    product: Product
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    groups: int
    is_listed: bool
    is_channels_last: bool
    is_batch: bool

    def __str__(self) -> str:
        product = self.product
        channels = f"{product.in_channels}->{product.out_channels} {'listed' if self.is_listed else 'leading'} channels"
        layout = "channels-last" if self.is_channels_last else "not channels-last"
        return (
            f"{channels}, {_by(self.kernel)} kernel, stride {_by(self.stride)}, padding "
            f"{self.padding if isinstance(self.padding, str) else _by(self.padding)}, groups {self.groups}, "
            f"{product.positions} positions, {_name(product.dtype)}, {layout}, on {product.device}"
        )


class TunedRange(NamedTuple):
    """Calls for which a kernel measured fastest.

    Args:
        device: ``"cpu"``, or a compute capability, ``"sm_90"``.
        dtypes: that are computed in.
        source: the committed result that says so.
        positions: from the first and below the second, ``N * OH * OW``.
        in_channels: active, likewise.
        out_channels: active, likewise.
    """

    device: str
    dtypes: tuple[torch.dtype, ...]
    source: str
    positions: tuple[int, int] = _ANY
    in_channels: tuple[int, int] = _ANY
    out_channels: tuple[int, int] = _ANY

    def covers(self, product: Product) -> bool:
        bounds = ((getattr(self, size), getattr(product, size)) for size in _SIZES)
        is_inside = all(first <= size < end for (first, end), size in bounds)
        return is_inside and self.device == _kind(product.device) and product.dtype in self.dtypes

    def __str__(self) -> str:
        bounds = [f"{size} {getattr(self, size)}" for size in _SIZES if getattr(self, size) != _ANY]
        return ", ".join([self.device, *map(_name, self.dtypes), *bounds, self.source])


class Condition(NamedTuple):
    """What a call must be for a kernel to take it, in words too."""

    words: str
    holds: Callable[[ConvCall], bool]


class Kernel(NamedTuple):
    """One way to compute an elastic convolution.

    Args:
        name: what explanations call it.
        operator: row of the backend table whose Triton kernel runs; None: no kernel of ours.
        takes: conditions, all of which must hold.
        limit: positions must be fewer.
        tuned: where it measured fastest; without a range a kernel runs on request only.
        why: what speaks for it, one clause.
    """

    name: str
    operator: str | None
    takes: tuple[Condition, ...]
    limit: int
    tuned: tuple[TunedRange, ...]
    why: str

    def why_not(self, call: ConvCall) -> str | None:
        """Why it does not take a call, or None if it does.

        Raises:
            InputError: if the backend that was asked for cannot run here.
        """
        for condition in self.takes:
            if not condition.holds(call):
                return f"it takes {condition.words}"
        if call.product.positions >= self.limit:
            return f"it takes fewer than {self.limit} positions"
        return None if self.operator is None else _unwanted(self, call.product)

    @property
    def when(self) -> str:
        """Its conditions and its rule, in words."""
        if self.operator is None:
            return "everything else"
        rule = f"where it measured fastest: {'; '.join(map(str, self.tuned))}" if self.tuned else ON_REQUEST
        return f"{', '.join(condition.words for condition in self.takes)}; {rule}"


ON_REQUEST = 'on request only (JDKD_BACKEND=triton, use_backend("triton")), since it was not measured on a GPU'
_BATCH = Condition("a batch of images", lambda call: call.is_batch)
_ONE_GROUP = Condition("one group", lambda call: call.groups == 1)

KERNELS = (
    Kernel(
        "pointwise",
        "elastic_pointwise",
        (
            _BATCH,
            _ONE_GROUP,
            Condition("a 1x1 kernel", lambda call: call.kernel == (1, 1)),
            Condition("stride 1 or 2, both ways alike", lambda call: call.stride in ((1, 1), (2, 2))),
            Condition("no padding", lambda call: call.padding == (0, 0)),
            Condition("leading channels", lambda call: not call.is_listed),
            Condition("a channels-last image", lambda call: call.is_channels_last),
        ),
        2**30,
        (),
        "one matrix product with the shared weight where it lies, the bias in the same pass",
    ),
    Kernel(
        "implicit_gemm",
        "elastic_conv",
        (_BATCH, _ONE_GROUP, Condition("padding in pixels", lambda call: call.padding != "same")),
        2**30,
        (),
        "the active filters are read where they lie, through lists too, and never copied",
    ),
    Kernel(
        "aten",
        None,
        (),
        2**63,
        (),
        "ATen on the active part: a view of leading channels, a copy of listed ones; it measured fastest on a CPU, and "
        "nothing was measured on a GPU",
    ),
)
_measured: dict[ConvCall, str] = {}
_OWN = {kernel.name: kernel for kernel in KERNELS if kernel.operator}


def call_of(
    x: Tensor,
    inputs: Channels,
    outputs: Channels,
    kernel: Sequence[int],
    stride: int | Sequence[int],
    padding: Padding,
    dilation: int | Sequence[int],
    groups: int,
) -> ConvCall:
    """Describes a convolution with channels that have been read already.

    Args:
        x: ``[N, Cin, H, W]`` or ``[Cin, H, W]``; its values are not looked at.
        inputs: active input channels.
        outputs: active output channels.
        kernel: active taps, ``(kh, kw)``.
        stride: in pixels.
        padding: of the active kernel, in pixels, or ``"same"`` or ``"valid"``.
        dilation: in pixels.
        groups: active groups.

    Returns:
        What :func:`choose` takes.
    """
    kernel, stride, is_batch = pair(kernel), pair(stride), x.dim() == 4
    padding = "same" if padding == "same" else pair(0 if padding == "valid" else padding)
    height, width = out_size(x.shape[-2:], kernel, stride, padding, pair(dilation))
    product = Product(
        x.device,
        dtype_of(x),
        (x.shape[0] if is_batch else 1) * height * width,
        inputs.count,
        outputs.count,
    )
    is_listed = inputs.index is not None or outputs.index is not None
    return ConvCall(product, kernel, stride, padding, groups, is_listed, is_channels_last(x), is_batch)


def out_size(
    size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int] | str,
    dilation: Sequence[int],
) -> tuple[int, int]:
    """Height and width that a convolution makes of ``size``; all in pixels, vertical and horizontal."""
    if isinstance(padding, str):
        return size[0], size[1]
    reach = [dilation[d] * (kernel[d] - 1) + 1 for d in (0, 1)]  # of the window
    height, width = ((size[d] + 2 * padding[d] - reach[d]) // stride[d] + 1 for d in (0, 1))
    return height, width


def dtype_of(x: Tensor) -> torch.dtype:
    """The dtype in which a convolution takes a tensor: autocast's, where it is on, but float64 stays what it is."""
    casts = x.is_floating_point() and x.dtype is not torch.float64 and not x.is_meta  # meta has no autocast
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if casts and torch.is_autocast_enabled(kind) else x.dtype


def allow_tf32() -> bool:
    """Whether kernels of ours may multiply float32 in TF32: where cuDNN's convolutions may."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"


def select(call: ConvCall) -> str:
    """Picks the kernel of a call.

    Args:
        call: what :func:`call_of` says of it.

    Returns:
        Name of a row of :data:`KERNELS`.

    Raises:
        InputError: if ``use_backend`` or ``JDKD_BACKEND`` asks for a backend that cannot run here.
    """
    if torch.compiler.is_compiling() or _backend.requested() is not None:
        return _dispatch.first(KERNELS, call)[0].name
    if (found := _measured.get(call)) is None:
        kernel, is_settled = _dispatch.first(KERNELS, call)
        found = kernel.name
        if is_settled and len(_measured) < 1024:
            _measured[call] = found
    return found


def explain(call: ConvCall) -> tuple[str, str, tuple[tuple[str, str], ...]]:
    """Says why a call takes its kernel.

    Args:
        call: what :func:`call_of` says of it.

    Returns:
        Name of the kernel; what speaks for it; name of every other kernel, and why it is not taken.

    Raises:
        InputError: as :func:`select`.
    """
    kernel, others = _dispatch.explain(KERNELS, call)
    if kernel.operator is None:
        return kernel.name, kernel.why, others
    tuned = None if _asked_for(kernel.operator) else _tuned_range(kernel, call.product)
    rule = f"it measured fastest ({tuned})" if tuned else "it was asked for"
    return kernel.name, f"{rule}; {kernel.why}", others


def kernel_runs(name: str, x: Tensor, out_shape: Sequence[int], form: str) -> bool:
    """Whether an operator runs a Triton kernel, its tensors being what that kernel takes.

    Args:
        name: of the kernel.
        x: ``[N, Cin, H, W]``.
        out_shape: ``[N, Cout, OH, OW]``.
        form: ``"forward"`` or ``"gradient"``.

    Returns:
        True if the kernel was asked for, or measured fastest here and was seen right.

    Raises:
        InputError: if the backend that was asked for cannot run here.
    """
    kernel = _OWN[name]
    n, out_channels, height, width = out_shape
    product = Product(x.device, x.dtype, n * height * width, x.shape[1], out_channels)
    return 0 < product.positions < kernel.limit and _unwanted(kernel, product, form) is None


def only_aten(device: str) -> bool:
    """Whether no kernel was asked for and none measured fastest on this type of device, the usual case, at once; or the
    call is looked into, by ``torch.export`` or ``torch.func``: they know ATen's gradient and no other."""
    kinds = [tuned.device for kernel in KERNELS for tuned in kernel.tuned]
    by_default = any(kind == device or (device == "cuda" and kind.startswith("sm_")) for kind in kinds)
    return (_backend.requested() is None and not by_default) or is_looked_into()


def _unwanted(kernel: Kernel, product: Product, form: str = "forward") -> str | None:
    """Why a kernel stays out, though it takes the call."""
    if product.device.type not in _DEVICES:
        return f"it takes tensors on {' or '.join(_DEVICES)}"
    if _selected(kernel.operator, product.device, product.dtype, form) == "triton":
        return None
    if asked := _asked_for(kernel.operator):
        return f"the backend {asked} was asked for"
    if not kernel.tuned:
        return ON_REQUEST
    if not _tuned_range(kernel, product):
        return "it is outside of the ranges where it measured fastest"
    return _unseen(kernel.operator, product.device, product.dtype, form)


def _tuned_range(kernel: Kernel, product: Product) -> TunedRange | None:
    return next((tuned for tuned in kernel.tuned if tuned.covers(product)), None)


def _selected(op: str, device: torch.device, dtype: torch.dtype, form: str) -> str:
    return _backend.select(op, torch.empty(0, device=device, dtype=dtype), form)


def _unseen(op: str, device: torch.device, dtype: torch.dtype, form: str) -> str | None:
    """Why a kernel that measured fastest may not run: it must be there, and have been seen right on the device."""
    if missing := _availability(op)["triton"]:
        return missing
    return _backend.why_unseen(_backend.Subject(op, form, "triton", device, dtype))


def _asked_for(op: str) -> str | None:
    requested = _backend.requested()
    return requested if requested in _backend.explain(op) else None


_availability = functools.lru_cache(maxsize=8)(_backend.available)


def _kind(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


# What torch.compiler.assume_constant_result sets; calling that would load the whole compiler, and triton with it.
for _constant in (only_aten, _selected, _unseen, _asked_for, _kind):
    _constant._dynamo_marked_constant = True


def _by(numbers: tuple[int, int]) -> str:
    return f"{numbers[0]}x{numbers[1]}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
