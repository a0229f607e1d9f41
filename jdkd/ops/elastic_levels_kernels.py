"""Which kernel convolves the levels of a pyramid, and what is refused: see :mod:`jdkd.ops.elastic_levels`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from jdkd import _backend
from jdkd._dispatch import Candidate, Condition, Table, all_of, is_tuned, nobody_asks
from jdkd._verdicts import dtype_name
from jdkd.errors import InputError
from jdkd.ops.elastic_kernels import ON_REQUEST, dtype_of
from jdkd.ops.kernel_size import Padding, pair
from jdkd.ops.layout import empty_channels_last, size_class
from jdkd.ops.transforms import is_looked_into

OP = "elastic_levels"
ACTIVATIONS = ("none", "relu")
MAX_PIXELS = 2**30 - 2  # of a level in the Triton kernel, at its input and at its output


class LevelsCall(NamedTuple):
    """What the choice of a kernel depends on: levels ``[N, Cin, H, W]``, active taps, and their padding in pixels."""

    xs: Sequence[Tensor]
    size: tuple[int, int]
    pixels: tuple[int, int]

    @property
    def device(self) -> torch.device:
        return self.xs[0].device

    @property
    def dtype(self) -> torch.dtype:
        return dtype_of(self.xs[0])

    @property
    def form(self) -> str:
        return "forward"

    @property
    def pixels_of_levels(self) -> list[int]:
        """The larger one of the input's and the output's, of each level."""
        sizes = [(x.shape, [x.shape[2 + d] + 2 * self.pixels[d] - self.size[d] + 1 for d in (0, 1)]) for x in self.xs]
        return [shape[0] * max(shape[2] * shape[3], out[0] * out[1]) for shape, out in sizes]


def _region(call: LevelsCall) -> str:
    """What levels have in common for which `jdkd tune` chooses alike: taps, dtype and bytes of all levels."""
    first = call.xs[0]
    size = sum(x.shape[0] * x.shape[1] * x.shape[2] * x.shape[3] for x in call.xs) * first.element_size()
    return f"{call.size[0]}x{call.size[1]}, {dtype_name(call.dtype)}, {size_class(size)}"


_DEVICE = Condition("tensors on cuda or cpu", lambda call: call.device.type in ("cuda", "cpu"))
_SMALL = Condition(f"up to {MAX_PIXELS} pixels a level", lambda call: max(call.pixels_of_levels) <= MAX_PIXELS)

KERNELS = (
    Candidate(
        OP,
        "one launch for all levels",
        ON_REQUEST,
        all_of(_DEVICE, _SMALL),
        _backend.Kernel(OP, "triton"),
        lambda call: None if not _DEVICE.holds(call) else ON_REQUEST,
    ),
    Candidate("aten", "ATen level by level on the active part, which is taken once for all levels"),
)
TABLE = Table(OP, KERNELS, _region)


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
    kernel, source, others = TABLE.explain(LevelsCall(xs, size, pixels))
    return kernel.name, f"{source}; {kernel.why}", others


def kernel_runs(xs: Sequence[Tensor], size: Sequence[int], pixels: Sequence[int]) -> bool:
    """Whether the Triton kernel takes levels; a compiled graph keeps its first answer.

    Args:
        xs: levels ``[N, Cin, H, W]``.
        size: active taps, vertical and horizontal.
        pixels: of padding, likewise.
    """
    if nobody_asks() and not is_tuned(OP, xs[0].device):
        return False
    return not is_looked_into() and TABLE.choose(LevelsCall(xs, tuple(size), tuple(pixels)))[0].name == OP


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


def empty_outputs(
    xs: Sequence[Tensor], out_channels: int, kernel: Sequence[int], padding: Sequence[int]
) -> list[Tensor]:
    """Memory for the results of levels ``[N, Cin, H, W]`` at stride 1: ``[N, Cout, OH, OW]`` each."""
    sizes = [[x.shape[2 + d] + 2 * padding[d] - kernel[d] + 1 for d in (0, 1)] for x in xs]
    return [empty_channels_last(x, x.shape[0], out_channels, *size) for x, size in zip(xs, sizes, strict=True)]
