"""Batch-norm statistics measured anew, for subnets and for networks whose weights were cut or inherited."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jdkd.errors import InputError
from jdkd.train.inputs import images_of, normalised
from jdkd.train.modes import mode

UNSEEN = -1.0  # no variance: marks the channels that an elastic batch norm does not touch


@torch.no_grad()
def calibrate_bn(model: nn.Module, batches: Iterable[Any]) -> None:
    """Sets the running statistics of every batch norm to those of its input over all batches together.

    The mean and the variance are exact for the pooled batches: batch means and variances are merged by the
    parallel formula of Chan, Golub and LeVeque (1983) in float64, so the spread between the batches' means
    counts. The average of the batches' variances, which once-for-all's published code and ``momentum=None``
    give, leaves it out.

    One pass serves all layers, as is usual: while it runs, each layer normalises with the statistics of the
    batch at hand, so what a deep layer sees is what it saw in training, not what the new running statistics
    of the layers before it would give. Frozen batch norms and those without running statistics are left
    alone; an elastic batch norm is calibrated in the channels that are active. The result depends on model
    and batches alone.

    Args:
        model: a detector, of which only the backbone runs unless there are batch norms elsewhere (these see
            the regions proposed at inference); or any module, which is called with each batch's images. Modes
            and weights stay as they are.
        batches: ``(images, targets)``, lists of images ``[3, H, W]`` in 0..1, or tensors ``[N, 3, H, W]``.

    Raises:
        InputError: there is no batch, although there is something to calibrate.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None]
    if not norms:
        return
    pools = {norm: _Pool() for norm in norms}
    kept = [
        (n, n.momentum, n.running_mean.clone(), n.running_var.clone(), n.num_batches_tracked.clone()) for n in norms
    ]
    hooks = [norm.register_forward_hook(pools[norm].take) for norm in norms]
    with mode(model, training=False):
        try:
            for norm in norms:
                norm.train()
                norm.momentum = 1.0  # the running statistics after a forward are then those of its batch
                norm.running_var.fill_(UNSEEN)
            for batch in batches:
                _forward(model, batch, norms)
        finally:
            for hook in hooks:
                hook.remove()
            for norm, momentum, mean, variance, tracked in kept:
                norm.momentum = momentum
                norm.running_mean.copy_(mean)
                norm.running_var.copy_(variance)
                norm.num_batches_tracked.copy_(tracked)
    if not any(pool.count for pool in pools.values()):
        raise InputError("calibrate_bn was given 0 batches and needs at least 1; give it some images.")
    for norm, pool in pools.items():
        pool.store(norm)


def _forward(model: nn.Module, batch: Any, norms: list[nn.BatchNorm2d]) -> None:
    backbone = getattr(model, "backbone", None)
    if backbone is None:
        model(normalised(model, batch))
    elif set(norms) <= set(backbone.modules()):
        backbone(normalised(model, batch))
    else:
        device = next(model.parameters()).device
        model([image.to(device) for image in images_of(batch)])


@dataclass
class _Pool:
    """Count, mean and sum of squared deviations of all that one batch norm has seen, per channel."""

    count: int = 0
    mean: Tensor | None = None  # [C] float64
    spread: Tensor | None = None  # [C] float64

    def take(self, norm: nn.BatchNorm2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Forward hook: merges the batch whose statistics the norm has just stored."""
        count = inputs[0].numel() // max(1, inputs[0].shape[1])  # [N, C, H, W]
        if not count:
            return
        mean = norm.running_mean.double()
        spread = norm.running_var.double() * (count - 1)  # the stored variance is the unbiased one
        if not self.count:
            self.count, self.mean, self.spread = count, mean, spread
            return
        total, shift = self.count + count, mean - self.mean
        self.mean = self.mean + shift * (count / total)
        self.spread = self.spread + spread + shift**2 * (self.count * count / total)
        self.count = total

    def store(self, norm: nn.BatchNorm2d) -> None:
        """Makes the pool the norm's running statistics; what saw nothing, norm or channel, keeps its own."""
        if self.count:
            seen = self.spread >= 0  # [C]
            norm.running_mean.copy_(torch.where(seen, self.mean, norm.running_mean))
            norm.running_var.copy_(torch.where(seen, self.spread / (self.count - 1), norm.running_var))
