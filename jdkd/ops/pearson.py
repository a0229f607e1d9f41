"""The Pearson distillation loss over all levels: two opaque operators and the autograd rule around them.

The forward returns the loss and a table of five scalars a channel; the backward reads both sides once more, and adds
the gradient that the heads send, so that it is written once. Nothing of the size of a feature is kept besides the
features themselves. The formulas are in :mod:`jdkd.reference.pearson`, the public functions in
:mod:`jdkd.ops.pearson_loss`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jdkd import _backend
from jdkd.errors import InputError
from jdkd.ops import pearson_check, pearson_forms
from jdkd.ops.host_memory import empty_like
from jdkd.ops.layout import layout_name, layout_of, size_class
from jdkd.ops.transforms import is_transformed
from jdkd.reference import pearson as reference

_OP = "pearson"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LAYOUTS = (torch.contiguous_format, torch.channels_last)


class Settings(NamedTuple):
    """What the loss computes.

    Args:
        weights: factor of each level's loss.
        eps: what is added to the standard deviations.
        skip_constant: leave out channels in which student or teacher never changes.
        instance: statistics of every image by itself instead of over the batch.
        group: the processes whose batches are taken together; None is this one alone.
    """

    weights: tuple[float, ...]
    eps: float = reference.EPS
    skip_constant: bool = False
    instance: bool = False
    group: torch.distributed.ProcessGroup | None = None


def pearson_loss(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    settings: Settings,
    masks: Sequence[Tensor] = (),
    *,
    tap: bool = False,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Pearson distillation loss of levels whose shapes agree pairwise.

    Args:
        students: levels ``[N, C, H, W]`` of a floating dtype.
        teachers: levels of the same shapes.
        settings: see :class:`Settings`.
        masks: bool ``[N, 1, H, W]`` per level, True where a position counts; or none, and all count.
        tap: return students whose gradients are added to the loss's in one pass.

    Returns:
        The loss, a scalar, float32 (float64 if a level is); its levels ``[L]``, detached; and the students, to be
        used from here on if ``tap``.
    """
    pairs = [_same_layout(s, t) for s, t in zip(students, teachers, strict=True)]
    if reference.result_dtype(students, teachers) == torch.float64:
        tap = tap and all(s.dtype == torch.float64 for s in students)  # else the heads would get another dtype
        pairs = [(s.double(), t.double()) for s, t in pairs]
    inner, teachers = [s for s, _ in pairs], [t for _, t in pairs]
    wanted = _wanted(inner, teachers)
    if wanted:
        loss, losses, *tapped = _PearsonLoss.apply(settings, len(pairs), wanted, tap, *inner, *teachers, *masks)
        return loss, losses, tapped or list(students)
    loss, losses, _, _ = _forward(settings, inner, teachers, masks)
    return loss, losses, list(students)


def _wanted(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> str:
    """Whose gradients are wanted, as :class:`pearson_forms.LossCall` has it."""
    if not torch.is_grad_enabled():
        return ""
    if any(level.requires_grad for level in teachers):
        return "teachers"
    return "students" if any(level.requires_grad for level in students) else ""


def _same_layout(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both levels dense in the student's layout, copied only if they are not so already."""
    layout = layout_of(student)
    return student.contiguous(memory_format=layout), teacher.contiguous(memory_format=layout)


def _forward(
    settings: Settings,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    masks: Sequence[Tensor],
    wanted: str = "",
    tap: bool = False,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Loss, losses of the levels, the coefficient table, and the students' gradients if they came with it."""
    weights, eps, skip_constant, instance, group = settings
    form = pearson_forms.select(
        pearson_forms.LossCall(students, teachers, wanted, tap, len(masks) > 0, group is not None, instance)
    )
    if instance:
        masks = [_folded(mask.expand_as(s)) for mask, s in zip(masks, students, strict=True)] if masks else ()
        students, teachers = map(_folded, students), map(_folded, teachers)
    given = (list(students), list(teachers), weights, eps, skip_constant)
    if form == "single pass":
        return torch.ops.jdkd.pearson_single(*given)
    if form == "moments":
        return *_from_moments(masks, group, *given), []
    return *torch.ops.jdkd.pearson_fwd(*given)[:3], []


def _from_moments(
    masks: Sequence[Tensor], group: torch.distributed.ProcessGroup | None, students: list[Tensor],
    teachers: list[Tensor], weights: tuple[float, ...], eps: float, skip_constant: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Loss, losses and table from statistics that are masked or gathered before they are used."""
    if masks:
        moments = reference.moments(students, teachers, masks)
    else:
        *_, moments = torch.ops.jdkd.pearson_fwd(students, teachers, weights, eps, skip_constant)
    if group is not None:
        moments = reference.join(_gathered(moments, group))
    channels = [level.shape[1] for level in students]
    dtype = reference.result_dtype(students, teachers)
    loss, losses, table = reference.finish(moments, channels, weights, eps, skip_constant, dtype)
    if group is not None:  # a, b and k, so that the mean over processes, which DDP takes, is the gradient
        table[:, :3] *= torch.distributed.get_world_size(group)
    return loss, losses, table


def _gathered(moments: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """Every process's moments, ``[R, 6, sum of C]``."""
    parts = [torch.empty_like(moments) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, moments, group=group)
    return torch.stack(parts)


def _folded(level: Tensor) -> Tensor:
    """Every image's channels as channels of their own, ``[1, N C, H, W]``; copies a channels-last level."""
    return level.reshape(1, -1, *level.shape[2:])


_NO_SETTINGS = (None,) * 4  # gradients of what is no tensor


class _PearsonLoss(torch.autograd.Function):
    """Gradients for whichever side asks; what the backward saves is readable by every backend."""

    @staticmethod
    def forward(
        ctx: Any, settings: Settings, levels: int, wanted: str, tap: bool, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        students, teachers, masks = (tensors[i * levels : (i + 1) * levels] for i in range(3))
        loss, losses, table, ctx.gradients = _forward(settings, students, teachers, masks, wanted, tap)
        # save_for_backward refuses what was made under inference_mode, as teachers often are.
        ctx.kept = [x if _made_in_inference(x) else None for x in tensors]
        ctx.save_for_backward(table, *(x for x, kept in zip(tensors, ctx.kept, strict=True) if kept is None))
        ctx.levels, ctx.masked, ctx.instance = levels, len(masks) > 0, settings.instance
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(losses)
        return loss, losses, *((student.view_as(student) for student in students) if tap else ())

    @staticmethod
    def backward(ctx: Any, dloss: Tensor | None, _: None, *dout: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise NotImplementedError(
                "the Pearson loss was differentiated with create_graph=True, but its gradient has no derivative; "
                "use jdkd.reference.pearson.pkd_loss there"
            )
        if is_transformed() or _is_batched(dloss):
            raise NotImplementedError(
                "the Pearson loss was differentiated for a batch of incoming gradients (is_grads_batched=True), which "
                "its kernels do not take; ask for one gradient after the other, or call the loss inside torch.func.grad"
            )
        levels, needs = ctx.levels, ctx.needs_input_grad[4:]
        heads = list(dout) or [None] * levels
        unmasked = [None] * (levels if ctx.masked else 0)
        if dloss is None:
            return (*_NO_SETTINGS, *heads, *[None] * levels, *unmasked)
        if ctx.gradients:  # of an incoming 1; scaled where they are, so a second backward computes them anew
            gradients, ctx.gradients = ctx.gradients, []
            torch.ops.jdkd.pearson_scale_(gradients, dloss)
            own = (d if wanted else None for d, wanted in zip(gradients, needs, strict=False))
            return (*_NO_SETTINGS, *own, *[None] * levels)
        table, *saved = _saved_tensors(ctx)
        saved = iter(saved)
        tensors = [next(saved) if kept is None else kept for kept in ctx.kept]
        students, teachers, masks = (tensors[i * levels : (i + 1) * levels] for i in range(3))
        gradients: list[Tensor | None] = []
        sides = ((students, teachers, heads), (teachers, students, [None] * levels))
        for side, (x, y, others) in enumerate(sides):
            needed = needs[side * levels : (side + 1) * levels]
            if any(needed):
                dx = _gradient(dloss, x, y, table[side], others, masks, ctx.instance)
                gradients += [d if wanted else None for d, wanted in zip(dx, needed, strict=True)]
            else:
                gradients += [None] * levels
        return (*_NO_SETTINGS, *gradients, *unmasked)


def _is_batched(dloss: Tensor | None) -> bool:
    """Whether ``torch.autograd.grad`` runs a backward pass for a batch of gradients."""
    traced = dloss is None or torch.compiler.is_compiling()
    return not traced and torch._C._functorch.is_legacy_batchedtensor(dloss)


def _saved_tensors(ctx: Any) -> tuple[Tensor, ...]:
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            "a feature was modified by an inplace operation (ReLU(inplace=True), say) between the Pearson loss and its "
            "backward pass, which reads features again where the formula keeps copies; write to a copy, or call the "
            f"loss after that operation. torch says: {error}"
        ) from None


def _gradient(
    dloss: Tensor,
    x: Sequence[Tensor],
    y: Sequence[Tensor],
    coefficients: Tensor,
    dout: Sequence[Tensor | None],
    masks: Sequence[Tensor],
    instance: bool,
) -> list[Tensor]:
    """The gradients with respect to ``x`` plus what the heads sent, where they sent any."""
    if instance:
        folded = [None if d is None else _folded(d) for d in dout]
        masks = [_folded(mask.expand_as(level)) for mask, level in zip(masks, x, strict=True)] if masks else ()
        dx = _gradient(dloss, list(map(_folded, x)), list(map(_folded, y)), coefficients, folded, masks, False)
        return [d.view(level.shape) for d, level in zip(dx, x, strict=True)]
    dloss = dloss.to(coefficients.dtype)
    if masks:
        dx = _gradient(dloss, x, y, coefficients, dout, (), False)
        heads = (0 if head is None else head for head in dout)
        return [torch.where(mask, d, head) for d, mask, head in zip(dx, masks, heads, strict=True)]
    tapped = [i for i, head in enumerate(dout) if head is not None]
    if len(tapped) in (0, len(x)):
        heads = [dout[i].contiguous(memory_format=layout_of(x[i])) for i in tapped]
        return torch.ops.jdkd.pearson_bwd(dloss, x, y, coefficients, heads)
    # Some levels feed no head: each kind by itself.
    columns = coefficients.split([level.shape[1] for level in x], dim=1)
    gradients: list[Tensor] = [dloss] * len(x)
    for kind in (tapped, [i for i, head in enumerate(dout) if head is None]):
        x_of, y_of, dout_of = ([side[i] for i in kind] for side in (x, y, dout))
        own = torch.cat([columns[i] for i in kind], dim=1)
        for i, dx in zip(kind, _gradient(dloss, x_of, y_of, own, dout_of, (), False), strict=True):
            gradients[i] = dx
    return gradients


def _made_in_inference(level: Tensor) -> bool:
    # The compiler cannot trace the question, and keeps what a backward needs in its own way.
    return not torch.compiler.is_compiling() and level.is_inference()


Forward = tuple[Tensor, Tensor, Tensor, Tensor]  # loss [], losses [L], table [2, 5, sum of C], moments [6, sum of C]


def _cpu_fwd(students: list[Tensor], teachers: list[Tensor], *settings: Any) -> Forward:
    return torch.ops.jdkd_C.pearson_fwd(students, teachers, *settings)


def _cpu_bwd(dloss: Tensor, x: list[Tensor], y: list[Tensor], table: Tensor, dout: list[Tensor]) -> list[Tensor]:
    gradients = [empty_like(level) for level in x]
    torch.ops.jdkd_C.pearson_bwd_into(dloss, x, y, table, dout, gradients)
    return gradients


def _of_one_dtype(*sides: list[Tensor]) -> tuple[list[Tensor], ...]:
    """The CUDA kernels take one dtype; where there are several, float32 holds them all."""
    if len({level.dtype for side in sides for level in side}) == 1:
        return sides
    return tuple([level.float() for level in side] for side in sides)


def _cuda_fwd(students: list[Tensor], teachers: list[Tensor], *settings: Any) -> Forward:
    return torch.ops.jdkd_C.pearson_fwd(*_of_one_dtype(students, teachers), *settings)


def _cuda_bwd(dloss: Tensor, x: list[Tensor], y: list[Tensor], table: Tensor, dout: list[Tensor]) -> list[Tensor]:
    left, right, added = _of_one_dtype(x, y, dout)
    gradients = torch.ops.jdkd_C.pearson_bwd(dloss, left, right, table, added)
    return [gradient.to(level.dtype) for gradient, level in zip(gradients, x, strict=True)]


def _check_dense(*sides: Sequence[Tensor]) -> None:
    """The compiled operators check layouts themselves, the reference takes any."""
    for level in (level for side in sides for level in side):
        if not any(level.is_contiguous(memory_format=layout) for layout in _LAYOUTS):
            raise InputError(
                "jdkd::pearson takes levels that are contiguous or channels-last, and one of shape "
                f"{tuple(level.shape)} has strides {level.stride()}; jdkd.functional.pkd_loss copies such"
            )


def _triton_fwd(students: list[Tensor], teachers: list[Tensor], *settings: Any) -> Forward:
    from jdkd.kernels import pearson

    _check_dense(students, teachers)
    return pearson.pearson_fwd(students, teachers, *settings)


def _triton_bwd(dloss: Tensor, x: list[Tensor], y: list[Tensor], table: Tensor, dout: list[Tensor]) -> list[Tensor]:
    from jdkd.kernels import pearson

    _check_dense(x, y, dout)
    return pearson.pearson_bwd(dloss, x, y, table, dout)


_FORWARD = {
    "cuda": _cuda_fwd,
    "triton": _triton_fwd,
    "cpu": _cpu_fwd,
    "reference": reference.pearson_fwd,
}
_BACKWARD = {
    "cuda": _cuda_bwd,
    "triton": _triton_bwd,
    "cpu": _cpu_bwd,
    "reference": reference.pearson_bwd,
}


# A form is checked on the device at hand before it runs there unasked. Neither GPU backend has been timed; from the
# machine code both are expected near a copy's bandwidth (csrc/README.md, kernels/README.md); Triton needs no compiler.
_CHECKS = {
    "loss": lambda backend, *where: pearson_check.loss(_FORWARD[backend], *where),
    "gradient": lambda backend, *where: pearson_check.gradient(_BACKWARD[backend], *where),
    "tap": lambda backend, *where: pearson_check.tap(_BACKWARD[backend], *where),
}
for _name, _why in (
    ("triton", "needs no compiler; by machine code neither is expected to be faster, and neither has been timed yet"),
    ("cuda", "where Triton is missing or wrong, or `jdkd tune` found this one faster"),
    ("cpu", "two sweeps over memory, threaded"),
):
    _backend.register(_OP, _name, dtypes=_DTYPES, why=_why, checks=_CHECKS)
_backend.register(_OP, "reference", why="float64, and devices without kernels")
_backend.tune_by(_OP, lambda first: f"{layout_name(first)}, {size_class(first.numel() * first.element_size())} a level")


def _fwd(
    students: list[Tensor], teachers: list[Tensor], weights: list[float], eps: float, skip_constant: bool
) -> Forward:
    return _FORWARD[_backend.select(_OP, students[0], "loss")](students, teachers, weights, eps, skip_constant)


def _bwd(dloss: Tensor, x: list[Tensor], y: list[Tensor], coefficients: Tensor, dout: list[Tensor]) -> list[Tensor]:
    form = "tap" if dout else "gradient"
    return _BACKWARD[_backend.select(_OP, x[0], form)](dloss, x, y, coefficients, dout)


def _fwd_fake(
    students: list[Tensor], teachers: list[Tensor], weights: list[float], eps: float, skip_constant: bool
) -> Forward:
    dtype = reference.result_dtype(students, teachers)
    channels = sum(s.shape[1] for s in students)
    new = students[0].new_empty
    return (
        new((), dtype=dtype),
        new((len(students),), dtype=dtype),
        new((2, reference.ROWS, channels), dtype=dtype),
        new((reference.MOMENTS, channels), dtype=reference.wide_dtype(students[0].device)),
    )


def _bwd_fake(
    dloss: Tensor, x: list[Tensor], y: list[Tensor], coefficients: Tensor, dout: list[Tensor]
) -> list[Tensor]:
    return [torch.empty_like(level) for level in x]


_library = torch.library.Library("jdkd", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_library.define(
    "pearson_fwd(Tensor[] students, Tensor[] teachers, float[] weights, float eps, bool skip_constant)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_library.define(
    "pearson_bwd(Tensor dloss, Tensor[] x, Tensor[] y, Tensor coefficients, Tensor[] dout) -> Tensor[]", tags=_TAGS
)
_library.impl("pearson_fwd", _fwd, "CompositeExplicitAutograd")
_library.impl("pearson_bwd", _bwd, "CompositeExplicitAutograd")
torch.library.register_fake("jdkd::pearson_fwd", _fwd_fake, lib=_library)
torch.library.register_fake("jdkd::pearson_bwd", _bwd_fake, lib=_library)
