"""The Pearson distillation loss and its gradient for the students in a single pass over the features.

Where a channel fits on the chip, or in a processor's cache, both tensors are read once and the gradient is written
once, for an incoming gradient of 1; :func:`pearson_scale_ <_scale>` multiplies it by another one. No autograd:
:mod:`jdkd.ops.pearson` has the rule.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from jdkd import _backend, _ext
from jdkd._dispatch import nobody_asks
from jdkd.errors import InputError
from jdkd.ops import pearson_check, pearson_planner
from jdkd.ops.host_memory import empty_like
from jdkd.reference import pearson as reference

_OP = "pearson_single"
_DTYPES = (torch.float32, torch.bfloat16)  # gradients for an incoming gradient of 1 are zeros in float16
_MAX_LEVELS = 16  # of a launch on a GPU
_CACHED = 8 << 20  # bytes of a channel's features on both sides that a CPU reads again from a cache

Single = tuple[Tensor, Tensor, Tensor, list[Tensor]]  # loss [], losses [L], table [2, 5, sum of C], gradients


def fits(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> bool:
    """Whether the single pass takes these levels on their device; no device sync.

    Args:
        students: levels ``[N, C, H, W]``.
        teachers: levels of the same shapes.

    Returns:
        True if all of them are contiguous, on one device, of one dtype, float32 or bfloat16, and every level's channels
        fit: on a CUDA device this build has clusters for (sm_90) in the shared memory of a cluster; on a CPU in its
        caches, if there are as many of them as threads, which share them out, and nobody asks for a backend, which on a
        CPU would be the split form's.
    """
    first, levels = students[0], (*students, *teachers)
    device = first.device
    if device.type not in BACKENDS or first.dtype not in _DTYPES or _ext.why_missing(_OP, device.type) is not None:
        return False
    if any(t.dtype != first.dtype or t.device != device or not t.is_contiguous() for t in levels):
        return False
    shapes = tuple((s.shape[0], s.shape[1], s.shape[2] * s.shape[3]) for s in students)
    if device.type == "cpu":
        if not nobody_asks():
            return False
        threads = torch.get_num_threads()
        return all(c >= threads and 2 * n * hw * first.element_size() <= _CACHED for n, c, hw in shapes)
    return len(students) <= _MAX_LEVELS and _planned(shapes, first.element_size(), _chip(device.index))


@functools.cache
def _chip(device: int) -> pearson_planner.Chip:
    return tuple(torch.ops.jdkd_C.pearson_single_chip(device))


@functools.lru_cache(maxsize=256)
def _planned(shapes: tuple[pearson_planner.Shape, ...], itemsize: int, chip: pearson_planner.Chip) -> bool:
    """Whether every level fits on the chip."""
    *_, max_cluster = chip
    return max_cluster > 0 and pearson_planner.plan(shapes, itemsize, chip).fits


def _reference_single(
    students: list[Tensor], teachers: list[Tensor], weights: list[float], eps: float, skip_constant: bool
) -> Single:
    loss, losses, table, _ = reference.pearson_fwd(students, teachers, weights, eps, skip_constant)
    return loss, losses, table, reference.pearson_bwd(torch.ones_like(loss), students, teachers, table[0])


def _cuda_single(
    students: list[Tensor], teachers: list[Tensor], weights: list[float], eps: float, skip_constant: bool
) -> Single:
    return torch.ops.jdkd_C.pearson_single(students, teachers, weights, eps, skip_constant)


def _cpu_single(
    students: list[Tensor], teachers: list[Tensor], weights: list[float], eps: float, skip_constant: bool
) -> Single:
    gradients = [empty_like(student) for student in students]
    given = students, teachers, weights, eps, skip_constant
    return *torch.ops.jdkd_C.pearson_single_into(*given, gradients), gradients


def _reference_scale(gradients: list[Tensor], dloss: Tensor) -> None:
    for gradient in gradients:
        gradient.copy_(gradient.to(dloss.dtype) * dloss)


def _cuda_scale(gradients: list[Tensor], dloss: Tensor) -> None:
    torch.ops.jdkd_C.pearson_scale_(gradients, dloss)


def _cpu_scale(gradients: list[Tensor], dloss: Tensor) -> None:
    if (factor := dloss.item()) != 1:
        for gradient in gradients:
            gradient.mul_(factor)


_SINGLE = {"cuda": _cuda_single, "cpu": _cpu_single, "reference": _reference_single}
_SCALE = {"cuda": _cuda_scale, "cpu": _cpu_scale, "reference": _reference_scale}
_CHECKS = {
    "single pass": lambda backend, *where: pearson_check.single_pass(_SINGLE[backend], *where),
    "scale": lambda backend, *where: pearson_check.scale(_SCALE[backend], *where),
}
_WHERE = "where `jdkd tune` found it faster, and on a GPU on request"
BACKENDS = ("cuda", "cpu")  # each of its own kind of device
for _name in BACKENDS:
    _backend.register(_OP, _name, dtypes=_DTYPES, why=_WHERE, checks=_CHECKS)
_backend.register(_OP, "reference", why="for tests")


def unseen(device: torch.device, dtype: torch.dtype, check: bool) -> str | None:
    """Why the single pass may not run unasked on a device in a dtype; None if it may, both ways."""
    kernel = _backend.Kernel(_OP, device.type)
    reasons = (kernel.unseen(_backend.Call(form, device, dtype), check) for form in _CHECKS)
    return next(filter(None, reasons), None)


def _single(
    students: list[Tensor], teachers: list[Tensor], weights: list[float], eps: float, skip_constant: bool
) -> Single:
    for level in (*students, *teachers):
        if not level.is_contiguous():
            raise InputError(
                f"jdkd::pearson_single takes contiguous levels, and one of shape {tuple(level.shape)} has strides "
                f"{level.stride()}; copy it with contiguous(), or use jdkd::pearson_fwd and jdkd::pearson_bwd"
            )
    return _SINGLE[_backend.select(_OP, students[0], "single pass")](students, teachers, weights, eps, skip_constant)


def _scale(gradients: list[Tensor], dloss: Tensor) -> None:
    """Multiplies gradients in place by ``dloss``, a float32 scalar on their device, rounding once."""
    _SCALE[_backend.select(_OP, gradients[0], "scale")](gradients, dloss)


def _single_fake(
    students: list[Tensor], teachers: list[Tensor], weights: list[float], eps: float, skip_constant: bool
) -> Single:
    dtype = reference.result_dtype(students, teachers)
    new = students[0].new_empty
    return (
        new((), dtype=dtype),
        new((len(students),), dtype=dtype),
        new((2, reference.ROWS, sum(s.shape[1] for s in students)), dtype=dtype),
        [torch.empty_like(student) for student in students],
    )


def _scale_fake(gradients: list[Tensor], dloss: Tensor) -> None:
    pass


_library = torch.library.Library("jdkd", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_library.define(
    "pearson_single(Tensor[] students, Tensor[] teachers, float[] weights, float eps, bool skip_constant)"
    " -> (Tensor, Tensor, Tensor, Tensor[])",
    tags=_TAGS,
)
_library.define("pearson_scale_(Tensor(a!)[] gradients, Tensor dloss) -> ()", tags=_TAGS)
_library.impl("pearson_single", _single, "CompositeExplicitAutograd")
_library.impl("pearson_scale_", _scale, "CompositeExplicitAutograd")
torch.library.register_fake("jdkd::pearson_single", _single_fake, lib=_library)
torch.library.register_fake("jdkd::pearson_scale_", _scale_fake, lib=_library)
