"""Shapes of the Pearson loss: the backends of its operators, both ways and with heads, and the single pass.

Levels come in threes, each with a quarter of the positions of the one before; the first one's size is what regions go
by.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jdkd import _backend
from jdkd.ops import pearson_forms
from jdkd.ops.pearson_forms import LossCall
from jdkd.tune.shapes import DTYPES, LAYOUTS, Shape, on_backend

OP = "pearson"
CHANNELS = 64
BYTES = (64 << 10, 768 << 10, 1536 << 10, 12 << 20, 20 << 20)  # of the first level; both ends of each region


class Inputs(NamedTuple):
    """Levels ``[N, C, H, W]`` of both sides, gradients of heads, and what a backward is given besides."""

    students: list[Tensor]
    teachers: list[Tensor]
    heads: list[Tensor]
    table: Tensor  # [5, sum of C]
    dloss: Tensor  # []


def backends(device: torch.device, quick: bool) -> Iterator[Shape]:
    """The loss, its gradient, and the gradient with that of heads, by dtype, layout and size."""
    for dtype in DTYPES[device.type][: 1 if quick else None]:
        for layout in LAYOUTS:
            for size in BYTES:
                for form in ("loss", "gradient", "tap"):
                    yield of_backends(device, dtype, layout, sizes(size // dtype.itemsize), form)


def of_backends(
    device: torch.device,
    dtype: torch.dtype,
    layout: torch.memory_format,
    shapes: Sequence[tuple[int, int, int, int]],
    form: str,
) -> Shape:
    """A form of the operators.

    Args:
        device, dtype, layout: of the levels.
        shapes: of the levels, ``(N, C, H, W)``.
        form: ``"loss"``, ``"gradient"``, or ``"tap"``, with the gradients of heads.
    """
    first = torch.empty(shapes[0], dtype=dtype, device="meta", memory_format=layout)
    run = {"loss": _forward, "gradient": _backward, "tap": partial(_backward, tapped=True)}[form]
    return Shape(
        _backend.table_of(OP),
        _backend.Call(form, device, dtype, first),
        f"{'x'.join(map(str, shapes[0]))} and {len(shapes) - 1} levels more",
        partial(drawn, shapes, dtype, layout, device),
        {name: on_backend(name, run) for name in _backend.available(OP)},
    )


def single_pass(device: torch.device, quick: bool) -> Iterator[Shape]:
    """The single pass against the split form, loss and gradient; it can run where levels fit on the chip or a cache."""
    for dtype in DTYPES[device.type][: 1 if quick else None]:
        for size in BYTES:
            yield of_forms(device, dtype, sizes(size // dtype.itemsize))


def of_forms(device: torch.device, dtype: torch.dtype, shapes: Sequence[tuple[int, int, int, int]]) -> Shape:
    """The forms of the loss of contiguous levels, with its gradient; arguments as of :func:`of_backends`."""
    levels = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
    return Shape(
        pearson_forms.TABLE,
        LossCall(levels, levels, "students"),
        f"{'x'.join(map(str, shapes[0]))} and {len(shapes) - 1} levels more",
        partial(drawn, shapes, dtype, torch.contiguous_format, device),
        {"split": _split, "single pass": _single},
    )


def sizes(numel: int) -> list[tuple[int, int, int, int]]:
    """Three levels of one image, the first of about so many elements."""
    side = max(4, int(math.sqrt(numel / CHANNELS)))
    return [(1, CHANNELS, max(1, side >> level), max(1, side >> level)) for level in range(3)]


def drawn(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, layout: torch.memory_format, device: torch.device
) -> Inputs:
    """Features that correlate by 0.6 and, for all that is not a number of theirs, what a forward gives a backward."""

    def given(level: Tensor) -> Tensor:
        return level.to(dtype).contiguous(memory_format=layout)

    students = [torch.randn(shape, device=device) for shape in shapes]
    teachers = [given(0.6 * student + 0.8 * torch.randn_like(student)) for student in students]
    heads = [given(torch.randn_like(student)) for student in students]
    students = [given(student) for student in students]
    loss, _, table, _ = _forward(Inputs(students, teachers, [], torch.empty(0), torch.empty(0)))
    return Inputs(students, teachers, heads, table[0], torch.ones_like(loss))


def _forward(given: Inputs) -> Any:
    return torch.ops.jdkd.pearson_fwd(given.students, given.teachers, [1.0] * len(given.students), 1e-6, False)


def _backward(given: Inputs, tapped: bool = False) -> Any:
    heads = given.heads if tapped else []
    return torch.ops.jdkd.pearson_bwd(given.dloss, given.students, given.teachers, given.table, heads)


def _split(given: Inputs) -> Any:
    loss, _, table, _ = _forward(given)
    return loss, _backward(given._replace(table=table[0]))


def _single(given: Inputs) -> Any:
    levels = given.students, given.teachers
    pearson_forms.looked_up(LossCall(*levels, "students"))  # as it is where a measurement takes this form
    loss, _, _, gradients = torch.ops.jdkd.pearson_single(*levels, [1.0] * len(given.students), 1e-6, False)
    torch.ops.jdkd.pearson_scale_(gradients, given.dloss)
    return loss, gradients
