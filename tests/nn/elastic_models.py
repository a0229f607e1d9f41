"""Small models with coupled channels, for the tests of what works on a whole model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jdkd.nn import ElasticBatchNorm2d, ElasticBlock, ElasticConv2d, ElasticGroups, ElasticLinear, as_elastic_block


class Block(nn.Module):
    """A residual block with an inner width of its own, its 3x3 taken from a 5x5."""

    def __init__(self, conv, norm, stream: int, inner: int):
        super().__init__()
        self.conv1, self.bn1 = conv(stream, inner, 5, padding=2, bias=False), norm(inner)
        self.depthwise = conv(inner, inner, 3, padding=1, groups=inner)
        self.conv2, self.bn2 = conv(inner, stream, 1, bias=False), norm(stream)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.bn1(self.conv1(x)).relu())
        return (x + self.bn2(self.conv2(y))).relu()


class Net(nn.Module):
    """A stem, a stage of three blocks on one residual stream, and a linear head on the flattened 2x2 map."""

    def __init__(self, conv=nn.Conv2d, norm=nn.BatchNorm2d, linear=nn.Linear, stage=nn.Sequential):
        super().__init__()
        self.stem, self.bn = conv(3, 8, 3, padding=1), norm(8)
        self.stage = stage(*(Block(conv, norm, 8, 6) for _ in range(3)))
        self.pool, self.head = nn.AdaptiveAvgPool2d(2), linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.stage(self.bn(self.stem(x)).relu())).flatten(1))


BLOCKS = [f"stage.{i}" for i in range(3)]
GROUPS = {
    "stream": [
        ("stem", "out"),
        ("bn", "out"),
        *((f"{block}.conv1", "in") for block in BLOCKS),
        *((f"{block}.{layer}", "out") for block in BLOCKS for layer in ("conv2", "bn2")),
        ("head", "in", 4),
    ],
    **{
        f"{block}.inner": [(f"{block}.{layer}", "out") for layer in ("conv1", "bn1", "depthwise")]
        + [(f"{block}.conv2", "in")]
        for block in BLOCKS
    },
}
SMALL = {
    "channels": {"stream": [6, 1, 2, 5], "stage.0.inner": 3, "stage.2.inner": [5, 0]},
    "kernel_sizes": {"stage.0.conv1": 3, "stage.1.conv1": 1},
}


def elastic_blocks(*blocks: nn.Module) -> nn.Sequential:
    return nn.Sequential(*map(as_elastic_block, blocks))


def depth_of(model: nn.Module) -> int:
    """How many elastic blocks of a model run."""
    return sum(block.is_active for block in model.modules() if isinstance(block, ElasticBlock))


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draws statistics and affine parameters, so that no two channels are alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point() and tensor.dim() == 1:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
            elif tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) / tensor[0].numel() ** 0.5)
    return model.eval()


def supernet(seed: int = 0, norm=ElasticBatchNorm2d) -> Net:
    net = Net(ElasticConv2d, norm, ElasticLinear, elastic_blocks)
    net.elastic_groups = ElasticGroups(GROUPS, {"stage": BLOCKS})
    return randomised(net, seed)


def images() -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
