"""Which kernel computes an elastic convolution: the first row of :data:`TABLE` that takes a call.

A Triton kernel runs where it was asked for (``JDKD_BACKEND=triton``, ``use_backend("triton")``), and unasked where
`jdkd tune` measured it faster than ATen in the :func:`region` of a call, and it was seen right. The choice depends on
shapes, layout and dtype alone; a compiled graph keeps its first answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from jdkd import _backend, _dispatch, _tuned
from jdkd._dispatch import Candidate, Condition, Table, all_of
from jdkd._verdicts import dtype_name
from jdkd.ops.active_channels import Channels
from jdkd.ops.kernel_size import Padding, pair
from jdkd.ops.layout import is_channels_last
from jdkd.ops.transforms import is_looked_into

NAME = "elastic convolution"
# Where classes of sizes end: output positions, and products of input and output channels.
POSITIONS, WEIGHTS = (512, 4096, 32768), (32**2, 128**2, 512**2)
TAPS, STRIDES = (1, 3), (1, 2)  # both ways alike, of convolutions that are timed
_DEVICES = ("cuda", "cpu")  # where a kernel can run
_LIMIT = 2**30


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
        form: of the operator: ``"forward"`` or ``"gradient"``.
    """

    product: Product
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    groups: int
    is_listed: bool
    is_channels_last: bool
    is_batch: bool
    form: str = "forward"

    @property
    def device(self) -> torch.device:
        return self.product.device

    @property
    def dtype(self) -> torch.dtype:
        return self.product.dtype

    def __str__(self) -> str:
        product = self.product
        channels = f"{product.in_channels}->{product.out_channels} {'listed' if self.is_listed else 'leading'} channels"
        layout = "channels-last" if self.is_channels_last else "not channels-last"
        return (
            f"{channels}, {_by(self.kernel)} kernel, stride {_by(self.stride)}, padding "
            f"{self.padding if isinstance(self.padding, str) else _by(self.padding)}, groups {self.groups}, "
            f"{product.positions} positions, {dtype_name(product.dtype)}, {layout}, on {product.device}"
        )


ON_REQUEST = (
    'on request only (JDKD_BACKEND=triton, use_backend("triton")) or where `jdkd tune` found it faster, since it was '
    "not measured on a GPU"
)


def _on_request(call: ConvCall) -> str:
    return ON_REQUEST


_DEVICE = Condition("tensors on cuda or cpu", lambda call: call.device.type in _DEVICES)
_BATCH = Condition("a batch of images", lambda call: call.is_batch)
_ONE_GROUP = Condition("one group", lambda call: call.groups == 1)
_FEW = Condition(f"fewer than {_LIMIT} positions", lambda call: call.product.positions < _LIMIT)
_TAP = Condition("a 1x1 kernel", lambda call: call.kernel == (1, 1))
_STRIDE = Condition("stride 1 or 2, both ways alike", lambda call: call.stride in ((1, 1), (2, 2)))
_PLAIN = (
    Condition("no padding", lambda call: call.padding == (0, 0)),
    Condition("leading channels", lambda call: not call.is_listed),
    Condition("a channels-last image", lambda call: call.is_channels_last),
)
_POINTWISE = (_BATCH, _ONE_GROUP, _TAP, _STRIDE, *_PLAIN, _FEW, _DEVICE)
_IMPLICIT_GEMM = (
    _BATCH,
    _ONE_GROUP,
    Condition("padding in pixels", lambda call: call.padding != "same"),
    _FEW,
    _DEVICE,
)
_MATMUL = (_BATCH, _ONE_GROUP, _TAP, Condition("stride 1", lambda call: call.stride == (1, 1)), *_PLAIN)
_WHERE_TUNED = "where `jdkd tune` found it faster"


def _when(*conditions: Condition) -> str:
    return f"{', '.join(condition.words for condition in conditions)}; {ON_REQUEST}"


def region(call: ConvCall) -> str | None:
    """What calls have in common for which `jdkd tune` chooses alike; None for those that it does not time.

    One group: 1x1 or 3x3, at stride 1 or 2 in both directions, leading or listed channels; by dtype, layout and the
    classes into which :data:`POSITIONS` and :data:`WEIGHTS` divide the sizes of the product. Several groups, as of
    depthwise convolutions, are one region in a dtype, as no kernel but ATen takes them.
    """
    if call.groups > 1:
        return f"several groups, {dtype_name(call.dtype)}"
    (taps, across), (step, sideways) = call.kernel, call.stride
    is_usual = taps == across and step == sideways and taps in TAPS and step in STRIDES
    if not is_usual or not call.is_batch or call.padding == "same":
        return None
    layout = "channels-last" if call.is_channels_last else "contiguous"
    positions, inputs, outputs = call.product[2:]
    sizes = f"{_class(positions, POSITIONS)} positions, {_class(inputs * outputs, WEIGHTS)} weights a tap"
    window = f"{'listed ' if call.is_listed else ''}{taps}x{taps}, stride {step}"
    return f"{window}, {dtype_name(call.dtype)}, {layout}, {sizes}"


def _class(size: int, ends: Sequence[int]) -> str:
    """The class of a size, in words; its bounds are compared, as a compiler's symbols can be."""
    for end in ends:
        if size < end:
            return f"<{end}"
    return f">={ends[-1]}"


KERNELS = (
    Candidate(
        "pointwise",
        "one matrix product with the shared weight where it lies, the bias in the same pass",
        _when(*_POINTWISE),
        all_of(*_POINTWISE),
        _backend.Kernel("elastic_pointwise", "triton"),
        _on_request,
    ),
    Candidate(
        "implicit_gemm",
        "the active filters are read where they lie, through lists too, and never copied",
        _when(*_IMPLICIT_GEMM),
        all_of(*_IMPLICIT_GEMM),
        _backend.Kernel("elastic_conv", "triton"),
        _on_request,
    ),
    Candidate(
        "matmul",
        "a 1x1 convolution as ATen's matrix product with a view of the weight",
        f"{', '.join(condition.words for condition in _MATMUL)}; {_WHERE_TUNED}",
        all_of(*_MATMUL),
        waits=lambda call: _WHERE_TUNED,
    ),
    Candidate(
        "aten",
        "ATen on the active part: a view of leading channels, a copy of listed ones; it measured fastest on a CPU, and "
        "nothing was measured on a GPU",
    ),
)
TABLE = Table(NAME, KERNELS, region)


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
        What :func:`select` takes.
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
        Name of a row of :data:`TABLE`.

    Raises:
        InputError: if ``use_backend`` or ``JDKD_BACKEND`` asks for a backend that cannot run here.
    """
    if torch.compiler.is_compiling() or _backend.requested() is not None:
        return TABLE.choose(call)[0].name
    return TABLE.remembered(call, call)


def name_of(
    x: Tensor,
    inputs: Channels,
    outputs: Channels,
    kernel: Sequence[int],
    stride: int | Sequence[int],
    padding: Padding,
    dilation: int | Sequence[int],
    groups: int,
) -> str:
    """:func:`select` of :func:`call_of`, kept by what they look at, so that a choice that is made costs a lookup.

    Args:
        x, inputs, outputs, kernel, stride, padding, dilation, groups: as of :func:`call_of`.
    """
    given = inputs, outputs, kernel, stride, padding, dilation, groups
    is_unusual = torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type) or list in map(type, given)
    if is_unusual or _backend.requested() is not None:
        return select(call_of(x, *given))
    is_listed = inputs.index is not None or outputs.index is not None
    key = (x.shape, x.stride(), x.dtype, x.device, inputs.count, outputs.count, is_listed, *given[2:])
    if (found := _dispatch.settled.get(key)) is None:
        call = call_of(x, *given)
        found = select(call)
        if call in _dispatch.settled and len(_dispatch.settled) < 1024:
            _dispatch.settled[key] = found
    return found


def explain(call: ConvCall) -> tuple[str, str, tuple[tuple[str, str], ...]]:
    """Says why a call takes its kernel.

    Args:
        call: what :func:`call_of` says of it.

    Returns:
        Name of the kernel; from where the choice comes and what speaks for it; name of every other kernel, and why it
        is not taken.

    Raises:
        InputError: as :func:`select`.
    """
    kernel, source, others = TABLE.explain(call)
    return kernel.name, f"{source}; {kernel.why}", others


def within(
    x: Tensor,
    out_shape: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    is_listed: bool,
    form: str,
) -> ConvCall:
    """Describes the convolution that an operator computes.

    Args:
        x: ``[N, Cin, H, W]``.
        out_shape: ``[N, Cout, OH, OW]``.
        kernel, stride, padding: active taps and pixels, vertical and horizontal.
        is_listed: whether channels are listed.
        form: ``"forward"`` or ``"gradient"``.
    """
    n, out_channels, height, width = out_shape
    product = Product(x.device, x.dtype, n * height * width, x.shape[1], out_channels)
    return ConvCall(product, pair(kernel), pair(stride), pair(padding), 1, is_listed, is_channels_last(x), True, form)


def kernel_runs(name: str, call: ConvCall) -> bool:
    """Whether an operator runs a Triton kernel, its tensors being what that kernel takes.

    Args:
        name: of the kernel.
        call: of the operator, with the form that runs.

    Returns:
        True if the kernel was asked for, whatever the table says of the call; or if it measured fastest here and was
        seen right.

    Raises:
        InputError: if the backend that was asked for cannot run here.
    """
    if call.device.type not in _DEVICES or not 0 < call.product.positions < _LIMIT:
        return False
    kernel = next(row.kernel for row in KERNELS if row.name == name)
    if asked := kernel.asked(call):
        return asked == kernel.backend
    return not only_aten(call.device) and select(call) == name


def only_aten(device: torch.device) -> bool:
    """Whether no kernel was asked for and none measured fastest on a device, the usual case, at once; or the call is
    looked into, by ``torch.export`` or ``torch.func``: they know ATen's gradient and no other."""
    return (_backend.requested() is None and not _tuned.has_winners(NAME, device)) or is_looked_into()


# What torch.compiler.assume_constant_result sets; calling that would load the whole compiler, and triton with it.
only_aten._dynamo_marked_constant = True


def _by(numbers: tuple[int, int]) -> str:
    return f"{numbers[0]}x{numbers[1]}"
