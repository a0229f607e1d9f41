"""Which kernel convolves the levels of a pyramid, and what is refused: see :mod:`jdkd.ops.elastic_levels`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from jdkd import _backend, _dispatch
from jdkd.errors import InputError
from jdkd.ops.elastic_kernels import ON_REQUEST, dtype_of
from jdkd.ops.kernel_size import Padding, pair
from jdkd.ops.transforms import is_looked_into

OP = "elastic_levels"
ACTIVATIONS = ("none", "relu")
_DEVICES = ("cuda", "cpu")  # where the Triton kernel can run


class LevelsCall(NamedTuple):
    """What the choice of a kernel depends on: levels ``[N, Cin, H, W]``, active taps, and their padding in pixels."""

    xs: Sequence[Tensor]
    size: tuple[int, int]
    pixels: tuple[int, int]


class LevelsKernel(NamedTuple):
    """One way to convolve all levels; see :class:`jdkd._dispatch.Implementation`."""

    name: str
    when: str
    why: str
    why_not: Callable[[LevelsCall], str | None]


def _why_not_triton(call: LevelsCall) -> str | None:
    """Why the Triton kernel does not run, or None if it does."""
    xs = call.xs
    if xs[0].device.type not in _DEVICES:
        return f"it takes tensors on {' or '.join(_DEVICES)}"
    if _selected(xs[0].device.type, dtype_of(xs[0])) != "triton":
        asked = _backend.requested()
        return f"the backend {asked} was asked for" if asked in _backend.explain(OP) else ON_REQUEST
    from jdkd.kernels.elastic_levels import MAX_PIXELS, small

    images = [torch.empty_like(x, device="meta") for x in xs]
    ys = empty_outputs(images, 1, call.size, call.pixels)
    return None if small(images, ys) else f"it takes up to {MAX_PIXELS} pixels a level"


KERNELS = (
    LevelsKernel(OP, ON_REQUEST, "it was asked for; one launch for all levels", _why_not_triton),
    LevelsKernel(
        "aten",
        "everything else",
        "ATen level by level on the active part, which is taken once for all levels",
        lambda call: None,
    ),
)


def explain(
    xs: Sequence[Tensor], device: torch.device, in_channels: int, size: tuple[int, int], padding: Padding,
    activation: str,
) -> tuple[str, str, tuple[tuple[str, str], ...]]:  # fmt: skip
    """Says which kernel :func:`jdkd.ops.elastic_levels.convolve_levels` takes, and why; nothing is computed.

    Args:
        xs: levels ``[N, Cin, H, W]``; their values are not looked at.
        device: of the weight; that of the levels too, unless it is the meta device.
        in_channels: active.
        size: active taps, vertical and horizontal.
        padding: of the active kernel, in pixels, or ``"same"`` or ``"valid"``.
        activation: one of :data:`ACTIVATIONS`.

    Returns:
        Name of the kernel; what speaks for it; name of the other one, and why it is not taken.

    Raises:
        InputError: as the convolution.
    """
    pixels = pixels_of(padding, size)
    on_meta = any(x.is_meta for x in xs)
    check_levels(xs, torch.device("meta") if on_meta else device, in_channels, size, pixels, activation)
    kernel, others = _dispatch.explain(KERNELS, LevelsCall(xs, size, pixels))
    return kernel.name, kernel.why, others


def kernel_runs(x: Tensor) -> bool:
    """Whether the Triton kernel was asked for and takes ``x``; a compiled graph keeps its first answer."""
    if x.device.type not in _DEVICES or is_looked_into():
        return False
    if torch.compiler.is_compiling():
        return _selected(x.device.type, x.dtype) == "triton"
    return _backend.select(OP, x, "forward") == "triton"


def _selected(device: str, dtype: torch.dtype) -> str:
    return _backend.select(OP, torch.empty(0, device=device, dtype=dtype), "forward")


# What torch.compiler.assume_constant_result sets; calling that would load the whole compiler, and triton with it.
_selected._dynamo_marked_constant = True


def pixels_of(padding: Padding, size: tuple[int, int]) -> tuple[int, int]:
    """Padding of a kernel in pixels; raises InputError on what has none."""
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise InputError(f'padding={padding!r}; give pixels, "same" or "valid"')
        if padding == "same" and not size[0] % 2 == size[1] % 2 == 1:
            raise InputError(f"padding='same' needs an odd kernel and this one is {size[0]}x{size[1]}; give pixels")
        return (size[0] // 2, size[1] // 2) if padding == "same" else (0, 0)
    pixels = pair(padding)
    if min(pixels) < 0:
        raise InputError(f"padding={padding!r}; give no fewer than 0 pixels")
    return pixels


def check_levels(
    xs: Sequence[Tensor], device: torch.device, channels: int, size: tuple[int, int], pixels: tuple[int, int],
    activation: str,
) -> None:  # fmt: skip
    """Raises InputError on what no backend takes."""
    if activation not in ACTIVATIONS:
        raise InputError(f"activation={activation!r}; choose one of {', '.join(ACTIVATIONS)}")
    if not isinstance(xs, list | tuple) or not xs:
        kind = "single tensor" if isinstance(xs, Tensor) else type(xs).__name__
        what = "no level" if isinstance(xs, list | tuple) else f"a {kind}"
        raise InputError(f"xs is {what}; give a list of levels [N, Cin, H, W]")
    for i, x in enumerate(xs):
        if not isinstance(x, Tensor):
            raise InputError(f"level {i} is a {type(x).__name__}; give floating tensors [N, Cin, H, W]")
        if x.dim() != 4 or not x.is_floating_point():
            raise InputError(f"level {i} is a {x.dim()}-dimensional {x.dtype} tensor; give floating [N, Cin, H, W]")
        if x.dtype != xs[0].dtype or x.device != xs[0].device:
            raise InputError(
                f"level {i} is {x.dtype} on {x.device} and level 0 {xs[0].dtype} on {xs[0].device}; give all levels "
                "one dtype on one device"
            )
        if x.shape[1] != channels:
            raise InputError(
                f"level {i} has {x.shape[1]} channels but {channels} input channels are active; activate as many as it "
                "has"
            )
        if any(x.shape[2 + d] + 2 * pixels[d] < size[d] for d in (0, 1)):
            raise InputError(
                f"level {i} is {x.shape[2]}x{x.shape[3]} pixels, less than the {size[0]}x{size[1]} kernel under "
                f"padding={pixels}; pad more, or leave the level out"
            )
    if device != xs[0].device:
        raise InputError(f"the levels are on {xs[0].device} and weight on {device}; move one of them")


def empty_channels_last(like: Tensor, *shape: int) -> Tensor:
    """New memory of a dtype and device, ``[N, C, H, W]``."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def empty_outputs(
    xs: Sequence[Tensor], out_channels: int, kernel: Sequence[int], padding: Sequence[int]
) -> list[Tensor]:
    """Memory for the results of levels ``[N, Cin, H, W]`` at stride 1: ``[N, Cout, OH, OW]`` each."""
    sizes = [[x.shape[2 + d] + 2 * padding[d] - kernel[d] + 1 for d in (0, 1)] for x in xs]
    return [empty_channels_last(x, x.shape[0], out_channels, *size) for x, size in zip(xs, sizes, strict=True)]
