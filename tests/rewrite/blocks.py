"""Pieces of the detectors that people bring: every way in which channels meet, split, and are read."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import DeformConv2d

from tests.graph.networks import conv


class Block(nn.Module):
    """Layers by name, and a function of them and a feature map."""

    def __init__(self, run, **layers) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.rand(shape))


class Attention(nn.Module):
    """``[N, C, H, W]`` to itself; heads of one width, written with matmul, einsum, bmm or torch's own function."""

    def __init__(self, channels: int, heads: int, how: str) -> None:
        super().__init__()
        self.heads, self.how = heads, how
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)  # [N, L, C]
        q, k, v = self.qkv(tokens).reshape(n, h * w, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scale = 1 / math.sqrt(q.shape[-1])
        if self.how == "matmul":
            mixed = (q @ k.transpose(-2, -1) * scale).softmax(-1) @ v
        elif self.how == "einsum":
            mixed = torch.einsum("nhls,nhse->nhle", torch.einsum("nhle,nhse->nhls", q, k).mul(scale).softmax(-1), v)
        elif self.how == "bmm":
            flat = [part.reshape(-1, *part.shape[2:]) for part in (q, k, v)]
            mixed = torch.bmm((torch.bmm(flat[0], flat[1].transpose(1, 2)) * scale).softmax(-1), flat[2])
            mixed = mixed.reshape(n, self.heads, h * w, -1)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(mixed.transpose(1, 2).flatten(2)).transpose(1, 2).reshape(x.shape)


class Res2Net(nn.Module):
    """A map is split into parts, each joined by the sum with the part before."""

    def __init__(self, channels: int, parts: int = 4) -> None:
        super().__init__()
        self.parts = parts
        self.into, self.out = conv(channels, channels, 1), conv(channels, channels, 1)
        self.convs = nn.ModuleList(conv(channels // parts, channels // parts) for _ in range(parts - 1))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.into(x).chunk(self.parts, dim=1)
        done = [parts[0]]
        for part, one in zip(parts[1:], self.convs, strict=True):
            done.append(one(part + done[-1] if len(done) > 1 else part))
        return x + self.out(torch.cat(done, 1))


class Ghost(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.primary, self.cheap = conv(inputs, outputs // 2, 1), conv(outputs // 2, outputs // 2, groups=outputs // 2)

    def forward(self, x: Tensor) -> Tensor:
        made = self.primary(x)
        return torch.cat((made, self.cheap(made)), 1)[:, : self.outputs]


class HighResolution(nn.Module):
    """HRNet's fusion: every resolution gets the sum of all, resized."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.high, self.low = conv(channels, 8), conv(channels, 12)
        self.down, self.up = nn.Conv2d(8, 12, 3, 2, 1), nn.Conv2d(12, 8, 1)
        self.out = conv(20, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        high, low = self.high(x), self.low(F.avg_pool2d(x, 2))
        high, low = (
            F.relu(high + F.interpolate(self.up(low), size=high.shape[-2:], mode="bilinear")),
            F.relu(low + self.down(high)),
        )
        return self.out(torch.cat((high, F.interpolate(low, scale_factor=2.0)), 1))


class FastNormalisedFusion(nn.Module):
    """BiFPN's weighted sum of inputs."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.ways = nn.ModuleList(conv(channels, channels, 1) for _ in range(3))
        self.weights = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        weights = F.relu(self.weights)
        weights = weights / (weights.sum() + 1e-4)
        return sum(weight * way(x) for weight, way in zip(weights, self.ways, strict=True))


class RepVGG(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.three, self.one = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norms[0](self.three(x)) + self.norms[1](self.one(x)) + self.norms[2](x))


class OneShotAggregation(nn.Module):
    """VoVNet: all intermediate maps are joined once."""

    def __init__(self, channels: int, inner: int = 6, depth: int = 3) -> None:
        super().__init__()
        self.convs = nn.ModuleList(conv(channels if k == 0 else inner, inner) for k in range(depth))
        self.out = conv(channels + depth * inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for one in self.convs:
            maps.append(one(maps[-1]))
        return x + self.out(torch.cat(maps, 1))


class PyramidPooling(nn.Module):
    """SPPF."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.into, self.out = conv(channels, channels // 2, 1), conv(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.into(x)]
        for _ in range(3):
            maps.append(F.max_pool2d(maps[-1], 5, 1, 2))
        return self.out(torch.cat(maps, 1))


class SharedHead(nn.Module):
    """Convolutions shared by all levels, a norm and a scalar for each."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.tower = nn.Conv2d(channels, 10, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(10) for _ in range(2))
        self.scales = nn.ParameterList(nn.Parameter(torch.tensor(1.0)) for _ in range(2))
        self.out = nn.Conv2d(10, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        levels = [x, F.max_pool2d(x, 2)]
        high, low = (
            self.out(F.relu(norm(self.tower(level)))) * scale
            for level, norm, scale in zip(levels, self.norms, self.scales, strict=True)
        )
        return high + F.interpolate(low, size=high.shape[-2:])


class Linear(nn.Module):
    """Squeeze-and-excitation with linear layers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(channels, 4), nn.ReLU(), nn.Linear(4, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        return x * self.fc(F.adaptive_avg_pool2d(x, 1).view(n, c)).view(n, c, 1, 1).expand_as(x)


def written_in_place(m: Block, x: Tensor) -> Tensor:
    made = m.a(x).clone()
    made[:, :, ::2] = m.b(x)[:, :, ::2]
    made[:, :, 1:].mul_(2.0)
    return made


def deformed(m: Block, x: Tensor) -> Tensor:
    return m.deform(x, m.offsets(x), m.gates(x).sigmoid())


def batch_dependent(m: Block, x: Tensor) -> Tensor:
    return torch.cat([m.a(one[None]) if k % 2 else m.a(one[None]).relu() for k, one in enumerate(x)])


def space_to_depth(m: Block, x: Tensor) -> Tensor:
    parts = [x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]
    return F.interpolate(m.a(torch.cat(parts, 1)), size=x.shape[-2:])


def c(inputs: int = 8, outputs: int = 8, size: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


# What leaves every channel free: each maps [N, 8, H, W] to itself, H and W even.
FREE = {
    "layer scale": lambda: Block(lambda m, x: x + m.gamma * m.a(x), a=c(), gamma=parameter(8, 1, 1)),
    "positions": lambda: Block(lambda m, x: m.a(x + m.positions), a=c(), positions=parameter(1, 8, 1, 1)),
    "parameter list": lambda: Block(
        lambda m, x: m.a(x) * m.p[0] + m.p[1], a=c(), p=nn.ParameterList([parameter(8, 1, 1), parameter(1, 8, 1, 1)])
    ),
    "parameter dict": lambda: Block(
        lambda m, x: torch.einsum("nchw,oc->nohw", x, m.p["w"]) + m.p["b"][:, None, None],
        p=nn.ParameterDict({"w": parameter(8, 8), "b": parameter(8)}),
    ),
    "a module twice": lambda: Block(lambda m, x: m.a(F.relu(m.a(x))), a=c()),
    "nested lists": lambda: Block(
        lambda m, x: m.all[1][0](m.all[0][1](m.all[0][0](x))),
        all=nn.ModuleList([nn.ModuleList([c(), c()]), nn.ModuleList([c()])]),
    ),
    "checkpoint": lambda: Block(lambda m, x: checkpoint(m.a, x, use_reentrant=False), a=conv(8, 8)),
    "in place": lambda: Block(lambda m, x: F.silu(m.a(x), inplace=True).mul_(2).add_(x), a=c()),
    "written in place": lambda: Block(written_in_place, a=c(), b=c()),
    "where": lambda: Block(lambda m, x: torch.where(x > 0, m.a(x), m.b(x)), a=c(), b=c()),
    "expanded": lambda: Block(lambda m, x: (y := m.a(x)) * m.b(x).sigmoid().expand_as(y), a=c(), b=c(8, 1)),
    "interpolate": lambda: Block(lambda m, x: F.interpolate(m.a(F.avg_pool2d(x, 2)), size=x.shape[-2:]), a=c()),
    "pixel shuffle": lambda: Block(lambda m, x: F.avg_pool2d(F.pixel_shuffle(m.a(x), 2), 2), a=c(8, 32)),
    "pixel unshuffle": lambda: Block(
        lambda m, x: F.interpolate(m.b(F.pixel_unshuffle(m.a(x), 2)), scale_factor=2.0), a=c(8, 6), b=c(24, 8)
    ),
    "unfold": lambda: Block(
        lambda m, x: m.b(F.unfold(m.a(x), 3, padding=1).view(len(x), -1, *x.shape[2:])), a=c(8, 6), b=c(54, 8, 1)
    ),
    "fold": lambda: Block(lambda m, x: m.b(F.fold(m.a(x).flatten(2), (2 * x.shape[2], 2 * x.shape[3]), 2, stride=2))[
        :, :, ::2, ::2], a=c(8, 24), b=c(6, 8)),
    "deformable": lambda: Block(
        deformed, deform=DeformConv2d(8, 8, 3, padding=1), offsets=c(8, 18), gates=c(8, 9)
    ),
    "deformable in groups": lambda: Block(
        deformed, deform=DeformConv2d(8, 8, 3, padding=1), offsets=c(8, 36), gates=c(8, 18)
    ),
    "deformable grouped": lambda: Block(
        deformed, deform=DeformConv2d(8, 8, 3, padding=1, groups=4), offsets=c(8, 18), gates=c(8, 9)
    ),
    "squeeze": lambda: Linear(8),
    "ghost": lambda: Ghost(8, 8),
    "high resolution": lambda: HighResolution(8),
    "fast normalised": lambda: FastNormalisedFusion(8),
    "reparametrised": lambda: RepVGG(8),
    "res2net": lambda: Res2Net(8),
    "one-shot aggregation": lambda: OneShotAggregation(8),
    "pyramid pooling": lambda: PyramidPooling(8),
    "space to depth": lambda: Block(space_to_depth, a=c(32, 8)),
    "shared head": lambda: SharedHead(8),
    "batch dependent": lambda: Block(batch_dependent, a=c()),
    "matmul attention": lambda: Attention(8, 2, "matmul"),
    "einsum attention": lambda: Attention(8, 2, "einsum"),
    "bmm attention": lambda: Attention(8, 2, "bmm"),
    "fused attention": lambda: Attention(8, 2, "fused"),
    "gated unit": lambda: Block(lambda m, x: F.glu(m.a(x), 1), a=c(8, 16)),
    "grouped": lambda: Block(lambda m, x: m.b(m.a(x)), a=c(8, 16, groups=4), b=c(16, 8, groups=2)),
    "flipped": lambda: Block(lambda m, x: m.b(m.a(x).flip(1)), a=c(8, 6), b=c(6, 8)),
    "shuffled": lambda: Block(
        lambda m, x: m.a(x.view(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2)), a=c()
    ),
    "channels last": lambda: Block(
        lambda m, x: m.b(F.gelu(m.a(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2), a=nn.Linear(8, 12), b=nn.Linear(12, 8)
    ),
    "low rank": lambda: Block(lambda m, x: F.conv2d(x, (m.up @ m.down)[..., None, None]), up=parameter(8, 4),
        down=parameter(4, 8)),
    "summed weights": lambda: Block(
        lambda m, x: F.conv2d(x, m.three + F.pad(m.one, (1, 1, 1, 1)), padding=1), three=parameter(8, 8, 3, 3),
        one=parameter(8, 8, 1, 1),
    ),
    "gained weights": lambda: Block(
        lambda m, x: F.conv2d(x, m.weight * m.gain[:, None, None, None]), weight=parameter(8, 8, 1, 1),
        gain=parameter(8),
    ),
    "convolved and turned": lambda: Block(
        lambda m, x: m.b(F.relu(m.a(x)))[..., ::2, ::2], a=c(8, 6), b=nn.ConvTranspose2d(6, 8, 2, 2)
    ),
}  # fmt: skip


def eca(m: Block, x: Tensor) -> Tensor:
    gates = m.a(F.adaptive_avg_pool2d(x, 1).squeeze(-1).transpose(1, 2)).transpose(1, 2).unsqueeze(-1)
    return x * gates.sigmoid()


def cbam(m: Block, x: Tensor) -> Tensor:
    return x * m.a(torch.cat((x.mean(1, keepdim=True), x.amax(1, keepdim=True)), 1)).sigmoid()


def recurrent(m: Block, x: Tensor) -> Tensor:
    return m.rnn(x.flatten(2).transpose(1, 2))[0].transpose(1, 2).reshape(x.shape)


def attended(m: Block, x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    return m.attention(tokens, tokens, tokens)[0].transpose(1, 2).reshape(x.shape)


def sampled(m: Block, x: Tensor) -> Tensor:
    return F.grid_sample(x, m.a(x)[:, :2].permute(0, 2, 3, 1).tanh(), align_corners=False)


# What keeps the eight channels that it is given; with words of the reason.
KEPT = {
    "channel attention": (lambda: Block(eca, a=nn.Conv1d(1, 1, 3, padding=1)), "aten::convolution slides over it"),
    "spatial attention": (lambda: Block(cbam, a=c(2, 1)), "aten::mean mixes"),
    "layer norm": (
        lambda: Block(lambda m, x: m.n(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), n=nn.LayerNorm(8)),
        "statistics over all",
    ),
    "one norm group": (lambda: nn.GroupNorm(1, 8), "statistics over all"),
    "gru": (lambda: Block(recurrent, rnn=nn.GRU(8, 8, batch_first=True)), "disagree"),
    "lstm": (lambda: Block(recurrent, rnn=nn.LSTM(8, 8, batch_first=True)), "disagree"),
    "response norm": (lambda: nn.LocalResponseNorm(3), "adds channels that follow no others"),
    "unregistered": (lambda: Block(lambda m, x: m.hidden[0](x), hidden=[c()]), "follows no channels"),
    "constant": (lambda: Block(lambda m, x: x + m.shift, shift=torch.arange(8.0).view(8, 1, 1)), "follow no channels"),
    "numbers in code": (
        lambda: Block(lambda m, x: torch.cat(torch.split(x, 4, 1)[::-1], 1), a=c()),
        "disagree",
    ),
    "slices in code": (
        lambda: Block(lambda m, x: m.b(torch.cat((m.a(x[:, :3]), x[:, 3:]), 1)), a=c(3, 3), b=c()),
        "disagree",
    ),
    "indices": (lambda: Block(lambda m, x: x[:, [1, 0, 3, 2, 5, 4, 7, 6]]), "picks some"),
    "dynamic weights": (
        lambda: Block(
            lambda m, x: torch.cat([F.conv2d(one[None], (m.fc(one.mean((1, 2))).softmax(0)[:, None, None] * m.w).sum(0)
                [..., None, None]) for one in x]), fc=nn.Linear(8, 4), w=parameter(4, 8, 8)),
        "multiplies activations",
    ),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(c()), "folds two kinds"),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(c()), "takes a norm over it"),
    "standardised weights": (
        lambda: Block(lambda m, x: F.conv2d(x, m.w - m.w.mean((1, 2, 3), keepdim=True)), w=parameter(8, 8, 1, 1)),
        "aten::mean mixes",
    ),
    "softmax": (lambda: nn.Softmax2d(), "softmax"),
    "sampled": (lambda: Block(sampled, a=c()), "no reason, as only what moves the samples is kept"),
    "multi-head attention": (
        lambda: Block(attended, attention=nn.MultiheadAttention(8, 2, batch_first=True)), "not an operator"),
}  # fmt: skip
