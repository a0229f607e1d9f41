"""From a base detector to a finished pool."""

import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jdkd.detect import read
from jdkd.detect.architecture import architecture_of
from jdkd.errors import InputError
from jdkd.graph import Topology
from jdkd.nn.unwrapping import unwrapped
from jdkd.notices import ProgressCallback, say_once
from jdkd.pool.elastic_pool import POOL, TeacherPool, load_pool, save_pool
from jdkd.pool.phases import PoolTrainConfig
from jdkd.pool.shrinking import CALIBRATION_BATCHES, PLAN, progressive_shrinking
from jdkd.pool.space import Space, Subnet
from jdkd.pool.supernet import Supernet, grow_base
from jdkd.train.distributed import is_first

SCORED = 20  # subnets, where scoring them takes no more than
SCORING_SHARE = 0.2  # of the time that training takes
# In forwards of an image in training: what a pass with its gradient takes, and what a scored image takes with all that
# comes after the heads. On a CPU at 96 pixels, 160 passes of 4 images took 12.9 s, a score on 60 images 1.02 s.
TRAINED, EVALUATED = 3, 2


def train_pool(
    base: nn.Module,
    dataset: Any,
    selection: Any,
    config: PoolTrainConfig,
    folder: Path | str,
    *,
    space: Space | None = None,
    topology: Topology | None = None,
    foreign: Mapping[str, nn.Module] | None = None,
    scored: int | None = None,
    device: torch.device | str = "cpu",
    resume: bool = False,
    progress: ProgressCallback | None = None,
) -> TeacherPool:
    """Grows a pool from a base detector and trains it by integrated progressive shrinking.

    Args:
        base: the detector that the students descend from.
        dataset: training images.
        selection: images that scores are taken on; none of them is trained on, nor was the base.
        config: phases and settings.
        folder: where the pool is kept; once finished it holds the largest network, a checkpoint as every detector's,
            and ``pool.json``.
        space: depths and widths; by default :meth:`Space.from_base`.
        topology: of the base, verified; read off it if left out.
        foreign: detectors of another make by name, which become members; see :meth:`TeacherPool.add_foreign`.
        scored: subnets to score afterwards, the largest and the smallest among them, so that the spread is known; by
            default as many as :func:`affordable` says.
        device: where to train.
        resume: carry on from what ``folder`` holds; a finished pool is only read.
        progress: called with (what, done, total, losses) after every step.

    Returns:
        The pool, in memory as on disk. Among several processes (:mod:`jdkd.train.distributed`) all share the images
        that are trained and scored on, and the first writes.

    Raises:
        InputError: the base does not carry its architecture, a foreign teacher cannot teach, ``folder`` holds another
            pool, also one that is grown from another base and was not finished, or it cannot be written.
    """
    folder = Path(folder)
    architecture_of(base, "a teacher pool")
    topology = topology if topology is not None else read(base, check=True)
    working = folder / "training"
    if (folder / POOL).exists():
        if resume:
            if is_first() and (working / PLAN).is_file():  # of a run that was killed while it removed it
                shutil.rmtree(working)
            return load_pool(folder, base, dataset, topology=topology, device=device)
        raise InputError(f"{folder} holds a finished pool ({POOL}); resume it or give another folder.")
    if not topology.followed:
        raise InputError(
            "a teacher pool takes a base with feature maps [N, C, H, W] by which teachers teach, and no module of this "
            f"{type(unwrapped(base)).__name__} is known to return some; name it with jdkd.detect.adopt(..., pyramid=)."
        )
    space = space or Space.from_base(topology)
    supernet = Supernet(space, *grow_base(base, topology, space))
    pool = TeacherPool(supernet, dataset, config.train.batch_size, config.train.seed, device, steps=config.passes)
    pool.trained_on = dataset.fingerprint
    for name, detector in (foreign or {}).items():
        pool.add_foreign(name, detector)
    _say_what_is_rigid(supernet)
    how: dict[str, Any] = {"device": device, "base": base, "resume": resume, "progress": progress}
    progressive_shrinking(supernet, dataset, config, working, **how)
    scored = affordable(config, len(selection)) if scored is None else scored
    pool.score_members([*spread_over(space, scored, config.train.seed), *pool.foreign], selection, progress)
    if is_first():
        save_pool(folder, pool)
        shutil.rmtree(working)
    return pool


def affordable(config: PoolTrainConfig, images: int) -> int:
    """How many subnets are scored where nothing is said: ``SCORED``, or as many as a share of the training pays.

    The work of both is known before, so that a pool is the same on every machine.

    Args:
        config: of the training.
        images: that a score is taken on.
    """
    batch = config.train.batch_size
    trained = TRAINED * config.train.steps * batch
    each = EVALUATED * images + CALIBRATION_BATCHES * batch
    return max(2, min(SCORED, int(SCORING_SHARE * trained / each)))


def spread_over(space: Space, count: int, seed: int) -> list[Subnet]:
    """So many distinct subnets, if there are: the largest, the smallest, and others at random."""
    rng = random.Random(seed)
    found = dict.fromkeys([space.largest, space.smallest])
    for _ in range(50 * count):  # a small space has no more to give
        if len(found) >= count:
            break
        found[space.sample(rng)] = None
    return list(found)[:count]


def _say_what_is_rigid(supernet: Supernet) -> None:
    """Tells, once, what of a detector all teachers of its pool have in common though others need not."""
    if not any(stage.groups for stage in supernet.stages) and supernet.space.largest == supernet.space.smallest:
        say_once("the teacher pool holds one teacher: no channel group inside of this detector passes a norm or stays "
                 "in a residual block, and no list of blocks can grow")  # fmt: skip
    if supernet.left_out:
        name, reason = next(iter(supernet.left_out.items()))
        rest = f" and {len(supernet.left_out) - 1} more" * (len(supernet.left_out) > 1)
        say_once(f"all teachers of the pool have one width in {name}{rest}: {reason}")
