"""The Pearson distillation loss at the levels of a feature pyramid, against the formula as its authors
write it.

Sizes are those of an 800x1344 image with 256 channels. ``least_bytes`` counts one read of student and
teacher, and one write of the gradient: three passes, which only a kernel that keeps a channel on chip can
reach; a split one makes five.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.harness import Case, Provider
from jdkd._backend import available, use_backend
from jdkd.functional import pkd_loss
from jdkd.reference import pearson as reference

NAME = "pearson"
CHANNELS = 256
SIZES = {"P2": (200, 336), "P3": (100, 168), "P4": (50, 84), "P5": (25, 42), "P6": (13, 21), "P7": (7, 11)}
PYRAMIDS = {"P3-P7": ("P3", "P4", "P5", "P6", "P7"), "P2-P6": ("P2", "P3", "P4", "P5", "P6")}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}
WEIGHT = 6.0
# Without a loss scale the gradients of float16 features are mostly zero; times the weight it must stay below 65504.
LOSS_SCALES = {torch.float16: 2.0**13}

Inputs = tuple[list[Tensor], list[Tensor]]


def cases(device: str, full: bool = False) -> Iterator[Case]:
    """The cases for a device, the most telling ones first; all of them if ``full``."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    modes = ("forward+backward", "forward")
    if full:
        where = [*SIZES, *PYRAMIDS]
        for images, name, dtype, layout, mode in itertools.product((1, 2, 4, 8, 16), where, dtypes, LAYOUTS, modes):
            if device == "cuda" or (images <= 2 and name != "P2-P6"):
                yield case(name, images, dtype, layout, mode, device, compiled=True)
    elif device == "cuda":
        for images, name, dtype in ((16, "P3-P7", torch.bfloat16), (2, "P3-P7", torch.bfloat16)):
            for layout, mode in itertools.product(LAYOUTS, modes):
                yield case(name, images, dtype, layout, mode, device, compiled=True)
        for dtype, layout in itertools.product(dtypes, LAYOUTS):
            yield case("P3", 2, dtype, layout, modes[0], device, compiled=False)
    else:
        for layout in LAYOUTS:
            yield case("P3", 2, torch.float32, layout, modes[0], device, compiled=True)
        yield case("P3", 2, torch.float32, "NCHW", modes[1], device, compiled=False)
        for dtype, layout in itertools.product(dtypes[1:], LAYOUTS):
            yield case("P3", 2, dtype, layout, modes[0], device, compiled=False)
        yield case("P3-P7", 1, torch.float32, "NCHW", modes[0], device, compiled=False)


def case(name: str, images: int, dtype: torch.dtype, layout: str, mode: str, device: str, *, compiled: bool) -> Case:
    """One level or pyramid by name, with every backend of ours that the device has."""
    shapes = [(images, CHANNELS, *SIZES[level]) for level in PYRAMIDS.get(name, (name,))]
    backward = mode == "forward+backward"

    def make() -> Inputs:
        students = [torch.randn(shape, device=device) + 1 for shape in shapes]
        teachers = [0.6 * student + 0.8 * torch.randn_like(student) for student in students]
        students, teachers = (
            [level.to(dtype).contiguous(memory_format=LAYOUTS[layout]) for level in side]
            for side in (students, teachers)
        )
        return [student.requires_grad_(backward) for student in students], teachers

    elements = sum(torch.Size(shape).numel() for shape in shapes)
    scale = LOSS_SCALES.get(dtype, 1.0)
    providers = {"eager": run(reference.pkd_loss, backward, scale)}
    if compiled:
        torch.compiler.reset()
        providers["torch.compile"] = run(torch.compile(reference.pkd_loss, dynamic=False), backward, scale)
    for backend, reason in available("pearson").items():
        if reason is None and backend in (("triton", "cuda") if device == "cuda" else ("cpu",)):
            providers[f"jdkd {backend}"] = run(on_backend(backend), backward, scale)
    least_bytes = (3 if backward else 2) * elements * dtype.itemsize
    exact = in_float32(run(reference.pkd_loss, backward, scale))
    return Case(NAME, f"{name} N={images}", mode, dtype, layout, make, exact, providers, least_bytes)


def on_backend(backend: str) -> Callable[..., Tensor]:
    """Our loss on one backend."""

    def loss(students: Sequence[Tensor], teachers: Sequence[Tensor], weight: float) -> Tensor:
        with use_backend(backend):
            return pkd_loss(students, teachers, weight)

    return loss


def in_float32(provider: Provider) -> Provider:
    """The provider on the same inputs in float32."""

    def exact(inputs: Inputs) -> Sequence[Tensor]:
        students, teachers = inputs
        wide = [student.detach().float().requires_grad_(student.requires_grad) for student in students]
        return provider((wide, [teacher.float() for teacher in teachers]))

    return exact


def run(loss_of: Callable[..., Tensor], backward: bool, scale: float = 1.0) -> Provider:
    """The loss, and its gradients for all students, times ``scale``, if ``backward``."""

    def provider(inputs: Inputs) -> list[Tensor]:
        students, teachers = inputs
        loss = loss_of(students, teachers, WEIGHT)
        if not backward:
            return [loss]
        return [loss.detach(), *torch.autograd.grad(loss, students, torch.full_like(loss, scale))]

    return provider
