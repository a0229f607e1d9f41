"""The training loop: one for base detectors, supernets, distillation and the short trainings of a search."""

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol, cast

import torch
from torch import Tensor, nn

from jdkd.data import batches
from jdkd.data.loading import Batch
from jdkd.detect.backbones import steady_coarsest
from jdkd.detect.contract import as_scalar
from jdkd.detect.input_size import require_resizing, require_visible, training_sizes
from jdkd.errors import InputError
from jdkd.nn.modes import mode
from jdkd.notices import say_once
from jdkd.train import checkpoint
from jdkd.train.averaging import RunningAverage
from jdkd.train.config import EARLIER, RESUME_MAY_CHANGE, TrainConfig
from jdkd.train.distributed import (
    align,
    average_gradients,
    from_first,
    is_first,
    mean_of_all,
    own_batches,
    processes,
    rank,
)
from jdkd.train.divergence import GRADIENT, DivergenceError, NonFiniteMonitor
from jdkd.train.inputs import with_targets_of
from jdkd.train.interrupt import uninterrupted
from jdkd.train.log import Log
from jdkd.train.optimizer import add_l1_subgradient, build_optimizer, inherit_moments, slimmable_scales
from jdkd.train.variance import with_variance

LEAST_SCALE = 2.0**-8  # a loss scale that sank so far means that the gradient is infinite at any scale

Losses = Callable[[list[Tensor], list[dict[str, Tensor]], int], Iterable[dict[str, Tensor]]]
Parts = Callable[[], Mapping[str, Tensor]]


class TrainingCallback(Protocol):
    """Called after every step with how far a training is; ``losses`` are those of the last log line."""

    def __call__(self, step: int, total: int, losses: dict[str, float]) -> None: ...


@dataclass(frozen=True)
class FitReport:
    """What a training did: steps and seconds, interrupted parts included, and the losses last logged."""

    steps: int
    seconds: float
    losses: dict[str, float]


def fit(
    model: nn.Module,
    dataset: Any,
    config: TrainConfig,
    *,
    device: torch.device | str,
    losses: Losses | None = None,
    parts: Parts | None = None,
    auxiliary: nn.Module | None = None,
    inherit: Path | str | None = None,
    folder: Path | str | None = None,
    resume: bool = False,
    identity: Mapping[str, Any] | None = None,
    progress: TrainingCallback | None = None,
) -> FitReport:
    """Trains a detector in place, for one cycle of the learning rate with an optimizer of its own.

    A training is a function of the model, the data and the config: step k draws from a generator seeded with
    (seed, k) alone, so one that was interrupted and resumed ends where an uninterrupted one does, bit for bit
    on a CPU. The caller's own generators are left as they were.

    Inside a process group (:mod:`jdkd.train.distributed`) all processes train the same model: each on
    ``batch_size`` images of its own, with gradients averaged, so that N of them take the steps of one with N times the
    images (up to rounding, and what a forward draws or normalises over its own images). The first writes; all end with
    its model.

    Args:
        model: the detector, moved to ``device`` and trained there; its modules keep their mode.
        dataset: a :class:`jdkd.data.coco.CocoDetectionDataset`, with masks if the detector trains on them.
        config: the settings.
        device: where to train.
        losses: ``losses(images, targets, step)`` gives one or more dictionaries of scalar losses. Each is
            summed and back-propagated before the next is asked for, so a generator that runs one subnet at a
            time accumulates gradients with the memory of one. By default, the detector's own losses.
        parts: what the losses last asked for are made of, scalars without gradients by name, such as a loss by level:
            logged beside them, and named where training diverges.
        auxiliary: a module that ``losses`` uses, such as the adapters of distillation: its parameters are trained with
            the detector's and kept in the checkpoint, but are no part of the detector.
        inherit: the checkpoint of another training, its folder or its file, whose optimizer this one goes on with where
            parameters have the same name and shape; the others begin fresh. Not read by a training that is resumed,
            which has its own.
        folder: where the checkpoint and the log (``log.jsonl``) go; nothing is written without one.
        resume: carry on from the checkpoint in ``folder``, if there is one.
        identity: what else a resumed training must have in common with the first, JSON-able by name.
        progress: called after every step.

    Returns:
        Steps, seconds, and the losses last logged.

    Raises:
        InputError: an image is too elongated for the detector's input size, or a batch leaves a batch norm one value
            a channel; nothing is trainable, or a loss is no scalar; ``folder`` holds another run, the checkpoint does
            not belong to these settings, data or model, or ``folder`` cannot be written; the detector trains on masks
            that the data do not have, or on keypoints; ``inherit`` has nothing that fits.
        DivergenceError: a loss or gradient is not finite. On a CPU the step is not taken; on a GPU it is
            noticed at the next log line or checkpoint, and the weights in memory may have gone with it. The
            checkpoint is good.
        KeyboardInterrupt: after the step under way was finished, logged and saved.
    """
    if not isinstance(auxiliary, nn.Module | None):
        raise InputError(f"auxiliary is {auxiliary!r:.60}; give a torch.nn.Module of what is trained along, or None.")
    require_visible(model, getattr(dataset, "sizes", ()))
    require_resizing(model, config.sizes)
    dataset = with_targets_of(model, dataset)
    run = _Run(model, config, torch.device(device), losses, auxiliary, parts)
    if inherit is not None and not (resume and folder is not None and (Path(folder) / checkpoint.CHECKPOINT).exists()):
        inherit_moments(run.optimizer, checkpoint.read_parent(Path(inherit))["optimizer"])
    about = (checkpoint.data_identity(dataset), dict(identity or {}))
    home = _Home(Path(folder), run, *about, resume) if folder is not None else None
    home = home if is_first() else None  # the others hold what is resumed, and write nothing
    align(run.trained)
    batch: dict[str, Any] = {"batch_size": config.batch_size, "seed": config.seed, "by_aspect": config.by_aspect}
    batch |= own_batches(run.step, config.steps, config.accumulate)
    how: dict[str, Any] = {"flip": config.flip, "workers": config.workers, "device": run.device}
    drawing = torch.random.fork_rng([run.device] if run.on_gpu else [])
    with mode(run.trained, training=True), drawing, training_sizes(model, config.sizes), steady_coarsest(model):
        try:
            read = batches(dataset, **batch, **how) if run.step < config.steps else iter(())
            for of_step in zip(*[read] * config.accumulate, strict=True):
                with uninterrupted():  # until it is logged, as a resumed training begins after it
                    run.advance(of_step)
                    if run.step % config.log_every == 0 or run.step in (1, config.steps):
                        row = run.row()
                        if home:
                            home.log.add(row)
                    if home and (run.step == config.steps or _due(run.step, config.checkpoint_every)):
                        home.save()
                if progress:
                    progress(run.step, config.steps, run.losses)
        except KeyboardInterrupt:
            if home and run.between_steps:
                home.save()
            raise
        finally:
            run.trained.zero_grad(set_to_none=True)
    if run.average is not None:
        run.average.copy_to(model)
    align(run.trained)
    return FitReport(run.step, run.seconds, run.losses)


def step_seed(seed: int, step: int) -> int:
    """The seed of one step: far apart for neighbouring steps and seeds."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=7).digest())


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class _Run:
    """A training under way."""

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        device: torch.device,
        losses: Losses | None,
        auxiliary: nn.Module | None,
        parts: Parts | None,
    ) -> None:
        self.model, self.auxiliary = model, auxiliary
        self.parts = parts or dict
        self.trained = nn.ModuleList([model] if auxiliary is None else [model, auxiliary]).to(device)
        self.config, self.device = config, device
        self.on_gpu = device.type == "cuda"
        self.dtype = _autocast_dtype(config.amp, device)
        self.ask = losses or (lambda images, targets, step: (model(images, targets),))
        self.optimizer = build_optimizer(model, config, auxiliary)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.scales = slimmable_scales(model)
        self.average = RunningAverage(model, config.ema) if config.ema else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.monitor = NonFiniteMonitor()
        self.kept = "no checkpoint was kept, as no folder was given"
        self.step = 0
        self.between_steps = True
        self.losses: dict[str, float] = {}
        self._terms: list[tuple[tuple[str, ...], Tensor]] = []
        self._parts: Mapping[str, Tensor] = {}
        self._norm = torch.zeros((), device=device)
        self._before, self._resumed = 0.0, time.perf_counter()
        self._logged = (0, 0.0)  # step and seconds of the last log line

    @property
    def precision(self) -> str:
        return str(self.dtype or torch.float32).removeprefix("torch.")

    @property
    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._resumed

    def advance(self, batches: Sequence[Batch]) -> None:
        """Takes one optimizer step, over the mean of the losses of some batches."""
        self.between_steps = False
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr_at(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        self._terms = []
        for place, (images, targets) in enumerate(batches, self.step * len(batches)):
            self._seed(step_seed(self.config.seed, place * processes() + rank()))
            for terms in self._asked(images, targets):
                names, values = tuple(terms), torch.stack([as_scalar(*term) for term in terms.items()])  # [terms]
                self._parts = self.parts()
                self._see((*names, *self._parts), torch.stack([*values.detach(), *self._parts.values()]))
                values = values / len(batches)
                self.scaler.scale(values.sum()).backward()
                self._terms.append((names, values.detach()))
        average_gradients(self.parameters)
        self.scaler.unscale_(self.optimizer)
        self._norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip or float("inf"))
        if not self.scaler.is_enabled():  # with loss scaling, an infinite gradient only means a smaller scale
            self._see((GRADIENT,), self._norm[None], last=True)
        add_l1_subgradient(self.scales, self.config.gamma_l1)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update(self.model, self.step)
        self.step += 1
        self.between_steps = True

    def row(self) -> dict[str, Any]:
        """The log line of the last step: of several dictionaries of losses, the sum; the mean of all processes."""
        own: dict[str, float] = {}
        for names, values in self._terms:
            for name, value in zip(names, values.tolist(), strict=True):
                own[name] = own.get(name, 0.0) + value
        losses = mean_of_all(own)
        self.check()
        if infinite := next((name for name, value in losses.items() if not math.isfinite(value)), None):
            self._diverged(self.step, infinite)  # in another process, which says so too
        self.losses = losses
        seconds, (step_before, seconds_before) = self.seconds, self._logged
        self._logged = (self.step, seconds)
        lr, norm = self.config.lr_at(self.step - 1), float(self._norm)
        row: dict[str, Any] = {"step": self.step, "lr": lr, "grad_norm": norm}
        if self.scaler.is_enabled():
            row["loss_scale"] = self.scaler.get_scale()
            if row["loss_scale"] < LEAST_SCALE:
                self._diverged(self.step, GRADIENT)
        if self._parts:
            row["parts"] = {name: float(value) for name, value in self._parts.items()}
        taken = max(1, self.step - step_before)
        return row | {"step_seconds": (seconds - seconds_before) / taken, "losses": self.losses}

    def check(self) -> None:
        """Raises DivergenceError if anything so far was not finite."""
        if found := self.monitor.first():
            self._diverged(*found)

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "seconds": self.seconds,
            "losses": self.losses,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "precision": self.precision,
            "auxiliary": {} if self.auxiliary is None else self.auxiliary.state_dict(),
            "average": {} if self.average is None else self.average.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        kept = state.get("auxiliary", {})
        if self.auxiliary is not None:
            self.auxiliary.load_state_dict(kept)
        elif kept:
            raise ValueError(f"it holds {', '.join([*kept][:3])} of an auxiliary module, and fit was given none")
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if state["scaler"]:  # empty where the loss was not scaled
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.losses, self._before = state["step"], state["losses"], state["seconds"]
        self._logged = (self.step, self.seconds)

    def _asked(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        """Computes the dictionaries of losses under autocast, one by one, and only them."""
        with self._autocast(), with_variance(self.config):
            asked = self.ask(images, targets, self.step)
            terms_left = cast(Iterator[dict[str, Tensor]], iter((asked,) if isinstance(asked, Mapping) else asked))
        while True:
            with self._autocast(), with_variance(self.config):
                terms = next(terms_left, None)
            if terms is None:
                return
            yield terms

    def _diverged(self, step: int, what: str) -> NoReturn:
        raise DivergenceError(
            f"training diverged at step {step} of {self.config.steps}: {what} {'are' if ', ' in what else 'is'} not "
            f"finite ({self.kept}); "
            f"lower lr ({self.config.lr:g}) or clip ({self.config.clip:g}), or raise warmup "
            f"({self.config.warmup:g}).",
            step,
            what,
        )

    def _seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed looks at every device, which takes longer
        if self.on_gpu:
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(seed)

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, dtype=self.dtype) if self.dtype else nullcontext()

    def _see(self, names: tuple[str, ...], values: Tensor, last: bool = False) -> None:
        self.monitor.observe(self.step + 1, names, values)
        if not self.on_gpu and (last or processes() == 1):  # one that left early would keep the others waiting
            self.check()


class _Home:
    """The folder of a run: its checkpoint and its log."""

    def __init__(self, folder: Path, run: _Run, data: dict[str, Any], identity: dict[str, Any], resume: bool) -> None:
        self.folder, self.run, self.data, self.identity = folder, run, data, identity
        self.config = {**dataclasses.asdict(run.config), "processes": processes()}
        self._open(from_first(lambda: self._state(resume)))

    def save(self) -> None:
        self.run.check()
        about = {"config": self.config, "data": self.data, "identity": self.identity}
        checkpoint.write(self.folder, {**self.run.state(), **about})
        self._kept()

    def _state(self, resume: bool) -> dict[str, Any] | None:
        """The checkpoint that is carried on, if there is one."""
        if not resume and (self.folder / checkpoint.CHECKPOINT).exists():
            raise InputError(
                f"{self.folder} holds another run ({checkpoint.CHECKPOINT}); resume it or give another folder."
            )
        return checkpoint.read(self.folder) if resume else None

    def _open(self, state: dict[str, Any] | None) -> None:
        if state is not None:
            usual = {**dataclasses.asdict(TrainConfig(steps=0)), **EARLIER}  # what earlier versions did not know
            checkpoint.require_same("config", {**usual, **state["config"]}, self.config, ignore=RESUME_MAY_CHANGE)
            checkpoint.require_same("data", state["data"], self.data)
            checkpoint.require_same("settings", state.get("identity", self.identity), self.identity)
            if (before := state.get("precision")) not in (None, now := self.run.precision):
                say_once(
                    f"the training in {self.folder} was begun in {before} and goes on in {now}, as amp "
                    f"{self.run.config.amp!r} has it on {self.run.device}: it will not end where either would alone"
                )
            try:
                self.run.restore(state)
            except (RuntimeError, ValueError, KeyError) as error:
                reason = " ".join(str(error).split("\n")[:2])
                raise InputError(
                    f"the checkpoint in {self.folder} does not fit this model ({reason}); resume with the "
                    "model it was made with."
                ) from error
        self._kept()
        if is_first():
            self.log = Log(self.folder / "log.jsonl", self.run.step)

    def _kept(self) -> None:
        at = f"step {self.run.step} in {self.folder}" if self.run.step else "none yet"
        self.run.kept = f"last good checkpoint: {at}"


def _autocast_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    if amp == "auto":
        if device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
