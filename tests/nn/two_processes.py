"""Two processes that train a supernet under DistributedDataParallel, and what is wrong in each.

These are parameters whose gradients are not those of one process that saw both batches, by how weights are packed; and
own statistics that are not those of the first process. Depth changes from step to step, hence
``find_unused_parameters``.
"""

import contextlib
import functools

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from jdkd.experimental import pack_forwards
from jdkd.nn import ElasticBatchNorm2d, set_subnet
from tests.experimental.packing_cases import SUBNETS, small
from tests.nn.elastic_models import supernet

NAMES = ("listed", "depth", "kernel sizes")


def batch(rank: int) -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(rank))


def alone(name: str) -> dict[str, Tensor]:
    net = small(name)
    for rank in range(2):
        (net(batch(rank)).square().sum() / 2).backward()
    return {path: gradient_of(parameter) for path, parameter in net.named_parameters()}


def gradient_of(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def wrong(rank: int, mode: str | None, own_gradients: bool = False, by_hand: bool = False) -> list[str]:
    net = supernet()
    weights = {path: parameter for path, parameter in net.named_parameters() if parameter.dim() > 1}
    wrapped = DistributedDataParallel(net, find_unused_parameters=True, gradient_as_bucket_view=by_hand)
    found = set()
    with pack_forwards(net, grad_mode=mode) if mode else contextlib.nullcontext():
        for name in NAMES:
            set_subnet(wrapped, SUBNETS[name])
            net.zero_grad()
            for weight in weights.values() if own_gradients else ():
                weight.main_grad = torch.zeros_like(weight)
            wrapped(batch(rank)).square().sum().backward()
            if by_hand:
                for weight in weights.values():
                    dist.all_reduce(weight.main_grad)
                    weight.main_grad /= 2
            expected = alone(name)
            for path, parameter in net.named_parameters():
                gradient = parameter.main_grad if own_gradients and path in weights else gradient_of(parameter)
                if not torch.allclose(gradient, expected[path], rtol=1e-4, atol=1e-4):
                    found.add(path)
    return sorted(found)


def strangers(rank: int) -> list[str]:
    """Own statistics that the processes do not share after a forward of each subnet; they begin with different ones."""
    menu = [SUBNETS[name] for name in (NAMES if rank else reversed(NAMES))]
    net = supernet(norm=functools.partial(ElasticBatchNorm2d, statistics="own", subnets=menu)).train()
    for name, buffer in net.named_buffers():
        buffer.fill_(rank + len(name))
    wrapped = DistributedDataParallel(net, find_unused_parameters=True)
    for name in NAMES:
        set_subnet(wrapped, SUBNETS[name])
        wrapped(batch(rank))
    wrapped(batch(0))  # a forward begins with the buffers of the first process
    found = {name: buffer.tolist() for name, buffer in net.named_buffers() if ".own." in name}
    gathered: list = [None, None]
    dist.all_gather_object(gathered, found)
    first, second = gathered
    return sorted(name for name in {*first, *second} if first.get(name) != second.get(name))


def work(rank: int) -> dict[str, list[str]]:
    return {
        "slices": wrong(rank, None),
        "own statistics": strangers(rank),
        "autograd": wrong(rank, "autograd"),
        "main_grad, in grad": wrong(rank, "main_grad"),
        "main_grad, averaged by hand": wrong(rank, "main_grad", own_gradients=True, by_hand=True),
        "main_grad, left alone": wrong(rank, "main_grad", own_gradients=True),
        "copied": sorted(path for path, parameter in supernet().named_parameters() if parameter.dim() > 1),
    }
