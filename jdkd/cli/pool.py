"""`jdkd pool train`, `jdkd pool eval` and `jdkd pool export`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jdkd.cli.failures import keeping
from jdkd.cli.flags import DataFlags, TrainingFlags, record_of, recorded_split, resolve_device
from jdkd.cli.progress import Progress
from jdkd.errors import InputError
from jdkd.files import claim_folder, content_hash, require_file, write_json, write_whole
from jdkd.notices import say_once
from jdkd.run_folder import RunFolder

if TYPE_CHECKING:
    from torch import nn

    from jdkd.data import CocoDetectionDataset
    from jdkd.pool import PoolTrainConfig, TeacherPool

KIND = "pool train"  # of the run
SPREAD = "spread.json"
PLOT = "spread.png"
BEGINS = '{\n  "teachers"'  # as `SPREAD` does


@dataclass(frozen=True)
class PoolTrain:
    """Grow a teacher pool from a base detector and train it; `jdkd search --teacher-pool` takes the folder.

    Several processes: torchrun --nproc-per-node N -m jdkd pool train ...; --batch-size is of each.
    """

    base: Path
    """Folder of the base detector, written by train or import."""
    out: Path
    """Folder for the pool: the largest network as a detector, pool.json."""
    source: DataFlags = field(default_factory=DataFlags)
    teacher: tuple[Path, ...] = ()
    """Folders of detectors of any family for the same classes, which teach beside the subnets, by the folder's name."""
    steps: int = 1000
    """Forward-backward passes of all phases together."""
    phases: Path | None = None
    """JSON file of the phases: a list of {name, share, top_fraction, subnets, lr, sandwich} [largest, middle, full]."""
    extra_depth: int = 1
    """Blocks that the largest network has more than the base in every stage that can grow."""
    width: float = 1.5
    """Inner channels of the largest network over those of the base."""
    widths: int = 3
    """How many widths there are, from the base's to the largest."""
    subnets: int | None = None
    """Subnets to score afterwards [20, or what a fifth of the training's time is enough for]."""
    batch_size: int = 8
    """Images per step, of each process."""
    lr: float = 2e-3
    """Peak learning rate; phases scale it."""
    train_sizes: tuple[int, ...] = ()
    """Short sides in pixels, one of which each image is resized to while training [as of the base]."""
    feature_weight: float = 6.0
    """Weight of PKD from the frozen largest network to the subnets."""
    head_weight: float = 1.0
    """Weight of the loss on its class logits."""
    training: TrainingFlags = field(default_factory=TrainingFlags)

    def __call__(self) -> None:
        with self.training.processes() as device:
            self._run(device)

    def _run(self, device: str) -> None:
        from jdkd.data.copies import say_if_trained_on
        from jdkd.detect import load, read
        from jdkd.detect.input_size import require_resizing, require_visible
        from jdkd.pool import Space, train_pool
        from jdkd.pool.foreign import require_name
        from jdkd.train.distributed import first_goes_ahead, from_first, is_first
        from jdkd.train.inputs import data_for

        run = RunFolder(self.out)
        from_first(lambda: run.require(KIND, resume=self.training.resume))
        self._config(None)  # refused before data are read
        if self.subnets is not None and self.subnets < 1:
            raise InputError(f"--subnets is {self.subnets}; score at least 1.")
        splits, base, foreign = self.source.splits(), load(self.base, device), {}
        for folder in self.teacher:
            require_name(name := folder.resolve().name, foreign)
            foreign[name] = load(folder, device)
        with Progress() as progress:
            with first_goes_ahead():
                images, val = (_opened(split, base, f"the base in {self.base}", progress) for split in splits)
            from_first(lambda: say_if_trained_on(val, images))
            require_visible(base, images.sizes)
            for scored in (base, *foreign.values()):
                require_visible(scored, val.sizes)
            config = self._config(images)
            require_resizing(base, config.train.sizes)
            train = data_for(base, images, batch_size=self.batch_size, seed=self.training.seed, device=device)
            identity = self._identity(config, train, val)
            from_first(lambda: run.require(KIND, identity, resume=self.training.resume))
            with keeping(run, lambda: self.training.kept(self.out)):
                topology = read(base, check=True)
                space = Space.from_base(topology, self.extra_depth, self.width, self.widths)
                identity["space"] = space.to_json()
                record = record_of(splits, device)
                resumed = from_first(lambda: run.begin(KIND, identity, resume=self.training.resume, **record))
                pool = train_pool(
                    base, train, val, config, self.out, space=space, topology=topology, foreign=foreign,
                    scored=self.subnets, device=device, resume=resumed, progress=progress,
                )  # fmt: skip
                if is_first():
                    run.finish()
        _print(self.out, pool)

    def _config(self, train: CocoDetectionDataset | None) -> PoolTrainConfig:
        from jdkd.pool import PHASES, PoolTrainConfig, read_phases
        from jdkd.train.record import trained_at

        phases = PHASES if self.phases is None else read_phases(self.phases)
        training = self.training.config(train, **vars(self), sizes=self.train_sizes or trained_at(self.base) or None)
        config = PoolTrainConfig(training, phases, self.feature_weight, self.head_weight)
        if self.steps < (least := sum(phase.passes for phase in config.phases)):
            raise InputError(f"--steps is {self.steps}; give at least {least}, a step of every phase.")
        return config

    def _identity(
        self, config: PoolTrainConfig, train: CocoDetectionDataset, val: CocoDetectionDataset
    ) -> dict[str, Any]:
        """What a resumed training must have in common with the first one, besides the space of the subnets."""
        from jdkd.detect.checkpoint import ARCHITECTURE, WEIGHTS

        return {
            "base": content_hash(self.base / ARCHITECTURE, self.base / WEIGHTS),
            "teachers": {folder.resolve().name: content_hash(folder / WEIGHTS) for folder in self.teacher},
            "data": {"train": train.fingerprint, "val": val.fingerprint},
            **config.identity(),
            "training": config.train.identity(),
            "subnets": self.subnets,
        }


@dataclass(frozen=True)
class PoolEval:
    """Score and time subnets of a pool: a table, the same as JSON, and a plot of mAP over latency."""

    pool: Path
    """Folder of a finished pool, written by pool train or by a search (OUT/pool)."""
    source: DataFlags = field(default_factory=DataFlags)
    out: Path | None = None
    """Folder for spread.json and spread.png [that of the pool]."""
    subnets: int = 20
    """Subnets to measure, the largest and the smallest among them; foreign teachers come on top."""
    split: Literal["val", "train"] = "val"
    """Which images to score and time on."""
    count: int = 16
    """Images to time on, at most."""
    rounds: int = 20
    """Rounds of timing at least; each runs every teacher twice."""
    seed: int = 0
    """Which subnets are drawn."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __call__(self) -> None:
        from rich.console import Console

        from jdkd.pool import measure_spread
        from jdkd.pool.growing import spread_over
        from jdkd.report.spread import spread_plot, spread_table

        device = resolve_device(self.device)
        for name in ("subnets", "count", "rounds"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} is {getattr(self, name)}; give at least 1.")
        out = self.out or self.pool
        _require_own(out)
        with Progress() as progress:
            pool = _loaded(self.pool, self.source, device, progress)
            data = pool.dataset
            if self.split != "train":
                split = _split(self.pool, self.source, "val")
                data = _opened(split, pool.supernet.model, f"the pool in {self.pool}", progress)
            claim_folder(out, "--out")
            teachers = [*spread_over(pool.space, self.subnets, self.seed), *pool.foreign]
            images = [data[index][0] for index in range(min(self.count, len(data)))]
            spread = measure_spread(pool, teachers, data, images, progress=progress, rounds=self.rounds)
        facts = {"images": len(data), "split": self.split, "fingerprint": data.fingerprint}
        write_json(out / SPREAD, {**spread.to_json(), **facts})
        title = f"{len(spread.rows)} teachers of {self.pool.resolve().name}, {len(data):,} {self.split} images"
        write_whole(out / PLOT, spread_plot(spread.rows, title))
        Console().print(spread_table(spread.rows))
        for name in (SPREAD, PLOT):
            print(out / name)


@dataclass(frozen=True)
class PoolExport:
    """Make a subnet of a pool a detector of its own, with batch norms recalibrated: eval, latency, search open it."""

    pool: Path
    """Folder of a finished pool, written by pool train or by a search (OUT/pool)."""
    subnet: str = "best"
    """largest, smallest, best (of the scored), blocks x width a stage such as '3x1 2x0.67', or a foreign teacher."""
    out: Path | None = None
    """Folder for architecture.json and weights.safetensors; must be given."""
    source: DataFlags = field(default_factory=DataFlags)
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __call__(self) -> None:
        from jdkd.detect import parameter_count, save
        from jdkd.detect.checkpoint import ARCHITECTURE, WEIGHTS

        if self.out is None:
            raise InputError("--out is missing; give a folder for the detector.")
        if held := [name for name in (ARCHITECTURE, WEIGHTS) if (self.out / name).exists()]:
            raise InputError(f"--out {self.out} already holds {held[0]}; give another folder.")
        device = resolve_device(self.device)
        with Progress() as progress:
            pool = _loaded(self.pool, self.source, device, progress)
        teacher = pool.named(self.subnet)
        detector = pool.teacher(teacher)
        claim_folder(self.out, "--out")
        save(self.out, detector)
        print(f"{teacher}: {parameter_count(detector) / 1e6:.2f} M parameters, {detector.architecture.id}")
        for name in (ARCHITECTURE, WEIGHTS):
            print(self.out / name)


def _require_own(out: Path) -> None:
    """Refuses a folder with files of the names of ours that no `jdkd pool eval` wrote.

    Raises:
        InputError: names the file.
    """
    if out.is_dir():
        require_file(out / SPREAD, "--out", begins=BEGINS)
        if (out / PLOT).exists() and not (out / SPREAD).is_file():
            raise InputError(f"--out {out} would write over {PLOT}; give another folder.")


def _split(pool: Path, source: DataFlags, name: str) -> Any:
    """The split that the flags name, or else the one that the pool's run recorded.

    Raises:
        InputError: neither is there.
    """
    found = source.split(name) if source.names(name) else recorded_split(pool, name, source.strict)
    if found is None:
        raise InputError(f"{pool} does not say where its {name} data are, or they are gone; give --data.")
    return found


def _loaded(folder: Path, source: DataFlags, device: str, progress: Progress) -> TeacherPool:
    """A finished pool, with the training images that recalibrate its subnets.

    Raises:
        InputError: there is no pool, or no such images.
    """
    from jdkd.data import CocoDetectionDataset
    from jdkd.detect.architecture import require_classes
    from jdkd.pool import load_pool
    from jdkd.pool.elastic_pool import POOL

    if not (folder / POOL).is_file():
        load_pool(folder, None, None)  # says what is wrong with it
    train = CocoDetectionDataset(_split(folder, source, "train"), progress.task("check train images"))
    pool = load_pool(folder, None, train, device=device)
    require_classes(pool.supernet.model, f"the pool in {folder}", train.classes, train.split.annotations)
    if pool.trained_on is not None and not train.known_as(pool.trained_on):
        say_once(
            f"{folder} was trained on other images than {train.split.annotations}, which its norms are measured on"
        )
    return pool


def _opened(split: Any, model: nn.Module, who: str, progress: Progress) -> CocoDetectionDataset:
    """The images of a split, of the classes of a detector.

    Raises:
        InputError: they are of others.
    """
    from jdkd.data import CocoDetectionDataset
    from jdkd.detect.architecture import require_classes

    data = CocoDetectionDataset(split, progress.task(f"check {split.name} images"))
    require_classes(model, who, data.classes, split.annotations)
    return data


def _print(out: Path, pool: TeacherPool) -> None:
    """The members that were scored, best first, and where the pool is."""
    for member in pool.members:
        print(f"mAP {member.map:.3f}  {member.parameters / 1e6:8.2f} M parameters  {member.teacher}")
    print(out)
