"""The Pearson losses as users call them: PKD, its tap, and DIST."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from jdkd.errors import InputError
from jdkd.ops.pearson import Settings, pearson_loss
from jdkd.ops.pearson_pairs import as_levels, in_order_of, paired, rebuilt
from jdkd.ops.pearson_settings import check_resize, factor_of, indices_of, masks_of, settings_of
from jdkd.ops.transforms import is_looked_into
from jdkd.reference import pearson as reference
from jdkd.reference.pearson import Features, match_size

DIST_EPS = 1e-8


def pkd_loss(
    student: Features | None = None,
    teacher: Features | None = None,
    loss_weight: float = 1.0,
    resize_stu: bool = True,
    *,
    pairing: str = "index",
    levels: Sequence[int] | None = None,
    level_weights: Sequence[float] | None = None,
    mask: Tensor | Sequence[Tensor] | None = None,
    statistics: str = "batch",
    zero_variance: str = "keep",
    group: ProcessGroup | None = None,
    return_levels: bool = False,
    preds_S: Features | None = None,
    preds_T: Features | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Pearson distillation loss (PKD): a mean squared error between features standardised channel by channel.

    Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation
    Coefficient", NeurIPS 2022, with the numbers of the authors' implementation: statistics over batch and
    positions, unbiased standard deviation plus 1e-6, half the mean squared error, summed over levels. For
    two features with correlation ``r`` in every channel it is ``1 - r``, whatever their scales and offsets.
    Computed in float32 whatever the dtype. Every keyword departs from the published loss.

    A channel of one element (batch 1, a 1x1 map) adds 0, where the published loss is NaN. A constant channel of
    the student adds about 0.5 and, as in the published loss, a gradient about a million times that of a live
    one, unless ``zero_variance`` is ``"skip"``. Differentiating with ``create_graph=True`` is refused; a compiled
    graph's gradient has no derivative either. Under ``torch.export`` and ``torch.func`` it is plain torch.

    The backward pass reads the features again, where the published formula keeps copies. One that was written to in
    place in between, by a ``ReLU(inplace=True)`` behind it, is an error that torch raises: write to a copy, or call the
    loss after that. **Torch cannot tell for tensors made under** ``torch.inference_mode``, which count no versions: a
    teacher's features made there and overwritten before the backward pass, as by a replayed CUDA graph, give wrong
    gradients. Make those under ``torch.no_grad``, or clone them.

    Args:
        student: one level ``[N, C, H, W]``, or an iterable of levels (list, tuple, dict, generator).
        teacher: levels with the same batch and channels, on the same device. Dtypes and layouts may differ.
            Levels that need a gradient get one.
        loss_weight: factor of the loss; the authors use 6 for two-stage detectors and 10 for dense ones.
        resize_stu: where sizes differ, resize the student's level to the teacher's (True) or the reverse
            (False), bilinearly.
        pairing: ``"index"`` pairs levels in the order given, mappings of the same names by name; ``"stride"``
            pairs those of the same stride, as their sizes tell, and leaves out levels without a partner. Sizes of
            a few pixels tell little: leave such levels out.
        levels: indices of the student's levels to compare; None is all that pair up.
        level_weights: a factor for every level compared, in their order.
        mask: bool ``[N, height, width]``, True where the image is, False where the batch was padded, at the
            resolution of the images or any other (brought to each level's by the nearest pixel); or one per
            level. Padded positions neither count nor get a gradient. Runs in plain torch.
        statistics: ``"batch"``, over all images together; ``"instance"``, each image and channel by itself,
            averaged over both.
        zero_variance: ``"skip"`` leaves out channels in which student or teacher is constant, as a masked
            student's are: they add 0 to the mean over the C channels, and get no gradient.
        group: processes whose batches are taken as one (``torch.distributed.group.WORLD``, for one). Every rank
            gets the same loss, and gradients such that their mean over the ranks, which DDP takes, is that of
            one process with all the images. Ranks may have different numbers of images. None, which ``WORLD``
            also is before ``init_process_group``, takes this process alone.
        return_levels: return the levels' losses too, for logging.
        preds_S, preds_T: student and teacher by the names that the authors' implementation has for them.

    Returns:
        Scalar, float32 (float64 for float64 features). With ``return_levels`` also ``[L]``, detached: the
        weighted loss of every level, which add up to it.

    Raises:
        InputError: if numbers of levels, batches, channels or devices differ, nothing pairs up, or a level is
            not a floating ``[N, C, H, W]`` with elements.
    """
    student, teacher = _named("student", student, "preds_S", preds_S), _named("teacher", teacher, "preds_T", preds_T)
    check_resize(resize_stu)
    levels = indices_of(levels)
    students, teachers = as_levels(student, "student"), as_levels(in_order_of(student, teacher), "teacher")
    pairs = [match_size(students[i], teachers[j], resize_stu) for i, j in paired(students, teachers, pairing, levels)]
    students, teachers = [s for s, _ in pairs], [t for _, t in pairs]
    options = (level_weights, loss_weight, statistics, zero_variance, group)
    loss, losses, _ = _compared(students, teachers, mask, *options)
    return (loss, losses) if return_levels else loss


def _named(name: str, value: Features | None, other_name: str, other: Features | None) -> Any:
    """What was given by one of two names."""
    if value is not None and other is not None:
        raise InputError(f"{name} and {other_name} are both given, and are two names of one argument; give one of them")
    return other if value is None else value


def pearson_tap(
    students: Features,
    teachers: Features,
    loss_weight: float = 1.0,
    *,
    pairing: str = "index",
    levels: Sequence[int] | None = None,
    level_weights: Sequence[float] | None = None,
    mask: Tensor | Sequence[Tensor] | None = None,
    statistics: str = "batch",
    zero_variance: str = "keep",
    group: ProcessGroup | None = None,
    return_levels: bool = False,
) -> tuple[Features, Tensor] | tuple[Features, Tensor, Tensor]:
    """:func:`pkd_loss` on features that go on to the heads: one backward pass writes both gradients.

    Feed the returned features to the heads, in place of those that were given. They hold the same numbers in the
    same memory (a copy where the strides are of no usual layout); their gradient and the loss's are added where
    the loss's is computed, which saves reading and writing every feature once more. Writing to them in place is an
    error that torch raises. Exact under loss scaling, gradient accumulation, ``retain_graph``, checkpointing and
    ``torch.compile``; without gradients it is the loss alone.

    Args:
        students: levels ``[N, C, H, W]``: a tensor, an iterable, or a mapping.
        teachers: see :func:`pkd_loss`. Where sizes differ, the teacher's level is resized to the student's.
        loss_weight, pairing, levels, level_weights, mask, statistics, zero_variance, group, return_levels: see
            :func:`pkd_loss`.

    Returns:
        The students as they came (a tensor, a mapping, a tuple; else a list), levels without a partner untouched;
        and the loss, with ``return_levels`` its levels too.

    Raises:
        InputError: see :func:`pkd_loss`.
    """
    levels = indices_of(levels)
    inner, others = as_levels(students, "student"), as_levels(in_order_of(students, teachers), "teacher")
    pairs = paired(inner, others, pairing, levels)
    tapped = [inner[i] for i, _ in pairs]
    opposite = [match_size(inner[i], others[j], resize_stu=False)[1] for i, j in pairs]
    options = (level_weights, loss_weight, statistics, zero_variance, group)
    loss, losses, tapped = _compared(tapped, opposite, mask, *options, tap=True)
    for (i, _), level in zip(pairs, tapped, strict=True):
        inner[i] = level
    outer = rebuilt(students, inner)
    return (outer, loss, losses) if return_levels else (outer, loss)


def _compared(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    mask: Tensor | Sequence[Tensor] | None,
    level_weights: Sequence[float] | None,
    loss_weight: float,
    statistics: str,
    zero_variance: str,
    group: ProcessGroup | None,
    *,
    tap: bool = False,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """:func:`pearson_loss` of levels that are paired, as it was asked for."""
    # A number that an operator takes is a constant of a compiled graph, and another one would be compiled anew.
    compiling = torch.compiler.is_compiling()
    inside = 1.0 if compiling else loss_weight
    settings = settings_of(len(students), level_weights, inside, statistics, zero_variance, group)
    loss, losses, tapped = _compared_now(students, teachers, settings, masks_of(mask, students), tap=tap)
    if compiling:
        loss, losses = loss_weight * loss, loss_weight * losses
    return loss, losses, tapped


def _compared_now(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    settings: Settings,
    masks: Sequence[Tensor] = (),
    *,
    tap: bool = False,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """:func:`pearson_loss`, in plain torch where something looks into it; a tap's gradients are then autograd's sum."""
    if is_looked_into():
        if settings.group is not None:
            raise InputError("group is a process group, which torch.export and torch.func cannot follow; leave it out")
        weights, eps, skip_constant, instance, _ = settings
        loss, losses = reference.plain_loss(students, teachers, weights, eps, skip_constant, instance, masks)
        return loss, losses.detach(), list(students)
    return pearson_loss(students, teachers, settings, masks, tap=tap)


def dist_loss(
    student: Tensor, teacher: Tensor, inter_weight: float = 1.0, intra_weight: float = 1.0, tau: float = 1.0
) -> Tensor:
    """DIST: one minus the Pearson correlation of class probabilities, within each sample and within each class.

    Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, section 3: the loss is
    ``tau^2 (inter_weight (1 - mean_i r(row i)) + intra_weight (1 - mean_j r(column j)))`` of the softmax
    probabilities at temperature ``tau``. Where a row or column hardly changes (a deviation below 1e-8) r is
    undefined: here one minus r counts as 1/2, or 0 if neither side changes; in the authors' code as 1.

    Args:
        student: logits ``[B, K]`` of K >= 2 classes.
        teacher: logits of the same shape.
        inter_weight: factor of the relation between the classes of a sample.
        intra_weight: factor of the relation between the samples of a class; it needs B >= 2.
        tau: temperature, a number: it gets no gradient.

    Returns:
        Scalar, float32 (float64 for float64 logits).

    Raises:
        InputError: shapes are not ``[B, K]``, differ, or leave a relation without two values.
    """
    for name, logits in (("student", student), ("teacher", teacher)):
        if not isinstance(logits, Tensor):
            raise InputError(f"{name} is a {type(logits).__name__}; pass logits [B, K]")
        if logits.dim() != 2 or logits.shape[1] < 2 or not logits.is_floating_point():
            raise InputError(
                f"{name} has shape {tuple(logits.shape)} and dtype {logits.dtype}; pass floating logits [B, K], K >= 2"
            )
    if student.shape != teacher.shape or student.device != teacher.device:
        raise InputError(
            f"student has shape {tuple(student.shape)} on {student.device} and teacher {tuple(teacher.shape)} on "
            f"{teacher.device}; they must agree"
        )
    tau = factor_of("tau", tau)
    if not tau > 0:
        raise InputError(f"tau is {tau}; a temperature must be positive")
    inter_weight, intra_weight = factor_of("inter_weight", inter_weight), factor_of("intra_weight", intra_weight)
    batch, classes = student.shape
    if batch < (2 if intra_weight else 1):
        raise InputError(f"student has {batch} samples; give at least 2, or intra_weight=0")
    dtype = torch.promote_types(student.dtype, torch.float32)
    p, q = (torch.softmax(logits.to(dtype) / tau, dim=1) for logits in (student, teacher))  # [B, K]
    relations = []
    # The loss of a channel with m values is (1 - r) (m - 1) / m.
    if inter_weight:
        shape, m = (1, batch, classes, 1), classes
        relations.append((p.view(shape), q.view(shape), inter_weight * m / (m - 1)))
    if intra_weight:
        shape, m = (batch, classes, 1, 1), batch
        relations.append((p.view(shape), q.view(shape), intra_weight * m / (m - 1)))
    if not relations:
        raise InputError("inter_weight and intra_weight are both 0; give at least one of them")
    settings = Settings(tuple(tau**2 * weight for *_, weight in relations), eps=DIST_EPS)
    return _compared_now([a for a, _, _ in relations], [b for _, b, _ in relations], settings)[0]
