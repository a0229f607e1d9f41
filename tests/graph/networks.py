"""Small networks with every kind of coupling, that nobody declared anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, clip_boxes_to_image, sigmoid_focal_loss


def conv(
    inputs: int,
    outputs: int,
    size: int = 3,
    groups: int = 1,
    norm: Callable[[int], nn.Module] | None = nn.BatchNorm2d,
    stride: int = 1,
) -> nn.Sequential:
    made = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=norm is None)
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


class PAN(nn.Module):
    """The neck: top-down and bottom-up, with concatenations; [N, C, H, W] of three strides to three of one width."""

    def __init__(self, inputs: Sequence[int], channels: int = 20, custom: bool = False) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in inputs)
        self.top_down = nn.ModuleList(conv(2 * channels, channels) for _ in range(2))
        self.bottom_up = nn.ModuleList(conv(2 * channels, channels) for _ in range(2))
        self.custom = custom

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        levels = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        if self.custom:
            levels[-1] = torch.ops.jdkd_tests.twice(levels[-1])
        for i, fuse in zip((1, 0), self.top_down, strict=True):
            up = F.interpolate(levels[i + 1], size=levels[i].shape[-2:])
            levels[i] = fuse(torch.cat((levels[i], up), dim=1))
        for i, fuse in zip((1, 2), self.bottom_up, strict=True):
            levels[i] = fuse(torch.cat((levels[i], F.max_pool2d(levels[i - 1], 2)), dim=1))
        return levels


class PANDetector(nn.Module):
    """An anchor-free detector of torchvision's contract: CSP and SE backbone, PAN neck, one head for all levels.

    Every location says what is there, and how far, in logarithms of its stride, the sides of the box are. A box is
    learnt by the locations around its centre, on the level of its size.
    """

    strides = (4, 8, 16)
    largest = (24.0, 48.0, math.inf)  # longer side of the boxes of each level, in pixels

    def __init__(self, classes: int = 3, width: int = 16, custom: bool = False) -> None:
        super().__init__()
        self.stem = conv(3, width, stride=2)
        widths = width, width * 3 // 2, 2 * width
        self.stages = nn.ModuleList(
            nn.Sequential(nn.MaxPool2d(2), conv(a, b), CrossStage(b), SqueezeExcite(b))
            for a, b in zip((width, *widths), widths, strict=False)
        )
        self.depthwise = conv(widths[-1], widths[-1], groups=widths[-1])
        self.neck = PAN(widths, custom=custom)
        self.tower = nn.Sequential(*(conv(20, 20, norm=lambda c: nn.GroupNorm(5, c)) for _ in range(2)))
        self.classify, self.regress = nn.Conv2d(20, classes, 1), nn.Conv2d(20, 4, 1)
        nn.init.constant_(self.classify.bias, -4.0)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None):
        if self.training and targets is None:
            raise ValueError("targets are wanted in training")
        x, maps = self.stem(batched(images, self.strides[-1])), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        levels = self.neck([*maps[:-1], self.depthwise(x)])
        logits, distances = [], []
        for level in map(self.tower, levels):
            logits.append(self.classify(level).flatten(2).transpose(1, 2))
            distances.append(self.regress(level).flatten(2).transpose(1, 2))
        logits, distances = torch.cat(logits, 1), torch.cat(distances, 1).clamp(-4, 4)  # [N, L, classes], [N, L, 4]
        points, strides = self.locations(levels)
        if self.training:
            return self.losses(logits, distances, points, strides, targets)
        sides = distances.exp() * strides[:, None]
        boxes = torch.cat((points - sides[..., :2], points + sides[..., 2:]), -1)  # [N, L, 4]
        return [found(*each) for each in zip(images, logits.sigmoid(), boxes, strict=True)]

    def locations(self, levels: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Centres [L, 2] and strides [L] of all locations."""
        points, strides = [], []
        for level, stride in zip(levels, self.strides, strict=True):
            y, x = (torch.arange(n, device=level.device, dtype=level.dtype) for n in level.shape[-2:])
            y, x = torch.meshgrid(y, x, indexing="ij")
            points.append((torch.stack((x.flatten(), y.flatten()), 1) + 0.5) * stride)
            strides.append(torch.full_like(points[-1][:, 0], stride))
        return torch.cat(points), torch.cat(strides)

    def losses(self, logits, distances, points, strides, targets) -> dict[str, Tensor]:
        kinds, off = torch.zeros_like(logits), []
        for kind, distance, target in zip(kinds, distances, targets, strict=True):
            place, box = self.assigned(target["boxes"].to(points), points, strides)
            kind[place, target["labels"][box] - 1] = 1
            low, high = target["boxes"].to(points)[box].split(2, 1)
            sides = torch.cat((points[place] - low, high - points[place]), 1) / strides[place, None]
            off.append((distance[place] - sides.clamp(min=0.02).log()).abs().mean(1))  # [positives]
        count = kinds.sum().clamp(min=1)
        classification = sigmoid_focal_loss(logits, kinds, alpha=0.5, reduction="sum") / count
        return {"classification": classification, "bbox_regression": torch.cat(off).sum() / count}

    def assigned(self, boxes: Tensor, points: Tensor, strides: Tensor) -> tuple[Tensor, Tensor]:
        """Locations that learn a box, and which of ``boxes`` [M, 4] each of them learns: the smallest."""
        sizes, centres = boxes[:, 2:] - boxes[:, :2], (boxes[:, 2:] + boxes[:, :2]) / 2
        longer = sizes.amax(1) if len(boxes) else sizes[:, 0]
        level = torch.bucketize(longer, longer.new_tensor(self.largest[:-1]))
        near = ((points[:, None] - centres).abs() <= strides[:, None, None]).all(2)  # [L, M]
        near &= strides[:, None] == strides.new_tensor(self.strides)[level]
        place = near.any(1).nonzero()[:, 0]
        areas = torch.where(near[place], sizes.prod(1), math.inf)
        return place, areas.argmin(1) if len(boxes) else place


def batched(images: list[Tensor], divisor: int) -> Tensor:
    """Images [3, H, W] of any sizes, padded at the right and below: [N, 3, H, W]."""
    height, width = (-(-max(image.shape[dim] for image in images) // divisor) * divisor for dim in (1, 2))
    return torch.stack([F.pad(i, (0, width - i.shape[2], 0, height - i.shape[1])) for i in images])


def found(image: Tensor, scores: Tensor, boxes: Tensor) -> dict[str, Tensor]:
    """What is left of an image's locations, scores [L, classes] and boxes [L, 4], after non-maximum suppression."""
    best, label = scores.max(dim=1)
    order = best.topk(min(200, len(best))).indices
    boxes = clip_boxes_to_image(boxes[order], image.shape[1:])
    kept = batched_nms(boxes, best[order], label[order], 0.5)[:100]
    return {"boxes": boxes[kept], "labels": label[order][kept] + 1, "scores": best[order][kept]}


def pan_detector(classes: int = 3, width: int = 16, custom: bool = False) -> PANDetector:
    """A builder, for ``jdkd.rewrite.Architecture``."""
    return PANDetector(classes, width, custom)


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
