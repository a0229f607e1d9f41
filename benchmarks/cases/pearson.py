"""The Pearson distillation loss at the levels of a feature pyramid, against the formula as its authors write it.

Sizes are those of an 800x1333 image, padded to 800x1344, with 256 channels. Three modes: ``forward`` without gradients,
``forward+backward``, and ``tap``, where every student level also receives a gradient from its head, given, and the two
are added: by autograd, or by ``pearson_tap`` in the pass that computes the loss's.

``least_bytes`` counts passes over one side's features: forward 2, student and teacher in; forward+backward 3, and the
gradient out, which takes a kernel that keeps a channel on chip (a split one makes 5); tap 6, for the heads run between
the passes and whatever the forward had is fetched again: 2, then student, teacher and head gradient in and the sum out;
or 3, then both gradients in and the sum out. Were nothing evicted in between, 4 would do.

The eager formula errs in float16, the more the larger the batch: for 16 images of P3 the factor 2 / numel of its mean
squared error rounds to 0, and so does every gradient. Where it errs by more than the harness allows it is left out.

``batch_norm`` is the nearest one-liner, ``F.batch_norm`` of both sides and half their mean squared error. It takes the
biased variance, with the epsilon under the root: another function, off by one in the number of positions.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cost import Provider, Step
from benchmarks.harness import Case
from jdkd._backend import available, use_backend
from jdkd.functional import pearson_tap, pkd_loss
from jdkd.reference import pearson as reference

NAME = "pearson"
CHANNELS = 256
SIZES = {"P2": (200, 336), "P3": (100, 168), "P4": (50, 84), "P5": (25, 42), "P6": (13, 21), "P7": (7, 11)}
PYRAMIDS = {"P3-P7": ("P3", "P4", "P5", "P6", "P7"), "P2-P6": ("P2", "P3", "P4", "P5", "P6")}
LAYOUTS = {"NCHW": torch.contiguous_format, "channels-last": torch.channels_last}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = {"tap": 6, "forward+backward": 3, "forward": 2}  # least passes over one side's features
BATCHES = (1, 2, 4, 8, 16)
WEIGHT = 6.0
# Without a loss scale the gradients of float16 features are mostly zero; times the weight it must stay below 65504.
LOSS_SCALES = {torch.float16: 2.0**13}

Loss = Callable[..., Any]


class Inputs(NamedTuple):
    """Levels ``[N, C, H, W]`` of both sides; ``heads`` are gradients for the students, empty but for the tap."""

    students: list[Tensor]
    teachers: list[Tensor]
    heads: list[Tensor]


def cases(device: str, full: bool = False) -> Iterator[Case]:
    """The cases for a device, the most telling ones first; all of them if ``full``."""
    if full:
        groups = itertools.product(BATCHES, [*SIZES, *PYRAMIDS], DTYPES, LAYOUTS)
        for images, name, dtype, layout in groups:
            if device == "cuda" or images == 1 or (images == 2 and name != "P2-P6"):
                others = compiled(autotuned=device == "cuda")
                yield from (case(name, images, dtype, layout, mode, device, others) for mode in MODES)
        return
    float32, bfloat16, float16 = DTYPES
    if device == "cuda":
        groups = [(16, "P3-P7", bfloat16, "NCHW", MODES), (2, "P3-P7", bfloat16, "NCHW", ("forward+backward", "tap"))]
        groups += [(16, "P3-P7", bfloat16, "channels-last", MODES)]
    else:
        groups = [(2, "P3", float32, layout, ("forward+backward", "tap")) for layout in LAYOUTS]
    for images, name, dtype, layout, modes in groups:
        others = compiled()
        yield from (case(name, images, dtype, layout, mode, device, others) for mode in modes)
    if device == "cuda":
        yield case("P3-P7", 2, bfloat16, "channels-last", "forward+backward", device)
        for dtype, layout in itertools.product((float32, float16), LAYOUTS):
            yield case("P3-P7", 2, dtype, layout, "tap", device)
    else:
        for mode in ("forward+backward", "tap"):
            yield case("P3-P7", 1, float32, "NCHW", mode, device)
        yield case("P3", 2, float32, "NCHW", "forward", device)
        for dtype, layout in itertools.product((bfloat16, float16), LAYOUTS):
            yield case("P3", 2, dtype, layout, "forward+backward", device)


def case(
    name: str,
    images: int,
    dtype: torch.dtype,
    layout: str,
    mode: str,
    device: str,
    others: Mapping[str, Loss] | None = None,
) -> Case:
    """One case of the loss.

    Args:
        name: a level or a pyramid, of :data:`SIZES` or :data:`PYRAMIDS`.
        images: the batch.
        dtype: of the features.
        layout: of :data:`LAYOUTS`.
        mode: of :data:`MODES`.
        device: ``cpu`` or ``cuda``.
        others: further competitors: losses of students, teachers and weight.
    """
    shapes = [(images, CHANNELS, *SIZES[level]) for level in PYRAMIDS.get(name, (name,))]
    scale = LOSS_SCALES.get(dtype, 1.0)

    def drawn(shapes: Sequence[tuple[int, ...]]) -> Inputs:
        return inputs(shapes, dtype, layout, mode, device, scale)

    competitors = {"eager": reference.pkd_loss, "batch_norm": batch_norm_loss, **(others or {})}
    providers = {name: step(loss, scale) for name, loss in competitors.items()}
    return Case(
        NAME,
        f"{name} N={images}",
        mode,
        dtype,
        layout,
        lambda: drawn(shapes),
        in_float32(step(reference.pkd_loss, scale)),
        {**providers, **ours(shapes, dtype, layout, mode, device, scale)},
        MODES[mode] * sum(torch.Size(shape).numel() for shape in shapes) * dtype.itemsize,
        loose=tuple(competitors),
        tiny=lambda: drawn([(1, 4, 2, 2)] * len(shapes)),
    )


def inputs(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, layout: str, mode: str, device: str, scale: float
) -> Inputs:
    """Draws features that correlate by 0.6, and head gradients as large as the loss's: both are seen in the sum."""

    def given(level: Tensor) -> Tensor:
        return level.to(dtype).contiguous(memory_format=LAYOUTS[layout])

    students = [torch.randn(shape, device=device) + 1 for shape in shapes]
    teachers = [0.6 * student + 0.8 * torch.randn_like(student) for student in students]
    heads = []
    if mode == "tap":
        heads = [torch.randn_like(student) * (scale * WEIGHT / student.numel()) for student in students]
    return Inputs(
        [given(student).requires_grad_(mode != "forward") for student in students],
        [given(teacher) for teacher in teachers],
        [given(head) for head in heads],
    )


def compiled(autotuned: bool = False) -> dict[str, Loss]:
    """The formula under torch.compile, which forgets what it compiled before; ``autotuned``: by max-autotune too.

    A CUDA graph is what the harness replays, so max-autotune makes none of its own.
    """
    torch.compiler.reset()
    losses = {"torch.compile": torch.compile(reference.pkd_loss, dynamic=False)}
    if autotuned:

        def loss(students: Sequence[Tensor], teachers: Sequence[Tensor], weight: float) -> Tensor:
            return reference.pkd_loss(students, teachers, weight)

        losses["torch.compile max-autotune"] = torch.compile(loss, dynamic=False, mode="max-autotune-no-cudagraphs")
    return losses


def batch_norm_loss(students: Sequence[Tensor], teachers: Sequence[Tensor], weight: float) -> Tensor:
    """The loss by batch normalization, which is nearly the same."""
    loss = students[0].new_zeros(())
    for pair in zip(students, teachers, strict=True):
        normalized = [F.batch_norm(level, None, None, training=True, eps=reference.EPS) for level in pair]
        loss = loss + F.mse_loss(*normalized) / 2
    return loss * weight


def ours(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, layout: str, mode: str, device: str, scale: float
) -> dict[str, Provider]:
    """Our forms: one for every backend that the device has, and the single pass where it fits."""
    found: dict[str, Provider] = {}
    for backend, reason in available(NAME).items():
        if reason is None and backend in (("triton", "cuda") if device == "cuda" else ("cpu",)):
            # The tap is always split; the plain loss of the backend cuda may be the single pass.
            tapped = mode == "tap" or backend == "cuda"
            found[f"jdkd {backend}"] = on_backend(backend, step(pearson_tap if tapped else pkd_loss, scale, tapped))
    if "jdkd cuda" in found and mode != "forward" and importlib.util.find_spec("jdkd.ops.pearson_single"):
        from jdkd.ops.pearson_single import fits

        levels = [torch.empty(s, dtype=dtype, device=device, memory_format=LAYOUTS[layout]) for s in shapes]
        if fits(levels, levels):
            found["jdkd single"] = on_backend("cuda", step(pkd_loss, scale))
    return found


def on_backend(backend: str, provider: Step) -> Step:
    """The provider on one backend, forward and backward."""

    def forward(given: Inputs) -> Sequence[Tensor]:
        with use_backend(backend):
            return provider.forward(given)

    def backward(given: Inputs, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        with use_backend(backend):
            return provider.backward(given, outputs)

    return Step(forward, backward)


def in_float32(provider: Provider) -> Provider:
    """The provider on the same inputs in float32."""

    def exact(given: Inputs) -> Sequence[Tensor]:
        students = [student.detach().float().requires_grad_(student.requires_grad) for student in given.students]
        return provider(Inputs(students, *([level.float() for level in side] for side in given[1:])))

    return exact


def step(loss_of: Loss, scale: float = 1.0, tapped: bool = False) -> Step:
    """The loss, and the gradients of the students where they ask for some: the loss's times ``scale``, plus the heads'.

    Args:
        loss_of: from students, teachers and weight to the loss; if ``tapped``, to what the heads are fed and the loss.
        scale: gradient of the loss.
        tapped: see ``loss_of``; otherwise autograd adds the heads' gradients.
    """

    def forward(given: Inputs) -> list[Tensor]:
        if tapped:
            fed, loss = loss_of(given.students, given.teachers, WEIGHT)
            return [loss, *fed]
        # Made before the loss, so that its gradient arrives first and autograd adds the heads' to it in place.
        fed = [student.view_as(student) for student, _ in zip(given.students, given.heads, strict=False)]
        return [loss_of(given.students, given.teachers, WEIGHT), *fed]

    def backward(given: Inputs, outputs: Sequence[Tensor]) -> list[Tensor]:
        loss, *fed = outputs
        if not loss.requires_grad:
            return [loss]
        fed = fed[: len(given.heads)]
        gradients = [torch.full_like(loss, scale), *given.heads]
        return [loss.detach(), *torch.autograd.grad([loss, *fed], given.students, gradients)]

    return Step(forward, backward)
