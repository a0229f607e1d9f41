"""From a config to an optimizer; the penalty of network slimming."""

import torch
from torch import Tensor, nn

from jdkd.train.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW or SGD over what is trainable; one-dimensional parameters (norms, biases) are not decayed."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, fused=True)
    return torch.optim.AdamW(groups, lr=config.lr, fused=True)


def slimmable_scales(model: nn.Module) -> list[Tensor]:
    """The trainable scales (gamma, ``[C]``) of all batch norms."""
    return [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.BatchNorm2d) and module.weight is not None and module.weight.requires_grad
    ]


@torch.no_grad()
def add_l1_subgradient(scales: list[Tensor], strength: float) -> None:
    """Adds ``strength * sign(gamma)`` to the gradients (Liu et al., ICCV 2017, section 3).

    Scales that took no part in this step, such as those of blocks that a subnet skips, are left alone.
    """
    active = [scale for scale in scales if scale.grad is not None]
    if active and strength:
        torch._foreach_add_([scale.grad for scale in active], torch._foreach_sign(active), alpha=strength)
