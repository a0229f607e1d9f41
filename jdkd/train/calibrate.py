"""Batch-norm statistics measured anew, for subnets and for networks whose weights were cut or inherited."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from jdkd.detect.contract import not_scripted
from jdkd.errors import InputError, ModelError, require_batches
from jdkd.nn import Subnet, set_subnet
from jdkd.nn.modes import mode
from jdkd.nn.necks import run_until, trunk_of
from jdkd.nn.recomputation import SubnetState
from jdkd.nn.unwrapping import unwrapped
from jdkd.train.inputs import images_of, images_on, stacked

UNSEEN = -1.0  # no variance: marks the channels that an elastic batch norm does not touch


class _Statistics(Protocol):
    """What holds the running statistics of a batch norm that keeps some."""

    running_mean: Tensor  # [C]
    running_var: Tensor  # [C]
    num_batches_tracked: Tensor


@torch.no_grad()
def calibrate_bn(model: nn.Module, batches: Iterable[Any], subnets: Sequence[Subnet] | None = None) -> None:
    """Sets the running statistics of every batch norm to those of its input over all batches together.

    The mean and the variance are exact for the pooled batches: batch means and variances are merged by the
    parallel formula of Chan, Golub and LeVeque (1983) in float64, so the spread between the batches' means
    counts. The average of the batches' variances, which once-for-all's published code and ``momentum=None``
    give, leaves it out.

    One pass serves all layers, as is usual: while it runs, each layer normalises with the statistics of the
    batch at hand, so what a deep layer sees is what it saw in training, not what the new running statistics
    of the layers before it would give. Batch norms may be of 1 to 3 dimensions. Frozen batch norms and those without
    running statistics are left alone; an elastic batch norm is calibrated in the channels that are active. The result
    depends on model and batches alone: inside a process group, too, synchronised norms normalise with what this
    process is given, so that one process may calibrate while the others wait for what it makes.

    Args:
        model: a detector, which runs up to its neck unless there are batch norms elsewhere (these see the regions
            proposed at inference); or any module, which is called with each batch's images. Modes and weights stay as
            they are.
        batches: ``(images, targets)``, lists of images ``[3, H, W]`` in 0..1, or tensors ``[N, 3, H, W]``.
        subnets: of a supernet whose elastic batch norms keep ``statistics="own"``: all are calibrated while the batches
            are read once, and the active subnet stays. Left out, what is active is calibrated.

    Raises:
        InputError: there is no batch, or no subnet, although there is something to calibrate; or several subnets
            share the statistics; or a part of the model is scripted; or a layer has no shape yet or gets 1 value a
            channel. Names the layer.
    """
    not_scripted(model, "calibrate_bn")
    model = unwrapped(model)
    norms = {
        module: f"calibrate_bn: {path or 'the model'}, a {type(module).__name__},"
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    if not norms:
        return
    for norm, where in norms.items():
        if norm.running_mean is not None and is_lazy(norm.running_mean):
            raise InputError(f"{where} has no shape yet; run the model once before")
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
            "ElasticBatchNorm2d(..., statistics='own', subnets=[...]), or calibrate one and use it before the next"
        )
    with SubnetState(model):
        kept = []
        for subnet in subnets:
            set_subnet(model, subnet)
            kept.append(SubnetState(model))
        _calibrate(model, batches, norms, kept)


def _calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    norms: Mapping[_BatchNorm, str],
    subnets: Sequence[contextlib.AbstractContextManager],
) -> None:
    """Calibrates what is active inside each of ``subnets``; changes nothing on an error."""
    pools = []
    with contextlib.ExitStack() as before, mode(model, training=False):
        for subnet in subnets:
            with subnet:
                homes = {norm: cast(_Statistics, getattr(norm, "active_statistics", norm)) for norm in norms}
            pools.append({norm: _Pool(home, norms[norm]) for norm, home in homes.items()})
            for home in homes.values():
                before.enter_context(_restored(home))
        for norm in norms:
            before.enter_context(_of_one_batch(norm))
        for batch in batches:
            for subnet, of_subnet in zip(subnets, pools, strict=True):
                with subnet, _hooked(of_subnet):
                    _forward(model, batch, norms)
    pooled = [pool for of_subnet in pools for pool in of_subnet.values()]
    require_batches(any(pool.count for pool in pooled), "calibrate_bn")
    for pool in pooled:
        pool.store()


@contextlib.contextmanager
def _restored(home: _Statistics) -> Iterator[None]:
    """Running statistics that say what they saw inside, and are what they were afterwards."""
    names = ("running_mean", "running_var", "num_batches_tracked")
    kept = [(getattr(home, name), getattr(home, name).clone()) for name in names]
    home.running_mean.zero_()  # a momentum of 1 leaves 0 of what was there, and of NaN or infinity that is NaN
    home.running_var.fill_(UNSEEN)
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)


@contextlib.contextmanager
def _of_one_batch(norm: _BatchNorm) -> Iterator[None]:
    """Lets the running statistics after a forward be those of its batch, in this process."""
    momentum, norm.momentum = norm.momentum, 1.0
    norm.train()
    if isinstance(norm, nn.SyncBatchNorm):
        vars(norm)["forward"] = partial(_BatchNorm.forward, norm)  # asks no other process
    try:
        yield
    finally:
        norm.momentum = momentum
        vars(norm).pop("forward", None)


@contextlib.contextmanager
def _hooked(pools: Mapping[_BatchNorm, _Pool]) -> Iterator[None]:
    """Every forward of a norm goes into its pool."""
    hooks = [norm.register_forward_pre_hook(pool.check) for norm, pool in pools.items()]
    hooks += [norm.register_forward_hook(pool.take) for norm, pool in pools.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _count(x: Tensor) -> int:
    """Values a channel of ``[N, C, ...]``."""
    return x.numel() // max(1, x.shape[1])


def _forward(model: nn.Module, batch: Any, norms: Collection[_BatchNorm]) -> None:
    """Runs a detector up to its neck if all norms are there; any other model takes a batch as one tensor."""
    trunk, images = trunk_of(model), images_on(model, batch)
    is_trunk = bool(trunk) and set(norms) <= {module for part in trunk for module in part.modules()}

    def run(given: Any) -> None:
        run_until(trunk[-1], lambda: model(given)) if is_trunk else model(given)

    if not trunk and isinstance(images_of(batch), Tensor):
        run(stacked(model, images))
        return
    try:
        run(images)
    except (TypeError, AttributeError):  # a list is nothing to it
        run(stacked(model, images))


@dataclass
class _Pool:
    """Count, mean and sum of squared deviations of all that one batch norm has seen, per channel.

    Args:
        home: holds the norm's running statistics.
        where: how errors name the norm.
    """

    home: _Statistics
    where: str
    count: int = 0
    mean: Tensor | None = None  # [C] float64
    spread: Tensor | None = None  # [C] float64

    def check(self, norm: _BatchNorm, inputs: tuple[Tensor, ...]) -> None:
        """Forward pre-hook: refuses a batch that has no variance."""
        if norm.training and _count(inputs[0]) == 1:
            raise ModelError(
                f"{self.where} was given {tuple(inputs[0].shape)}, 1 value a channel, which has no "
                "variance; give batches of more images"
            )

    def take(self, norm: _BatchNorm, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Forward hook: merges the batch whose statistics the norm has just stored."""
        count = _count(inputs[0])
        if not count:
            return
        mean = self.home.running_mean.to(torch.float64, copy=True)  # the next batch writes into the statistics
        spread = self.home.running_var.double() * (count - 1)  # the stored variance is the unbiased one
        if self.mean is None or self.spread is None:
            self.count, self.mean, self.spread = count, mean, spread
            return
        total, shift = self.count + count, mean - self.mean
        self.mean = self.mean + shift * (count / total)
        self.spread = self.spread + spread + shift**2 * (self.count * count / total)
        self.count = total

    def store(self) -> None:
        """Makes the pool the running statistics; what saw nothing, norm or channel, keeps its own."""
        if self.mean is not None and self.spread is not None:
            home = self.home
            seen = self.spread >= 0  # [C]
            home.running_mean.copy_(torch.where(seen, self.mean, home.running_mean))
            home.running_var.copy_(torch.where(seen, self.spread / (self.count - 1), home.running_var))
