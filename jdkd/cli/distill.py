"""`jdkd distill`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jdkd.cli.detectors import DetectorFlags
from jdkd.cli.flags import DataFlags, RecipeFlags, TrainingFlags
from jdkd.cli.training import Data, Job, opened, say_where_nothing_synchronises
from jdkd.errors import InputError
from jdkd.notices import say_once
from jdkd.presets import Preset, preset

if TYPE_CHECKING:
    from torch import nn

    from jdkd.distill import DistillConfig
    from jdkd.train import FitReport, TrainConfig

TEACHER = "teacher"  # folder, in that of the run, of a teacher that is trained first
BY_STRIDE = "by-stride"


@dataclass(frozen=True)
class Distill:
    """Train a student under a teacher, with PKD unless told otherwise, and score it on the validation split.

    The student alone is saved; the teacher runs up to its neck, at its own input size. A teacher that has no weights
    yet is trained first, in OUT/teacher.

    Several processes: torchrun --nproc-per-node N -m jdkd distill ...; --batch-size is of each.

    Example: jdkd distill --teacher runs/teacher --student retinanet:resnet18 --data data --out runs/student
    """

    out: Path
    """Folder for the student's architecture.json and weights.safetensors, distill.json, log.jsonl."""
    teacher: str | None = None
    """Folder of a detector, its name in torchvision, FAMILY:BACKBONE, or package.module:function."""
    student: str | None = None
    """The same, or a JSON file of an architecture."""
    preset: str | None = None
    """Published pair, weight, levels, recipe and input size, also of a student that is a folder:
    fasterrcnn_r101_fasterrcnn_r50, maskrcnn_swin_retinanet_r50, maskrcnn_swin_fcos_r50, retinanet_x101_retinanet_r50,
    fcos_x101_retinanet_r50, gfl_r101_gfl_r50 or reppoints_x101-dcn_reppoints_r50; other flags take precedence."""
    narrow: float | None = None
    """Share of a preset's channels and input size to keep, for a try on a CPU; such as 0.125. The recipe is ours."""
    source: DataFlags = field(default_factory=DataFlags)
    teacher_weights: Path | None = None
    """State dict of the teacher, or DEFAULT, COCO_V1 of torchvision."""
    teacher_steps: int | None = None
    """Optimizer steps of a teacher that has no weights yet [as many as the student's]."""
    loss: Literal["pkd", "mse", "cwd", "pkd+logits"] = "pkd"
    """Pearson correlation of features, their squared error, channel-wise divergence, or the first and class logits."""
    loss_weight: str | None = None
    """Weight per level, or auto: PKD's 6 where there are two stages, else 10; of others 1 [the preset's, or auto]."""
    logits_weight: float = 1.0
    """Weight of the loss on class logits."""
    tau: float = 1.0
    """Temperature of cwd."""
    levels: str | None = None
    """Strides of the levels to compare, such as 8,16,32, or by-stride: all that both have [the preset's, or all]."""
    shared_size: bool = False
    """Show the teacher the images at the student's input size instead of its own."""
    adapter: bool = False
    """Compare through trained 1x1 convolutions where widths agree, too; where they differ, that is always done."""
    align: Literal["none", "permute", "linear"] = "none"
    """Between detectors of unrelated origin: match channels, or predict the teacher's, as a few images show them."""
    inherit: bool = False
    """Begin with the teacher's neck and heads, as far as names, shapes and the names of classes agree."""
    detach_after: int | None = None
    """Step after which the student trains on without its teacher [never]."""
    detach_epoch: int | None = None
    """The same in epochs of the training images."""
    detector: DetectorFlags = field(default_factory=DetectorFlags)
    recipe: RecipeFlags = field(default_factory=RecipeFlags)
    training: TrainingFlags = field(default_factory=TrainingFlags)

    def __call__(self) -> None:
        with self.training.processes() as device:
            self._run(device)

    def _run(self, device: str) -> None:
        from jdkd.train.distributed import processes

        chosen = None if self.preset is None else preset(self.preset)
        self._check(chosen)
        method = self._method(chosen)
        say_where_nothing_synchronises(self.detector.choice.norm, device)
        recipe = self._recipe(chosen, processes())
        data, config = opened("distill", self.out, self.source, recipe, self.training)
        method = self._until(method, len(data.train), config, processes())
        flags = self._detector(chosen)
        if chosen is not None:
            print("\n".join([str(chosen), *(f"  {line}" for line in chosen.differs)]))
        classes = data.train.classes
        teacher, is_fresh = self._teacher(self.teacher or chosen.teacher, flags, classes, config)
        student, weights = flags.built(self.student or chosen.student, classes, config.seed)
        data = data.of(student, config.batch_size, config.seed)
        _require_pair(student, teacher, data, method, config)
        job = Job("distill", self.out, student, weights, data, config, recipe, self.training, device)
        if self.teacher_steps is not None and not is_fresh:
            raise InputError(
                f"--teacher-steps {self.teacher_steps} trains a teacher that has no weights yet, and "
                f"{self.teacher or chosen.teacher} has; leave it out."
            )
        lessons = self._lessons(config) if is_fresh else None
        if lessons is not None:
            data.of(teacher, config.batch_size, config.seed)

        def fitting(progress: Any, how: dict[str, Any]) -> FitReport:
            from jdkd.detect.checkpoint import WEIGHTS
            from jdkd.distill import distill

            if lessons is not None:
                if not (self.out / TEACHER / WEIGHTS).exists():  # which a run that is carried on may have by now
                    say_once(
                        f"the teacher {self.teacher or chosen.teacher} has no weights yet and is trained first, for "
                        f"{lessons.steps} steps, in {self.out / TEACHER}; give --teacher a folder, or "
                        "--teacher-weights, to spare that"
                    )
                _train(teacher, data, lessons, self.out / TEACHER, how["device"], job.shown(progress, TEACHER))
            _say_if_blind(teacher, data, config, device)
            return distill(student, teacher, data.train, config, method, **how).training

        job.run(fitting, **_identity(teacher, method, lessons))

    def _check(self, chosen: Preset | None) -> None:
        """Refuses what does not go together.

        Raises:
            InputError: there is no pair, or a flag is for presets.
        """
        if chosen is None:
            missing = [f"--{name}" for name in ("teacher", "student") if getattr(self, name) is None]
            if missing:
                raise InputError(f"{' and '.join(missing)} not given; give both, or --preset NAME of a published pair.")
            if self.narrow is not None:
                raise InputError(f"--narrow {self.narrow:g} is of a --preset; --width narrows a student.")
        if self.narrow is not None and not 0 < self.narrow <= 1:
            raise InputError(f"--narrow is {self.narrow:g}, a share of the channels to keep; give one in 0..1.")
        if self.teacher_steps is not None and self.teacher_steps < 1:
            raise InputError(f"--teacher-steps is {self.teacher_steps}; give at least 1.")
        if self.detach_epoch is not None and self.detach_epoch < 1:
            raise InputError(f"--detach-epoch is {self.detach_epoch}; give at least 1.")
        if self.detach_epoch is not None and self.detach_after is not None:
            raise InputError(
                f"--detach-epoch {self.detach_epoch} and --detach-after {self.detach_after} are both given; give one."
            )

    def _method(self, chosen: Preset | None) -> DistillConfig:
        """How the teacher teaches.

        Raises:
            InputError: a flag is not what it may be.
        """
        from jdkd.distill import DistillConfig

        weight, levels = self.loss_weight, self.levels
        if weight is None:
            weight = chosen.loss_weight if chosen and self.loss.startswith("pkd") else "auto"
        if levels is None and chosen is not None:
            strides: Any = chosen.levels
        else:
            strides = None if levels in (None, BY_STRIDE) else _strides(levels)
        return DistillConfig(
            loss=self.loss,
            loss_weight=weight if weight == "auto" else _number(weight),
            logits_weight=self.logits_weight,
            tau=self.tau,
            levels=strides,
            own_size=not self.shared_size,
            adapter=True if self.adapter else None,
            align=self.align,
            inherit=self.inherit,
            detach_after=self.detach_after,
        )

    def _until(self, method: DistillConfig, images: int, config: TrainConfig, processes: int) -> DistillConfig:
        """The same with an epoch after which the teacher leaves as a step.

        Raises:
            InputError: it would leave when the training is over.
        """
        from jdkd.train.schedule import steps_of

        if self.detach_epoch is not None:
            at_once = config.batch_size * config.accumulate * processes
            method = replace(method, detach_after=steps_of(self.detach_epoch, images, at_once))
        method.require_end(config.steps)
        return method

    def _recipe(self, chosen: Preset | None, processes: int) -> RecipeFlags:
        """The flags of the training, with the published ones where none was given; of a narrowed pair they are ours.

        A step has as many images as the published one, however many processes and batches they are divided among.
        """
        if chosen is None or self.narrow is not None:
            return self.recipe
        parts = processes * max(1, self.training.accumulate)
        each = max(1, chosen.batch_size // parts)
        if self.recipe.batch_size is None and each * parts != chosen.batch_size:
            say_once(
                f"a step has {each * parts} images, {each} in each of {parts} batches, and the published one "
                f"{chosen.batch_size}, which these do not divide; --lr is the published one all the same"
            )
        published = chosen.recipe | {"batch_size": each}
        if self.recipe.steps is not None:
            del published["schedule"]
        return replace(self.recipe, **{k: v for k, v in published.items() if getattr(self.recipe, k) is None})

    def _detector(self, chosen: Preset | None) -> DetectorFlags:
        """The flags of the student, whose input size a teacher that is trained here has too."""
        if chosen is None:
            return self.detector
        share = self.narrow or 1.0
        sizes = {name: max(1, round(share * getattr(chosen, name))) for name in ("min_size", "max_size")}
        given = {name: size for name, size in sizes.items() if getattr(self.detector, name) is None}
        return replace(self.detector, **given, width=self.detector.width * share)

    def _teacher(
        self, name: str, flags: DetectorFlags, classes: tuple[str, ...], config: TrainConfig
    ) -> tuple[nn.Module, bool]:
        """The teacher, and whether it has no weights yet.

        Raises:
            InputError: there is none of that name, or its weights do not fit.
        """
        from jdkd.detect import import_detector, load
        from jdkd.detect.sources import has_own_weights

        if Path(name).is_dir():
            if self.teacher_weights is not None:
                raise InputError(f"--teacher {name} is a folder, which has weights; leave --teacher-weights out.")
            return load(name), False
        if self.teacher_weights is not None or has_own_weights(name):
            return import_detector(name, self.teacher_weights), False
        like = DetectorFlags(width=self.narrow or 1.0, min_size=flags.min_size, max_size=flags.max_size)
        return like.built(name, classes, config.seed + 1)[0], True

    def _lessons(self, config: TrainConfig) -> TrainConfig:
        """How a teacher that has no weights yet is trained."""
        return replace(config, steps=self.teacher_steps or config.steps)


def _require_pair(
    student: nn.Module, teacher: nn.Module, data: Data, method: DistillConfig, config: TrainConfig
) -> None:
    """Refuses a pair that cannot be compared, or not on these images, before anything is written.

    Raises:
        InputError: it cannot.
    """
    from jdkd.data import batches
    from jdkd.distill import comparable
    from jdkd.distill.training import require_seen

    require_seen(student, teacher, data.train, method, config.sizes)
    comparable(student, teacher, next(batches(data.train, batch_size=1, steps=1, seed=0)), method)


def _train(teacher: nn.Module, data: Data, config: TrainConfig, folder: Path, device: str, progress: Any) -> None:
    """Trains a teacher, or carries that on."""
    from jdkd.detect import save
    from jdkd.train import fit
    from jdkd.train.distributed import is_first

    fit(teacher, data.train, config, device=device, folder=folder, resume=True, progress=progress)
    if is_first():
        save(folder, teacher)


def _say_if_blind(teacher: nn.Module, data: Data, config: TrainConfig, device: str) -> None:
    """Says, in the first process and where it is to teach, that a teacher finds nothing in a batch."""
    from jdkd.data import batches
    from jdkd.distill.recall import say_if_blind
    from jdkd.train.distributed import is_first

    if is_first():
        seen = batches(data.train, batch_size=config.batch_size, steps=1, seed=config.seed, device=device)
        say_if_blind(teacher.to(device), seen)


def _identity(teacher: nn.Module, method: DistillConfig, lessons: TrainConfig | None) -> dict[str, Any]:
    """What a resumed distillation must have in common with the first one, besides what every training has."""
    from jdkd.detect.weights import fingerprint

    steps = None if lessons is None else lessons.steps
    return {"teacher": fingerprint(teacher) | {"trained_here": steps}, "method": dataclasses.asdict(method)}


def _number(text: str | float) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--loss-weight is {text!r}; give a number, or auto.") from None


def _strides(text: str) -> list[int]:
    try:
        return [int(stride) for stride in text.split(",")]
    except ValueError:
        raise InputError(f"--levels is {text!r}; give strides such as 8,16,32, or {BY_STRIDE}.") from None
