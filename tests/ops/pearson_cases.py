"""What the tests of the Pearson loss share: inputs with a known difficulty, and the 2x rule applied to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from jdkd import _backend
from jdkd.functional import pearson_tap, pkd_loss
from jdkd.reference import pearson as reference
from jdkd.testing import assert_within_twice

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WEIGHT = 6.0


@dataclass(frozen=True)
class Case:
    """Students of mean ``mean`` and deviation ``spread``; teachers with correlation ``r`` to them.

    ``change`` edits the student levels, float64 ``[N, C, H, W]``, after they are drawn. ``loss_unit``: the loss may err
    by this many float32 roundings whatever its size; the loss lies in [0, 2] times the weight.
    """

    shapes: tuple[tuple[int, int, int, int], ...] = ((2, 3, 9, 7), (1, 2, 5, 1))
    mean: float = 0.0
    spread: float = 1.0
    r: float = 0.5
    upstream: float = 3.0
    loss_unit: float = 1e-2
    change: Callable[[Tensor], None] | None = None
    dtype: torch.dtype = torch.float32
    teacher_dtype: torch.dtype | None = None
    channels_last: bool = False

    def levels(self, device: str = "cpu") -> tuple[list[Tensor], list[Tensor]]:
        """Draws the students and teachers, leaves that require grad."""
        generator = torch.Generator().manual_seed(0)
        sides: tuple[list[Tensor], list[Tensor]] = ([], [])
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        for shape in self.shapes:
            noise = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
            student = self.mean + self.spread * noise[0]
            if self.change:
                self.change(student)
            teacher = self.mean + self.r * (student - self.mean) / self.spread + (1 - self.r**2) ** 0.5 * noise[1]
            dtypes = self.dtype, self.teacher_dtype or self.dtype
            for side, level, dtype in zip(sides, (student, teacher), dtypes, strict=True):
                side.append(level.to(device, dtype).contiguous(memory_format=layout).requires_grad_())
        return sides

    def __str__(self) -> str:
        return f"{str(self.dtype)[6:]}-{'nhwc' if self.channels_last else 'nchw'}"


def _constant_channels(level: Tensor) -> None:
    level[:, 0] = 0.7


def _padded_corner(level: Tensor) -> None:
    n = level.shape[2] // 2 + 1
    level[:, :, :n] = 0


def _still_background(level: Tensor) -> None:
    level[:, :, :-10] *= 1e-6
    level[:, :, -9:] *= 1e-6


def _outlier(level: Tensor) -> None:
    level[0, :, 0, 0] += 100


PLAIN = Case()
CASES = {
    "odd_sizes": PLAIN,
    "uncorrelated": Case(r=0.0),
    "anticorrelated": Case(r=-0.9),
    "many_tiles_and_chunks": Case(shapes=((1, 2, 110, 90),), mean=1.0, r=0.8),
    "channels_in_several_blocks": Case(shapes=((1, 67, 3, 5), (1, 3, 19, 15)), mean=0.5),
    "large_mean": Case(shapes=((2, 3, 40, 41),), mean=300.0),
    "almost_equal": Case(shapes=((2, 3, 31, 33),), r=1 - 5e-7),
    "almost_equal_and_large_mean": Case(shapes=((2, 3, 31, 33),), mean=300.0, r=1 - 5e-7),
    # A chunk that begins with a constant tile has no estimate of beta, and the usual error of a closed form, 1e-7.
    "padded_corner": Case(shapes=((1, 2, 110, 50),), mean=300.0, loss_unit=1.0, change=_padded_corner),
    # The teacher varies everywhere, the student in one row, which is in no first tile and no sample of a chunk.
    "still_background": Case(shapes=((1, 2, 110, 90),), r=0.9, loss_unit=1.0, change=_still_background),
    "outlier": Case(shapes=((1, 3, 50, 50),), change=_outlier),
    "zero_variance": Case(shapes=((2, 3, 9, 7),), upstream=0.01, change=_constant_channels),
    "tiny_spread": Case(shapes=((2, 3, 9, 7),), spread=1e-6, upstream=0.01),
    "one_element_and_1x1": Case(shapes=((1, 4, 1, 1), (2, 5, 1, 1), (3, 1, 1, 1))),
}


def variants() -> list[Case]:
    """The plain case in every dtype and layout."""
    return [replace(PLAIN, dtype=dtype, channels_last=last) for dtype in DTYPES for last in (False, True)]


def like(case: Case, variant: Case) -> Case:
    """``case`` in the dtype and layout of ``variant``."""
    return replace(case, dtype=variant.dtype, channels_last=variant.channels_last)


def eager(students: Sequence[Tensor], teachers: Sequence[Tensor], dtype: torch.dtype, upstream: float) -> list[Tensor]:
    """Loss and gradients of the formula as written, computed in ``dtype``; students' first."""
    x = [level.detach().to(dtype).requires_grad_() for level in (*students, *teachers)]
    loss = reference.pkd_loss(x[: len(students)], x[len(students) :], WEIGHT)
    loss.backward(torch.full_like(loss, upstream))
    return [loss.detach(), *(level.grad for level in x)]


def gradient_unit(x: Tensor, y: Tensor, upstream: float) -> Tensor:
    """What the two terms of the gradient weigh before they cancel, float64 ``[C, 1, 1]``."""
    n, c, h, w = x.shape
    count = n * h * w

    def spread(level: Tensor) -> tuple[Tensor, Tensor]:
        flat = level.detach().double().transpose(0, 1).flatten(1)  # [C, NHW]
        d = flat - flat.mean(1, keepdim=True)
        bottom = (d.square().sum(1) / max(count - 1, 1)).sqrt() + reference.EPS
        return bottom, d.abs().amax(1) / bottom

    (bottom, top_x), (_, top_y) = spread(x), spread(y)
    return (abs(upstream) * WEIGHT / (c * count) / bottom * torch.maximum(top_x, top_y)).view(c, 1, 1)


def check(case: Case, device: str = "cpu", *, tap: bool = False) -> None:
    """Holds loss and both sides' gradients of a case to the 2x rule, on the backend in force.

    With ``tap`` the students' gradients include what heads send, of the size of the loss's own.
    """
    students, teachers = case.levels(device)
    pairs = [*zip(students, teachers, strict=True), *zip(teachers, students, strict=True)]
    units = [gradient_unit(x, y, case.upstream) for x, y in pairs]
    heads = [
        (torch.randn(s.shape, generator=torch.Generator().manual_seed(1)).to(device) * unit / 3).to(s.dtype)
        for s, unit in zip(students, units, strict=False)
    ]
    if tap:
        features, loss = pearson_tap(students, teachers, WEIGHT)
        torch.autograd.backward([loss, *features], [torch.full_like(loss, case.upstream), *heads])
    else:
        loss = pkd_loss(students, teachers, WEIGHT)
        loss.backward(torch.full_like(loss, case.upstream))
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    for x, _ in pairs:
        assert x.grad.dtype == x.dtype
        assert x.grad.stride() == x.stride()
    gradients = [x.grad for x, _ in pairs]
    assert_as_exact_as_eager(loss, gradients, students, teachers, case.upstream, heads if tap else (), case.loss_unit)


def assert_as_exact_as_eager(
    loss: Tensor,
    gradients: Sequence[Tensor],
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    upstream: float = 1.0,
    heads: Sequence[Tensor] = (),
    loss_unit: float = 1e-2,
) -> None:
    """Holds a loss and its gradients to the 2x rule: eager is computed in float32, its gradient rounded once.

    Args:
        loss: scalar.
        gradients: of the students, or of the students and then of the teachers.
        students, teachers: levels ``[N, C, H, W]`` as the kernel got them.
        upstream: gradient of the loss.
        heads: gradients that were added to the students' own, or none.
        loss_unit: see :class:`Case`.
    """
    exact = eager(students, teachers, torch.float64, upstream)
    rough = eager(students, teachers, torch.float32, upstream)
    # Float32 sums of squares, 1e-7 of them wrong, that all but cancel near r = 1: see "Residual" in the reference.
    assert_within_twice(loss.detach(), rough[0], exact[0], what="loss", scale=exact[0].clamp(min=loss_unit))
    pairs = [*zip(students, teachers, strict=True), *zip(teachers, students, strict=True)][: len(gradients)]
    for i, ((x, y), dx) in enumerate(zip(pairs, gradients, strict=True)):
        unit, rough_dx, exact_dx = gradient_unit(x, y, upstream), rough[1 + i], exact[1 + i]
        if i < len(heads):
            rough_dx, exact_dx = rough_dx + heads[i].float(), exact_dx + heads[i].double()
            unit = 2 * unit
        if x.dtype == torch.bfloat16 and _backend.select("pearson", x) == "triton" and _backend.interpreting():
            unit = 4 * unit  # the interpreter cuts float32 off to bfloat16, where a GPU rounds
        assert_within_twice(dx, rough_dx.to(x.dtype), exact_dx, what=f"gradient {i}", scale=unit)
