"""What the kernels that pack weights are held to on the device at hand, against plain indexing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from jdkd._verdicts import ALLOWED, Compared
from jdkd.ops.pack_table import dense_views, packed_views
from jdkd.reference import pack as reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Shape, channels-last or not, active rows and columns (lists, or leading ones), kernel: every mode of a part, odd
# sizes, one beyond a piece, whole vectors; a stem, a 1x1, a depthwise, a linear layer and a bias.
_PARTS = (
    ((16, 3, 7, 7), False, 9, 3, (7, 7)),
    ((40, 40, 3, 3), False, 33, 39, (3, 3)),
    ((32, 32, 1, 1), True, 16, 24, (1, 1)),
    ((20, 24, 5, 5), True, 7, [5, 4, 23], (3, 1)),
    ((24, 1, 3, 3), False, [23, 1, 7], 1, (3, 3)),
    ((96, 80), False, 90, 80, (1, 1)),
    ((11, 9), False, [3, 0, 10], [8, 1], (1, 1)),
    ((27,), False, 13, 1, (1, 1)),
)


class Problem:
    """Shared weights of one dtype and what is active of them, as the operators take it.

    Args:
        device: where they lie.
        dtype: of the weights.
        shift: elements by which every weight lies off an aligned address.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, shift: int) -> None:
        self._generator = torch.Generator("cpu").manual_seed(0)
        self.device = device
        self.weights = [self.drawn(shape, dtype, is_last, shift) for shape, is_last, *_ in _PARTS]
        self.rows, self.columns = ([_index(part[place], device) for part in _PARTS] for place in (2, 3))
        self.sizes = [n for *_, rows, columns, kernel in _PARTS for n in (_count(rows), _count(columns), *kernel)]
        self.parts = self.rows, self.columns, self.sizes

    def drawn(self, shape: tuple[int, ...], dtype: torch.dtype, is_last: bool, shift: int) -> Tensor:
        values = torch.randn(shape, generator=self._generator, dtype=torch.float32, device="cpu")
        if is_last:
            values = values.contiguous(memory_format=torch.channels_last)
        memory = torch.empty(values.numel() + 64, dtype=dtype, device=self.device)
        return memory.as_strided(shape, values.stride(), shift).copy_(values)

    def packed(self, dtype: torch.dtype) -> list[Tensor]:
        """Gradients of the packed weights."""
        shapes = [(*self.sizes[4 * i : 4 * i + 4],)[: weight.dim()] for i, weight in enumerate(self.weights)]
        return [self.drawn(shape, dtype, len(shape) == 4, 0) for shape in shapes]

    def plainly(self) -> tuple[list, list, list]:
        """What is active as the reference takes it."""
        sides = [
            [n if index is None else index for index, n in zip(side, self.sizes[first::4], strict=True)]
            for first, side in enumerate((self.rows, self.columns))
        ]
        return *sides, list(zip(self.sizes[2::4], self.sizes[3::4], strict=True))


def _index(active: int | list[int], device: torch.device) -> Tensor | None:
    return None if isinstance(active, int) else torch.tensor(active, dtype=torch.int64, device=device)


def _count(active: int | list[int]) -> int:
    return active if isinstance(active, int) else len(active)


def pack(run: Callable[..., Tensor], device: torch.device, dtype: torch.dtype) -> Iterator[Compared]:
    """Checks a function with the signature of ``jdkd::pack``."""
    for problem, shift, packed in _problems(device, dtype):
        buffer = run(problem.weights, *problem.parts, packed)
        exact = reference.pack([w.double() for w in problem.weights], *problem.plainly(), torch.float64)
        for i, (ours, right) in enumerate(
            zip(packed_views(buffer, problem.weights, problem.sizes), exact, strict=True)
        ):
            yield Compared(_words(i, shift, packed), ours, right)


def unpack(run: Callable[..., Tensor], device: torch.device, dtype: torch.dtype) -> Iterator[Compared]:
    """Checks a function with the signature of ``jdkd::unpack``."""
    for problem, shift, packed in _problems(device, dtype):
        gradients = problem.packed(packed)
        buffer = run(gradients, problem.weights, *problem.parts)
        exact = [torch.zeros_like(weight, dtype=torch.float64) for weight in problem.weights]
        yield from _added(dense_views(buffer, problem.weights), exact, problem, gradients, shift, packed)


def unpack_add_(run: Callable[..., None], device: torch.device, dtype: torch.dtype) -> Iterator[Compared]:
    """Checks a function with the signature of ``jdkd::unpack_add_``."""
    for problem, shift, packed in _problems(device, dtype):
        gradients = problem.packed(packed)
        exact = [weight.double() for weight in problem.weights]
        run(problem.weights, *problem.parts, gradients)
        yield from _added(problem.weights, exact, problem, gradients, shift, packed)


def _problems(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Problem, int, torch.dtype]]:
    for packed in _DTYPES:
        for shift in (0, 1):
            yield Problem(device, dtype, shift), shift, packed


def _added(
    ours: list[Tensor], exact: list[Tensor], problem: Problem, packed: list[Tensor], shift: int, dtype: torch.dtype
) -> Iterator[Compared]:
    """Results that a packed gradient was added to, inactive elements included."""
    reference.unpack_add_(exact, *problem.plainly(), [part.double() for part in packed])
    for i, (found, right) in enumerate(zip(ours, exact, strict=True)):
        yield Compared(_words(i, shift, dtype), found, right, allowed=ALLOWED[found.dtype])


def _words(part: int, shift: int, packed: torch.dtype) -> str:
    address = "an odd address" if shift else "an aligned address"
    return f"part {part} {_PARTS[part][0]}, packed {str(packed).removeprefix('torch.')}, at {address}"
