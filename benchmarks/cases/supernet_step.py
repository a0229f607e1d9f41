"""A training step of a supernet: four subnets, forward and backward, on one batch, and a step of the optimiser.

The network is the backbone and the pyramid of a detector, its inner widths and its depths elastic as in the teacher
pool: R50-FPN, and R18-FPN where a CPU is to do it in seconds. The subnets are those of a sandwich step: the largest,
the smallest, and two between. Weights are float32 and channels-last; in bfloat16 the forward runs under autocast. The
loss is the mean square of every level.

``slice_contiguous`` is the supernet as once-for-all writes it: layers that slice their weight and copy the slice at
every forward. ``jdkd`` are the elastic layers as they are; ``jdkd packed`` packs all active weights of a subnet in one
launch at every forward, and in ``jdkd packed main_grad`` their gradients are added in place. The step of the optimiser
is a whole one of length zero, so that every call starts from the same weights.

Every provider gives the four losses and the gradients of all shared weights, and they must agree before they are timed.
Time on a GPU is that of a CUDA graph, and the host's is measured apart, without one; on a CPU the host's is that of the
same network at an eighth of its width, on 32x32 images. ``least_bytes`` counts every weight: read by the forward, its
gradient written, and both read and momentum and weight moved on by the optimiser.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Case
from jdkd.detect.backbones import Pyramid, maps_of
from jdkd.experimental import pack_forwards
from jdkd.graph import Topology, trace
from jdkd.nn import Subnet, as_elastic_block, set_subnet
from jdkd.rewrite import Rewrite, make_elastic

NAME = "supernet_step"
R50, R18 = "resnet50", "resnet18"
NAMES = {R50: "R50-FPN", R18: "R18-FPN"}
SUBNETS = ((1.0, 1.0), (0.25, 0.5), (0.5, 0.75), (0.75, 1.0))  # shares of the inner widths and of the depths
WHOLE, SMALL, TINY = (800, 1344), (128, 224), (32, 32)  # images, in pixels
# Of the gradients of a whole network, where roundings of its many layers add up.
TOLERANCES = {torch.float32: 5e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


@dataclass(frozen=True)
class Network:
    """A backbone of torchvision under a pyramid, which has 256 channels.

    Args:
        backbone: its name.
        width: of all channels but the image's, over the published ones.
    """

    backbone: str
    width: float = 1.0


class Features(nn.Module):
    """What a detector has under its heads, at the path that it has there.

    Args:
        backbone: by its name.
        channels: of the pyramid.
    """

    def __init__(self, backbone: str, channels: int) -> None:
        super().__init__()
        self.backbone = Pyramid(maps_of(backbone), "P2-P6", channels)

    def forward(self, images: Tensor) -> list[Tensor]:  # [N, 3, H, W] -> P2 to P6
        return [*self.backbone(images).values()]


class SlicedConv2d(nn.Conv2d):
    """A convolution of the leading channels: those that come in, and the first ``active`` that go out."""

    active: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight[: self.active, : x.shape[1]].contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, weight, None, self.stride, self.padding)


class SlicedBatchNorm2d(nn.BatchNorm2d):
    """A batch normalisation of the leading channels that come in."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked.add_(1)
        vectors = (v[: x.shape[1]] for v in (self.running_mean, self.running_var, self.weight, self.bias))
        return F.batch_norm(x, *vectors, training=self.training, momentum=self.momentum, eps=self.eps)


SLICED = {nn.Conv2d: SlicedConv2d, nn.BatchNorm2d: SlicedBatchNorm2d}


def features(network: Network) -> nn.Module:
    """The network, with fresh weights."""
    model = Features(network.backbone, max(8, 8 * round(32 * network.width)))
    if network.width == 1:
        return model
    topology = coupled(model)
    body = [group for group in topology.groups if group.name.startswith("backbone.body.")]
    return Rewrite(keep={group.name: range(group.shrunk(network.width)) for group in body}).apply(model, topology)


@functools.cache
def topology_of(network: Network) -> Topology:
    """What is coupled to what in a network."""
    return coupled(features(network))


def coupled(model: nn.Module) -> Topology:
    with torch.device("cpu"):
        return trace(model, torch.rand(1, 3, 64, 64))


@functools.cache
def weights_of(network: Network) -> int:
    """How many a network has."""
    return sum(parameter.numel() for parameter in features(network).parameters())


@dataclass(frozen=True)
class Net:
    """A supernet that is trained, and how a subnet of :data:`SUBNETS`, by its number, becomes the active one."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    activate: Callable[[int], None]


@dataclass(frozen=True)
class Inputs:
    """A batch, and a supernet for each provider, all with the same weights."""

    images: Tensor  # [N, 3, H, W]
    nets: dict[str, Net]


def cases(device: str, full: bool = False) -> Iterator[Case]:
    """The cases for a device: whole images on a GPU, and on a CPU a small network on small ones unless ``full``."""
    if device == "cuda":
        for dtype in (torch.bfloat16, torch.float32):
            yield case(R50, WHOLE, dtype, device)
        return
    yield case(R18, SMALL, torch.float32, device)
    if full:
        for size in (SMALL, WHOLE):
            yield case(R50, size, torch.float32, device)


def case(
    backbone: str, size: tuple[int, int], dtype: torch.dtype, device: str, images: int = 2, width: float = 1.0
) -> Case:
    """One step.

    Args:
        backbone: of torchvision.
        size: of the images, in pixels.
        dtype: float32, or what autocast computes in.
        device: ``cpu`` or ``cuda``.
        images: the batch.
        width: of the network, over the published one.
    """
    network, narrow = Network(backbone, width), Network(backbone, 0.125 * width)
    runs = {
        "slice_contiguous": sliced,
        "jdkd": elastic,
        "jdkd packed": functools.partial(packed, grad_mode="autograd"),
        "jdkd packed main_grad": functools.partial(packed, grad_mode="main_grad"),
    }

    def make(network: Network = network, size: tuple[int, int] = size) -> Inputs:
        batch = torch.randn(images, 3, *size, device=device).contiguous(memory_format=torch.channels_last)
        nets = {name: build(network, device) for name, build in runs.items()}
        nets["exact"] = sliced(network, device)
        state = nets["exact"].model.state_dict()
        for net in nets.values():
            net.model.load_state_dict(state)
        return Inputs(batch, nets)

    return Case(
        NAME,
        f"{NAMES[backbone]}{'' if width == 1 else f' x{width:g}'} {size[0]}x{size[1]} N={images}",
        "training step",
        dtype,
        "channels-last",
        make,
        lambda given: step(given.nets["exact"], given.images, dtype),
        {name: Provided(name, dtype) for name in runs},
        7 * 4 * weights_of(network),
        tiny=lambda: make(narrow, TINY),
        tolerance=TOLERANCES[dtype],
    )


def step(net: Net, images: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Trains all subnets by one batch.

    Args:
        net: the supernet.
        images: ``[N, 3, H, W]``.
        dtype: float32, or that of autocast.

    Returns:
        The losses of the subnets, and the gradient of every weight.
    """
    net.optimizer.zero_grad(set_to_none=True)
    losses = []
    for number in range(len(SUBNETS)):
        net.activate(number)
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            levels = net.model(images)
        loss = sum(level.float().square().mean() for level in levels)
        loss.backward()
        losses.append(loss.detach())
    net.optimizer.step()
    return [*losses, *(parameter.grad for parameter in net.model.parameters())]


@dataclass(frozen=True)
class Provided:
    """The step of a provider's own net."""

    name: str
    dtype: torch.dtype

    def __call__(self, given: Inputs) -> list[Tensor]:
        return step(given.nets[self.name], given.images, self.dtype)


def sliced(network: Network, device: str) -> Net:
    """The supernet as once-for-all writes it."""
    model, topology = features(network), topology_of(network)
    for module in model.backbone.body.modules():
        module.__class__ = SLICED.get(type(module), type(module))
    for blocks in topology.block_lists:
        for block in blocks.blocks:
            as_elastic_block(model.get_submodule(block))

    def activate(number: int) -> None:
        active = subnet(network, number)
        for name, width in active.channels:
            model.get_submodule(name).active = width  # the layer that makes a group names it
        depths = dict(active.depths)
        for blocks in topology.block_lists:
            for place, block in enumerate(blocks.blocks):
                model.get_submodule(block).set_active(place < depths[blocks.name])

    return trained(model, activate, device)


def elastic(network: Network, device: str) -> Net:
    """The supernet of elastic layers, whose subnets one switch sets."""
    model = make_elastic(features(network), topology_of(network))
    subnets = [subnet(network, number) for number in range(len(SUBNETS))]
    return trained(model, lambda number: set_subnet(model, subnets[number]), device)


def packed(network: Network, device: str, grad_mode: str) -> Net:
    """The same on packed weights."""
    net = elastic(network, device)
    pack_forwards(net.model, grad_mode=grad_mode)
    return net


def subnet(network: Network, number: int) -> Subnet:
    """A subnet of :data:`SUBNETS`, as data."""
    topology, (width, depth) = topology_of(network), SUBNETS[number]
    channels = {group.name: int(group.units * width) for group in topology.inner}
    return Subnet(channels, depths={b.name: max(1, round(depth * len(b.blocks))) for b in topology.block_lists})


def trained(model: nn.Module, activate: Callable[[int], None], device: str) -> Net:
    """The net in training, with an optimiser whose state is there already, as it must be when a graph is captured."""
    model.to(device=device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    state: dict[str, Any] = optimizer.state
    for parameter in model.parameters():
        state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return Net(model, optimizer, activate)
