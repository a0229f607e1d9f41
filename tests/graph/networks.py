"""Small networks with every kind of coupling, that nobody declared anywhere."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(inputs: int, outputs: int, size: int = 3, groups: int = 1, norm: type[nn.Module] | None = nn.BatchNorm2d):
    made = nn.Conv2d(inputs, outputs, size, padding=size // 2, groups=groups, bias=norm is None)
    return nn.Sequential(made, nn.Identity() if norm is None else norm(outputs), nn.ReLU())


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class Residual(nn.Module):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(conv(channels, inner), nn.Conv2d(inner, channels, 3, padding=1, bias=False))
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.branch(x)))


class CrossStage(nn.Module):
    """CSP: half of the channels pass by, the other half goes through blocks, both are joined again."""

    def __init__(self, channels: int, depth: int = 2) -> None:
        super().__init__()
        self.into = conv(channels, channels, 1)
        self.blocks = nn.Sequential(*(Residual(channels // 2, 6) for _ in range(depth)))
        self.out = conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        passed, worked = self.into(x).chunk(2, dim=1)
        return self.out(torch.cat((passed, self.blocks(worked)), dim=1))


class Twice(torch.autograd.Function):
    """Something that no rule knows."""

    @staticmethod
    def forward(ctx, x):
        return torch.ops.jdkd_tests.twice(x)


_library = torch.library.Library("jdkd_tests", "FRAGMENT")
_library.define("twice(Tensor x) -> Tensor")
_library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")


class PANDetector(nn.Module):
    """A detector of torchvision's contract: CSP backbone, PAN neck that concatenates, SE, one head for all levels."""

    def __init__(self, classes: int = 3, width: int = 16, custom: bool = False) -> None:
        super().__init__()
        self.stem = conv(3, width)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.MaxPool2d(2), conv(a, b), CrossStage(b), SqueezeExcite(b))
            for a, b in ((width, 16), (16, 24), (24, 32))
        )
        self.depthwise = conv(32, 32, groups=32)
        self.lateral = nn.ModuleList(nn.Conv2d(c, 20, 1) for c in (16, 24, 32))
        self.top_down = nn.ModuleList(conv(40, 20) for _ in range(2))
        self.bottom_up = nn.ModuleList(conv(40, 20) for _ in range(2))
        self.tower = nn.Sequential(*(conv(20, 20, norm=lambda c: nn.GroupNorm(5, c)) for _ in range(2)))
        self.classify, self.regress = nn.Conv2d(20, classes, 1), nn.Conv2d(20, 4, 1)
        self.custom = custom

    def pyramid(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        levels = []
        for stage, lateral in zip(self.stages, self.lateral, strict=True):
            x = stage(x)
            levels.append(lateral(self.depthwise(x) if stage is self.stages[-1] else x))
        if self.custom:
            levels[-1] = torch.ops.jdkd_tests.twice(levels[-1])
        for i, fuse in zip((1, 0), self.top_down, strict=True):
            up = F.interpolate(levels[i + 1], size=levels[i].shape[-2:])
            levels[i] = fuse(torch.cat((levels[i], up), dim=1))
        for i, fuse in zip((1, 2), self.bottom_up, strict=True):
            levels[i] = fuse(torch.cat((levels[i], F.max_pool2d(levels[i - 1], 2)), dim=1))
        return levels

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None):
        logits, boxes = [], []
        for level in self.pyramid(torch.stack(images)):
            level = self.tower(level)
            logits.append(self.classify(level).flatten(2).transpose(1, 2))
            boxes.append(self.regress(level).flatten(2).transpose(1, 2))
        scores, deltas = torch.cat(logits, 1).sigmoid(), torch.cat(boxes, 1).exp()
        if self.training:
            return {"loss": scores.mean() + deltas.mean()}
        found = []
        for score, box in zip(scores, deltas, strict=True):
            best, label = score.max(dim=1)
            kept = best.topk(5).indices
            found.append({"boxes": box[kept], "labels": label[kept] + 1, "scores": best[kept]})
        return found


def awake(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with statistics and affine parameters that are anything but their defaults, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.dim() <= 1:
                tensor.uniform_(0.3, 0.9, generator=generator)
            elif tensor.is_floating_point():
                tensor.normal_(0, (2 / max(1, tensor[0].numel())) ** 0.5, generator=generator)
    return model.eval()
