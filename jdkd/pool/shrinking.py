"""Integrated progressive shrinking: depth and width of the pool open together, phase by phase.

Joint-DetNAS (Yao et al., CVPR 2021) names the procedure; its phases, losses and schedule are not public.
What is here is our choice, after once-for-all (Cai et al., ICLR 2020): a largest network first, then subnets
sampled beside it in every step and distilled from it once frozen, channels sorted before each opening.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jdkd.data import batches
from jdkd.detect import load, save
from jdkd.detect.checkpoint import ARCHITECTURE
from jdkd.detect.weights import fingerprint
from jdkd.distill import Distiller, can_distil_heads
from jdkd.errors import InputError
from jdkd.files import read_as, write_json
from jdkd.notices import ProgressCallback, say_once
from jdkd.pool.phases import Phase, PoolTrainConfig
from jdkd.pool.supernet import Supernet
from jdkd.train import TrainConfig, calibrate_bn, checkpoint, fit
from jdkd.train.distributed import from_first
from jdkd.train.engine import Losses

CALIBRATION_BATCHES = 8
"""Batches over which the batch norms of a subnet are measured anew."""
PLAN = "plan.json"


def progressive_shrinking(
    supernet: Supernet,
    dataset: Any,
    config: PoolTrainConfig,
    folder: Path,
    *,
    device: torch.device | str,
    base: nn.Module | None = None,
    resume: bool = False,
    progress: ProgressCallback | None = None,
) -> None:
    """Trains a supernet through the phases of its training, in place.

    Args:
        supernet: as grown from the base.
        dataset: training images.
        config: phases and settings.
        folder: where the phases keep their checkpoints and the frozen largest network.
        device: where to train.
        base: what the supernet was grown from; a training that is resumed must be of the same.
        resume: carry on from what ``folder`` holds.
        progress: called with (what, done, total, losses) after every step.

    Raises:
        InputError: ``folder`` holds the training of another plan or base, one that was not to be resumed, or something
            else.
    """
    from_first(lambda: _require_same_plan(folder, supernet, config, resume, base))
    for number, phase in enumerate(config.phases):
        training = config.phase_config(number)
        named = progress and (lambda *state, name=phase.name: progress(f"pool: {name}", *state))
        how: dict[str, Any] = {
            "device": device,
            "folder": folder / f"{number + 1}-{phase.name}",
            "resume": resume,
            "progress": named,
        }
        if phase.passes == 1:
            fit(supernet.model, dataset, training, **how)
            continue
        teacher = _frozen_largest(supernet, dataset, training, folder / "largest", device)
        supernet.sort_channels()
        heads = can_distil_heads(supernet.model, teacher)
        if config.head_weight and not heads:
            say_once("the pool's subnets learn from features alone: no class logits are found that could be compared.")
        weights: dict[str, Any] = {"feature_weight": config.feature_weight, "head_weight": heads * config.head_weight}
        with Distiller(supernet.model, teacher, reuse=True, **weights) as distiller:
            losses = _losses(supernet, distiller, phase, training.seed)
            fit(supernet.model, dataset, training, losses=losses, **how)
        supernet.activate(supernet.space.largest)


def calibrate(model: nn.Module, dataset: Any, batch_size: int, seed: int, device: torch.device | str) -> nn.Module:
    """Recalibrates the batch norms of a subnet on a few training batches; returns it in evaluation mode."""
    calibrate_bn(
        model.to(device),
        batches(dataset, batch_size=batch_size, steps=CALIBRATION_BATCHES, seed=seed, device=device),
    )
    return model.eval()


def _frozen_largest(
    supernet: Supernet, dataset: Any, config: TrainConfig, folder: Path, device: torch.device | str
) -> nn.Module:
    """The largest network as it was before any subnet was trained; kept, so that a resumed run has the same."""

    def keep() -> None:
        if not (folder / ARCHITECTURE).exists():  # which is written last
            largest = supernet.extract(supernet.space.largest)
            save(folder, calibrate(largest, dataset, config.batch_size, config.seed, device))

    from_first(keep)
    return load(folder, device)


def _losses(supernet: Supernet, distiller: Distiller, phase: Phase, seed: int) -> Losses:
    """Every step trains the largest network and then subnets, which are also distilled (Yu et al., ECCV 2020)."""
    space = supernet.space.top_fraction(phase.top_fraction)

    def losses(images: list[Tensor], targets: list[dict[str, Tensor]], step: int) -> Iterator[dict[str, Tensor]]:
        drawn = torch.get_rng_state()
        supernet.activate(supernet.space.largest)
        distiller.runner.enabled = False
        yield supernet.model(images, targets)
        distiller.runner.enabled = True
        rng = random.Random(f"{seed}/{step}")
        for subnet in [space.smallest] * phase.sandwich + [space.sample(rng) for _ in range(phase.subnets)]:
            supernet.activate(subnet)
            torch.set_rng_state(drawn)  # images of the size that they had: what the teacher made of them holds
            yield supernet.model(images, targets) | distiller.losses()

    return losses


def _require_same_plan(
    folder: Path, supernet: Supernet, config: PoolTrainConfig, resume: bool, base: nn.Module | None
) -> None:
    """Keeps what the training is of, and refuses to carry on one of other phases, another space or another base.

    Raises:
        InputError: the folder holds the training of another plan, one that was not to be resumed, or something else.
    """
    plan = json.loads(json.dumps({"space": supernet.space.to_json(), **config.identity()}))
    plan["base"] = None if base is None else fingerprint(base)
    file = folder / PLAN
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if strangers := sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(".")):
            raise InputError(
                f"{folder} holds {strangers[0]} but no {PLAN}, and is removed when the pool is finished; move it away, "
                "or give another folder."
            )
        write_json(file, plan)
    elif not resume:
        raise InputError(f"{folder} holds the training of another pool ({PLAN}); resume it or give another folder.")
    else:

        def whole(before: dict[str, Any]) -> dict[str, Any]:
            """With what earlier versions did not write."""
            return {"base": plan["base"], "phase_order": [*before["phases"]], **before}

        before = read_as(whole, file, f"remove {folder} to start again")
        checkpoint.require_same("plan", before, plan)
