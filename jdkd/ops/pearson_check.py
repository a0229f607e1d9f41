"""What the kernels of the Pearson loss are held to on the device at hand, against the closed form in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from jdkd._verdicts import ALLOWED, Compared
from jdkd.reference import pearson as reference

# Odd planes, one longer than a chunk of any kernel, and one that is whole vectors: five levels, as a pyramid has.
_SHAPES = ((2, 5, 13, 11), (1, 3, 95, 97), (2, 64, 8, 8), (3, 7, 5, 3), (1, 2, 1, 3))
_WEIGHTS = [1.0, 0.5, 2.0, 1.0, 3.0]
_SLOPE = 1024.0  # incoming gradient, with which those of float16 are no subnormal numbers
_FLOAT32 = ALLOWED[torch.float32]

Levels = list[Tensor]


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Levels, Levels]]:
    """Students and teachers in both layouts, at aligned and at odd addresses, and of two dtypes.

    Yields:
        What the case is; levels ``[N, C, H, W]``; levels of the same shapes.
    """
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = [torch.randn((2, *shape), generator=generator, dtype=torch.float32, device="cpu") for shape in _SHAPES]
    for channels_last, shift, theirs in (
        (False, 0, dtype), (True, 0, dtype), (False, 1, dtype), (True, 1, dtype), (False, 0, other),
    ):  # fmt: skip
        students = [_laid_out(2 * s + 3, device, dtype, channels_last, shift) for s, _ in drawn]
        teachers = [_laid_out(0.6 * s + t - 1, device, theirs, channels_last, shift) for s, t in drawn]
        layout, address = "channels-last" if channels_last else "contiguous", "odd" if shift else "aligned"
        yield f"{layout}, {address} addresses, teacher {str(theirs).removeprefix('torch.')}", students, teachers


def _laid_out(values: Tensor, device: torch.device, dtype: torch.dtype, channels_last: bool, shift: int) -> Tensor:
    """Values in memory that begins ``shift`` elements after an aligned address, in garbage."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    strides = values.contiguous(memory_format=layout).stride()
    memory = torch.full((values.numel() + 64,), torch.nan, dtype=dtype, device=device)
    return memory.as_strided(values.shape, strides, shift).copy_(values)


def _exact(students: Levels, teachers: Levels) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward in float64."""
    return reference.pearson_fwd([s.double() for s in students], [t.double() for t in teachers], _WEIGHTS)


def _gradients(x: Levels, y: Levels, coefficients: Tensor, dloss: float = 1.0) -> Levels:
    """The gradients in float64."""
    x, y = [level.double() for level in x], [level.double() for level in y]
    return reference.pearson_bwd(coefficients.new_full((), dloss, dtype=torch.float64), x, y, coefficients.double())


def _table(what: str, table: Tensor, exact: Tensor, students: Levels, teachers: Levels) -> Iterator[Compared]:
    """A table by what it is for: the gradients that are made of it."""
    for side, (x, y) in enumerate(((students, teachers), (teachers, students))):
        ours, right = _gradients(x, y, table[side]), _gradients(x, y, exact[side])
        for i, (dx, dx_exact) in enumerate(zip(ours, right, strict=True)):
            yield Compared(f"table of level {i}, side {side}, {what}", dx, dx_exact, allowed=_FLOAT32)


def loss(forward: Callable[..., Any], device: torch.device, dtype: torch.dtype) -> Iterator[Compared]:
    """Checks statistics and finish: a function with the signature of ``jdkd::pearson_fwd``."""
    for what, students, teachers in cases(device, dtype):
        value, losses, table, moments = forward(students, teachers, _WEIGHTS, reference.EPS, False)
        exact = _exact(students, teachers)
        yield Compared(f"loss, {what}", value, exact[0])
        yield Compared(f"losses, {what}", losses, exact[1])
        rows = exact[3].abs().amax(1, keepdim=True)  # [6, 1]
        yield Compared(f"moments, {what}", moments, exact[3], unit=rows, allowed=_FLOAT32)
        yield from _table(what, table, exact[2], students, teachers)


def gradient(backward: Callable[..., Any], device: torch.device, dtype: torch.dtype) -> Iterator[Compared]:
    """Checks the gradient of one side: a function with the signature of ``jdkd::pearson_bwd``."""
    yield from _backward(backward, device, dtype, tapped=False)


def tap(backward: Callable[..., Any], device: torch.device, dtype: torch.dtype) -> Iterator[Compared]:
    """Checks the gradient with what the heads send, likewise."""
    yield from _backward(backward, device, dtype, tapped=True)


def _backward(
    backward: Callable[..., Any], device: torch.device, dtype: torch.dtype, tapped: bool
) -> Iterator[Compared]:
    for what, students, teachers in cases(device, dtype):
        table = _exact(students, teachers)[2]
        dloss = torch.full((), _SLOPE, dtype=torch.float32, device=device)
        heads = [level.flip(0) / 4 for level in students] if tapped else []
        heads = [torch.empty_like(level).copy_(head) for level, head in zip(students, heads, strict=False)]
        ours = backward(dloss, students, teachers, table[0].float(), heads)
        for i, (dx, right) in enumerate(zip(ours, _gradients(students, teachers, table[0], _SLOPE), strict=True)):
            right = right + heads[i].double() if tapped else right
            yield Compared(f"gradient of level {i}, {what}", dx, right)


def single_pass(single: Callable[..., Any], device: torch.device, dtype: torch.dtype) -> Iterator[Compared]:
    """Checks loss and gradient in one pass: a function with the signature of ``jdkd::pearson_single``."""
    for what, students, teachers in cases(device, dtype):
        if not students[0].is_contiguous() or teachers[0].dtype != dtype:
            continue
        value, losses, table, gradients = single(students, teachers, _WEIGHTS, reference.EPS, False)
        exact = _exact(students, teachers)
        yield Compared(f"loss, {what}", value, exact[0])
        yield Compared(f"losses, {what}", losses, exact[1])
        for i, (dx, right) in enumerate(zip(gradients, _gradients(students, teachers, exact[2][0]), strict=True)):
            yield Compared(f"gradient of level {i}, {what}", dx, right)
        yield from _table(what, table, exact[2], students, teachers)


def scale(scale_: Callable[..., None], device: torch.device, dtype: torch.dtype) -> Iterator[Compared]:
    """Checks the factor on finished gradients: a function with the signature of ``jdkd::pearson_scale_``."""
    for what, gradients, _ in cases(device, dtype):
        dloss = torch.full((), 3.0, dtype=torch.float32, device=device)
        exact = [3 * gradient.double() for gradient in gradients]
        scale_(gradients, dloss)
        for i, (ours, right) in enumerate(zip(gradients, exact, strict=True)):
            yield Compared(f"gradient {i}, {what}", ours, right)
