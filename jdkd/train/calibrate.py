"""Batch-norm statistics measured anew, for subnets and for networks whose weights were cut or inherited."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from jdkd.errors import InputError
from jdkd.nn import Subnet, set_subnet
from jdkd.nn.recomputation import Snapshot
from jdkd.train.inputs import images_of, normalised
from jdkd.train.modes import mode

UNSEEN = -1.0  # no variance: marks the channels that an elastic batch norm does not touch


@torch.no_grad()
def calibrate_bn(model: nn.Module, batches: Iterable[Any], subnets: Sequence[Subnet] | None = None) -> None:
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
        subnets: of a supernet whose elastic batch norms keep ``statistics="own"``: all are calibrated while the batches
            are read once, and the active subnet stays. Left out, what is active is calibrated.

    Raises:
        InputError: there is no batch, or no subnet, although there is something to calibrate; or several subnets
            share the statistics.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None]
    if not norms:
        return
    if subnets is None:
        _calibrate(model, batches, norms, [contextlib.nullcontext()])
        return
    if not subnets:
        raise InputError(
            "calibrate_bn was given 0 subnets and needs at least 1; leave subnets out to calibrate what is active."
        )
    sharing = [n for n, m in model.named_modules() if m in norms and not getattr(m, "has_own_statistics", False)]
    if sharing and len(subnets) > 1:
        raise InputError(
            f"calibrate_bn was given {len(subnets)} subnets, which share the statistics of {sharing[0]}; build it as "
            "ElasticBatchNorm2d(..., statistics='own'), or calibrate one subnet and use it before the next"
        )
    with Snapshot(model):
        kept = []
        for subnet in subnets:
            set_subnet(model, subnet)
            kept.append(Snapshot(model))
        _calibrate(model, batches, norms, kept)


def _calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    norms: list[nn.BatchNorm2d],
    subnets: Sequence[contextlib.AbstractContextManager],
) -> None:
    """Calibrates what is active inside each of ``subnets``; changes nothing on an error."""
    pools = []
    with contextlib.ExitStack() as before, mode(model, training=False):
        for subnet in subnets:
            with subnet:
                homes = {norm: getattr(norm, "active_statistics", norm) for norm in norms}
            pools.append({norm: _Pool(home) for norm, home in homes.items()})
            for home in homes.values():
                before.enter_context(_restored(home))
        for norm in norms:
            before.enter_context(_of_one_batch(norm))
        for batch in batches:
            for subnet, of_subnet in zip(subnets, pools, strict=True):
                with subnet, _hooked(of_subnet):
                    _forward(model, batch, norms)
    pooled = [pool for of_subnet in pools for pool in of_subnet.values()]
    if not any(pool.count for pool in pooled):
        raise InputError("calibrate_bn was given 0 batches and needs at least 1; give it some images.")
    for pool in pooled:
        pool.store()


@contextlib.contextmanager
def _restored(home: nn.Module) -> Iterator[None]:
    """Running statistics that say what they saw inside, and are what they were afterwards."""
    names = ("running_mean", "running_var", "num_batches_tracked")
    kept = [(getattr(home, name), getattr(home, name).clone()) for name in names]
    home.running_var.fill_(UNSEEN)
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)


@contextlib.contextmanager
def _of_one_batch(norm: nn.BatchNorm2d) -> Iterator[None]:
    """Lets the running statistics after a forward be those of its batch."""
    momentum, norm.momentum = norm.momentum, 1.0
    norm.train()
    try:
        yield
    finally:
        norm.momentum = momentum


@contextlib.contextmanager
def _hooked(pools: Mapping[nn.BatchNorm2d, _Pool]) -> Iterator[None]:
    """Every forward of a norm goes into its pool."""
    hooks = [norm.register_forward_hook(pool.take) for norm, pool in pools.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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
    """Count, mean and sum of squared deviations of all that one batch norm has seen, per channel.

    Args:
        home: holds the norm's running statistics.
    """

    home: nn.Module
    count: int = 0
    mean: Tensor | None = None  # [C] float64
    spread: Tensor | None = None  # [C] float64

    def take(self, norm: nn.BatchNorm2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Forward hook: merges the batch whose statistics the norm has just stored."""
        count = inputs[0].numel() // max(1, inputs[0].shape[1])  # [N, C, H, W]
        if not count:
            return
        mean = self.home.running_mean.to(torch.float64, copy=True)  # the next batch writes into the statistics
        spread = self.home.running_var.double() * (count - 1)  # the stored variance is the unbiased one
        if not self.count:
            self.count, self.mean, self.spread = count, mean, spread
            return
        total, shift = self.count + count, mean - self.mean
        self.mean = self.mean + shift * (count / total)
        self.spread = self.spread + spread + shift**2 * (self.count * count / total)
        self.count = total

    def store(self) -> None:
        """Makes the pool the running statistics; what saw nothing, norm or channel, keeps its own."""
        if self.count:
            home = self.home
            seen = self.spread >= 0  # [C]
            home.running_mean.copy_(torch.where(seen, self.mean, home.running_mean))
            home.running_var.copy_(torch.where(seen, self.spread / (self.count - 1), home.running_var))
