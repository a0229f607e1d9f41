"""Integrated progressive shrinking: depth and width of the pool open together, phase by phase.

Joint-DetNAS (Yao et al., CVPR 2021) names the procedure; its phases, losses and schedule are not public.
What is here is our choice, after once-for-all (Cai et al., ICLR 2020): a largest network first, then subnets
sampled beside it in every step and distilled from it once frozen, channels sorted before each opening.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jdkd.data import batches
from jdkd.detect import load, save
from jdkd.detect.checkpoint import WEIGHTS
from jdkd.distill import Distiller, can_distil_heads
from jdkd.notices import say_once
from jdkd.pool.supernet import Supernet
from jdkd.train import TrainConfig, calibrate_bn, fit
from jdkd.train.engine import Losses

ProgressCallback = Callable[[str, int, int, dict[str, float]], None]  # what, done, total, losses
CALIBRATION_BATCHES = 8


@dataclass(frozen=True)
class Phase:
    """One phase of the shrinking.

    Args:
        name: what the log calls it.
        share: of the pool's forward-backward passes.
        top_fraction: upper share of every range that subnets are drawn from (0: the largest network alone).
        subnets: drawn per step, besides the largest network.
        lr: peak learning rate, relative to the pool's.
    """

    name: str
    share: float
    top_fraction: float
    subnets: int
    lr: float


PHASES = (
    Phase("largest", share=0.70, top_fraction=0.0, subnets=0, lr=1.0),
    Phase("middle", share=0.15, top_fraction=0.5, subnets=1, lr=0.4),
    Phase("full", share=0.15, top_fraction=1.0, subnets=1, lr=0.4),
)


@dataclass(frozen=True)
class PoolTrainConfig:
    """How a pool is trained.

    Args:
        train: settings of the phases; ``steps`` counts the forward-backward passes of all phases together (a
            step of a phase takes one for the largest network and one for each subnet), ``lr`` is scaled by phase.
        phases: in order.
        feature_weight, head_weight: of distilling the sampled subnets from the frozen largest network.
    """

    train: TrainConfig
    phases: tuple[Phase, ...] = PHASES
    feature_weight: float = 6.0
    head_weight: float = 1.0

    def phase_config(self, number: int) -> TrainConfig:
        """Settings of phase ``number`` (from 0)."""
        phase = self.phases[number]
        steps = max(1, round(phase.share * self.train.steps / (1 + phase.subnets)))
        fields = {"steps": steps, "lr": phase.lr * self.train.lr}
        return replace(self.train, **fields, seed=self.train.seed + 1 + number)


def progressive_shrinking(
    supernet: Supernet,
    dataset: Any,
    config: PoolTrainConfig,
    folder: Path,
    *,
    device: torch.device | str,
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
        resume: carry on from what ``folder`` holds.
        progress: called with (what, done, total, losses) after every step.
    """
    for number, phase in enumerate(config.phases):
        training = config.phase_config(number)
        named = progress and (lambda *state, name=phase.name: progress(f"pool: {name}", *state))
        how = {
            "device": device,
            "folder": folder / f"{number + 1}-{phase.name}",
            "resume": resume,
            "progress": named,
        }
        if not phase.subnets:
            fit(supernet.model, dataset, training, **how)
            continue
        teacher = _frozen_largest(supernet, dataset, training, folder / "largest", device)
        supernet.sort_channels()
        heads = can_distil_heads(supernet.model, teacher)
        if config.head_weight and not heads:
            say_once("the pool's subnets learn from features alone: no class logits are found that could be compared.")
        weights = {"feature_weight": config.feature_weight, "head_weight": heads * config.head_weight}
        with Distiller(supernet.model, teacher, reuse=True, **weights) as distiller:
            losses = _sandwich(supernet, distiller, phase, training.seed)
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
    if not (folder / WEIGHTS).exists():
        largest = supernet.extract(supernet.space.largest)
        save(folder, calibrate(largest, dataset, config.batch_size, config.seed, device))
    return load(folder, device)


def _sandwich(supernet: Supernet, distiller: Distiller, phase: Phase, seed: int) -> Losses:
    """Every step trains the largest network and then subnets, which are also distilled (Yu et al., ECCV 2020)."""
    space = supernet.space.top_fraction(phase.top_fraction)

    def losses(images: list[Tensor], targets: list[dict[str, Tensor]], step: int) -> Iterator[dict[str, Tensor]]:
        supernet.activate(supernet.space.largest)
        distiller.runner.enabled = False
        yield supernet.model(images, targets)
        distiller.runner.enabled = True
        rng = random.Random(f"{seed}/{step}")
        for _ in range(phase.subnets):
            supernet.activate(space.sample(rng))
            yield supernet.model(images, targets) | distiller.losses()

    return losses
