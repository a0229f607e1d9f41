"""Distillation of a detector from its data on, by a single call: what `jdkd distill` does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from jdkd.data import CocoDetectionDataset, batches, resolve_split
from jdkd.detect import adapt_classes, load, open_model
from jdkd.detect.architecture import architecture_of
from jdkd.detect.heads import is_two_stage
from jdkd.detect.inheriting import in_common, take_neck_and_heads
from jdkd.detect.input_size import require_visible, training_sizes
from jdkd.detect.weights import fingerprint
from jdkd.distill.calibration import as_alignment, check_widths
from jdkd.distill.distiller import Distiller
from jdkd.distill.feature import as_weight
from jdkd.distill.head import can_distil_heads
from jdkd.distill.levels import LevelPair, as_strides
from jdkd.errors import InputError
from jdkd.notices import say_once
from jdkd.rewrite import describe
from jdkd.rewrite.architecture import set_architecture
from jdkd.train import FitReport, TrainConfig, calibrate_bn, fit

LOGITS = "pkd+logits"
IMITATION = {"pkd": "pearson", "mse": "mse", "cwd": "cwd", LOGITS: "pearson"}  # by the name of the loss
TWO_STAGE, ONE_STAGE = 6.0, 10.0  # published weights of PKD
OTHERS = 1.0  # of MSE, and of CWD as MMYOLO's RTMDet has it
AUTO = "auto"
PROBE = 4  # batches that adapters are fitted to


@dataclass(frozen=True)
class DistillConfig:
    """How a teacher teaches, besides the settings of the training itself.

    Args:
        loss: ``"pkd"`` (Cao et al., NeurIPS 2022), ``"mse"`` (FitNets), ``"cwd"`` (Shu et al., ICCV 2021), or
            ``"pkd+logits"``, which asks the teacher's head about the student's regions or anchors too.
        loss_weight: of each level; ``"auto"`` is the published one, for PKD 6 where either of the two has two stages
            and 10 between detectors of one.
        logits_weight: of the class logits, for ``"pkd+logits"`` alone.
        tau: temperature of ``"cwd"``.
        levels: strides of the levels to compare; by default all that both have.
        own_size: the teacher sees images at its own input size; else at the student's.
        adapter: compare through trained 1x1 convolutions, dropped afterwards; by default where widths differ.
        align: ``"permute"`` or ``"linear"`` for detectors of unrelated origin; see
            :class:`jdkd.distill.FeatureDistiller`.
        inherit: begin with the teacher's neck and heads, as far as names and shapes agree; what predicts classes is
            taken for each class by its name.
        detach_after: step after which the student goes on without its teacher; by default never.

    Raises:
        InputError: a setting is out of range.
    """

    loss: str = "pkd"
    loss_weight: float | str = AUTO
    logits_weight: float = 1.0
    tau: float = 1.0
    levels: Sequence[int] | None = None
    own_size: bool = True
    adapter: bool | None = None
    align: str = "none"
    inherit: bool = False
    detach_after: int | None = None

    def __post_init__(self) -> None:
        if self.loss not in IMITATION:
            raise InputError(f"loss must be one of {', '.join(IMITATION)}, got {self.loss!r}.")
        as_alignment(self.align, adapter=bool(self.adapter))
        for name in ("loss_weight", "logits_weight"):
            if (weight := getattr(self, name)) != AUTO or name != "loss_weight":
                object.__setattr__(self, name, as_weight(weight, name))
        if self.logits_weight != 1 and self.loss != LOGITS:
            raise InputError(
                f"logits_weight is {self.logits_weight:g}, and loss {self.loss!r} has no logits; leave it out, or take "
                f"{LOGITS!r}."
            )
        object.__setattr__(self, "levels", as_strides(self.levels))
        last = self.detach_after
        if last is not None and (type(last) is not int or last < 0):
            raise InputError(f"detach_after must be a whole number of steps of at least 0, got {last!r}.")

    def weight(self, student: nn.Module, teacher: nn.Module) -> float:
        """The weight of each level, for two detectors."""
        if self.loss_weight != AUTO:
            return float(self.loss_weight)
        if IMITATION[self.loss] != "pearson":
            return OTHERS
        return TWO_STAGE if is_two_stage(teacher) or is_two_stage(student) else ONE_STAGE

    def require_end(self, steps: int) -> None:
        """Refuses a teacher that is to leave when nothing is trained any more.

        Raises:
            InputError: it is.
        """
        if self.detach_after is not None and self.detach_after >= max(1, steps):
            raise InputError(
                f"detach_after is {self.detach_after} and the training has {steps} steps, all of which the teacher "
                "would teach; give an earlier step, or leave it out."
            )


class Distilled(NamedTuple):
    """What a distillation left: the student, and how it was trained."""

    student: nn.Module
    training: FitReport


def distill(
    student: nn.Module | Path | str,
    teacher: nn.Module | Path | str,
    data: CocoDetectionDataset | Path | str,
    config: TrainConfig,
    method: DistillConfig | None = None,
    *,
    device: torch.device | str = "cpu",
    **how: Any,
) -> Distilled:
    """Trains a student under a teacher, with PKD unless another loss is asked for.

    The teacher is run in evaluation mode, without gradients and up to its neck only, on the very batch that the student
    is trained on; neither it nor an adapter enters the student or what is saved of it.

    Args:
        student: a detector, trained in place, or what :func:`jdkd.detect.open_model` takes, whose fresh weights are
            drawn by the seed of ``config``; it learns the classes of the data, by their names.
        teacher: a detector, or the folder of one. What it was trained to find may differ from the data's classes, as
            long as its features alone teach.
        data: the training images, or a folder in the COCO layout.
        config: the settings of the training.
        method: how the teacher teaches.
        device: where to train.
        how: ``folder``, ``resume`` and ``progress`` of :func:`jdkd.train.fit`.

    Returns:
        The student, and what the training did.

    Raises:
        InputError: the two cannot be compared, ``folder`` holds what another teacher or another method taught, or
            whatever :func:`jdkd.train.fit` refuses.
        DivergenceError: a loss, named with the level that it is of, or a gradient is not finite.
    """
    method = method or DistillConfig()
    method.require_end(config.steps)
    if not isinstance(data, CocoDetectionDataset):
        data = CocoDetectionDataset(resolve_split("train", data))
    student = student if isinstance(student, nn.Module) else opened(student, data.classes, config.seed)
    teacher = teacher if isinstance(teacher, nn.Module) else load(teacher)
    require_seen(student, teacher, data, method, config.sizes)
    if how.get("folder") is not None:
        how["identity"] = {"teacher": fingerprint(teacher), **asdict(method)}
    probe = [*batches(data, batch_size=config.batch_size, steps=PROBE, seed=config.seed, device=device)]
    with taught(student.to(device), teacher.to(device), method, probe) as teaching:
        probe.clear()  # would lie on the device as long as it trains
        return Distilled(student, fit(student, data, config, device=device, **teaching, **how))


def opened(source: Path | str, classes: tuple[str, ...], seed: int) -> nn.Module:
    """A student by what a user calls it, for the classes of the data, which it knows by name.

    Args:
        source: what :func:`jdkd.detect.open_model` takes.
        classes: of the data; the predictors of a detector of another number of them are made anew.
        seed: of fresh weights.

    Raises:
        InputError: there is none of that name.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = open_model(str(source), classes=len(classes))
        adapt_classes(model, len(classes))
    known = architecture_of(model, "distill")
    if known.classes != classes:
        set_architecture(model, describe(model, known.builder, known.arguments, classes=classes))
    return model


def require_seen(
    student: nn.Module,
    teacher: nn.Module,
    data: CocoDetectionDataset,
    method: DistillConfig,
    sizes: Sequence[int] | None = None,
) -> None:
    """Refuses images that are too elongated for the input size of either detector, as far as it is shown them, and
    sizes at which the student's anchors would not be the teacher's, which is asked about them.

    Args:
        student, teacher: detectors.
        data: the training images.
        method: how the teacher is to teach; what sees images as its student does has no input size of its own.
        sizes: short sides of the student's images in training, where these are others than its own.

    Raises:
        InputError: names an image, or the sizes.
    """
    require_visible(student, data.sizes, "the student")
    asked = bool(method.loss == LOGITS and method.logits_weight)
    remedy = "let the teacher see images as the student does (own_size=False, --shared-size)"
    if method.own_size and (asked or method.weight(student, teacher)):
        require_visible(teacher, data.sizes, "the teacher", remedy)
    if method.own_size and asked and sizes and can_distil_heads(student, teacher, own_size=True):
        with training_sizes(student, sizes):
            alike = can_distil_heads(student, teacher, own_size=True)
        if not alike:
            raise InputError(
                f"the student is trained at short sides of {', '.join(map(str, sizes))}, and {LOGITS} asks its "
                f"teacher, which sees images at its own, about the same anchors; {remedy}, or leave the sizes out."
            )


@contextmanager
def taught(
    student: nn.Module, teacher: nn.Module, method: DistillConfig, probe: Sequence[Any]
) -> Iterator[dict[str, Any]]:
    """What :func:`jdkd.train.fit` is given for a student that learns from a teacher: losses and what goes with them.

    Says once what is compared, how and with what weight.

    Args:
        student, teacher: on the device of the training.
        method: how it teaches.
        probe: batches ``(images, targets)``, on which the two are compared before, and adapters fitted.

    Raises:
        InputError: they cannot be compared in that way.
    """
    distiller, pairs = comparable(student, teacher, probe[0], method)
    if method.inherit:
        say_once(str(take_neck_and_heads(student, teacher)))
    if pairs:
        say_once(_comparison(method, method.weight(student, teacher), pairs, distiller.adapts))
    together = bool(pairs) and (distiller.adapts or method.align != "none")
    del pairs  # all levels of a batch, which would lie on the device as long as the block runs
    if together:
        _calibrate(distiller, student, probe)
    with lessons(student, distiller, method.detach_after) as given:
        yield given


@contextmanager
def lessons(student: nn.Module, distiller: Distiller, until: int | None = None) -> Iterator[dict[str, Any]]:
    """What :func:`jdkd.train.fit` is given for a student and what distils it.

    Args:
        student: in whose training forwards the teacher is asked.
        distiller: of it, calibrated where it has adapters.
        until: step after which the student goes on without its teacher; by default never.
    """

    def losses(images: list[Tensor], targets: list[dict[str, Tensor]], step: int) -> Iterator[dict[str, Tensor]]:
        distiller.runner.enabled = teaches = until is None or step < until
        terms = student(images, targets)
        yield terms | (distiller.losses() if teaches else {})

    with distiller:
        yield {"losses": losses, "parts": distiller.parts, "auxiliary": distiller.adapters}


@torch.no_grad()
def comparable(
    student: nn.Module, teacher: nn.Module, batch: Any, method: DistillConfig
) -> tuple[Distiller, list[LevelPair]]:
    """What compares two detectors, and the levels that it compares of a batch; both stay as they are.

    Args:
        student, teacher: on one device.
        batch: ``(images, targets)``.
        method: how the teacher is to teach.

    Returns:
        It, without adapters yet; and no levels where their weight is 0.

    Raises:
        InputError: the two cannot be compared in that way.
    """
    if method.inherit:
        in_common(student, teacher)
    weight = method.weight(student, teacher)
    options: dict[str, Any] = {"feature_weight": weight, "own_size": method.own_size}
    options["imitation"] = IMITATION[method.loss]
    options |= {"levels": method.levels, "head_weight": method.logits_weight * (method.loss == LOGITS)}
    options["align"] = method.align
    distiller = Distiller(student, teacher, tau=method.tau, adapter=bool(method.adapter), **options)
    pairs = next(distiller.runner.compared([batch], method.levels)) if weight else []
    for pair in pairs:
        check_widths(pair, method.align)
    differ = any(pair.student.shape[1] != pair.teacher.shape[1] for pair in pairs)
    if differ and method.adapter is None and method.align == "none":
        distiller = Distiller(student, teacher, tau=method.tau, adapter=True, **options)
    return distiller, pairs


@torch.no_grad()
def _calibrate(distiller: Distiller, student: nn.Module, probe: Sequence[Any]) -> None:
    """Brings channels together as they are in training: norms that have seen nothing are measured meanwhile."""
    norms = [module for module in student.modules() if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm)]
    fresh = any(norm.num_batches_tracked is not None and not norm.num_batches_tracked for norm in norms)
    before = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    if fresh:
        calibrate_bn(student, probe)
    agreements = distiller.calibrate(probe)
    if not distiller.adapts:
        say_once(agreements.sentence())
    for buffer, value in before:
        buffer.copy_(value)


def _comparison(method: DistillConfig, weight: float, pairs: Sequence[LevelPair], adapts: bool) -> str:
    """What is compared with what, in a line."""
    strides = ", ".join(str(stride) for stride in dict.fromkeys(pair.stride for pair in pairs))
    ours, theirs = (sorted({getattr(pair, side).shape[1] for pair in pairs}) for side in ("student", "teacher"))
    own, other = (" and ".join(map(str, widths)) for widths in (ours, theirs))
    how = f"through a trained 1x1 adapter, from {own} channels to {other}" if adapts else f"channel by channel ({own})"
    if method.align != "none":
        how = f"channels brought together by align={method.align}, from {own} to {other}"
    seen = "at its own input size" if method.own_size else "as the student does"
    return (
        f"{method.loss} of weight {weight:g} on the levels of stride {strides}, {how}; the teacher sees images {seen}"
    )
