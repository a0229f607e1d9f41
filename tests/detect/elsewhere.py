"""A detector of another interface, as its user would adopt it: a batch of one size in, logits and fractions out."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jdkd.detect import adopt
from tests.graph.networks import Residual, awake, conv

SIDE = 64


class Output(NamedTuple):
    loss: Tensor | None
    logits: Tensor  # [N, P, K]
    boxes: Tensor  # [N, P, 4]: centre and size, in fractions of the image


class Encoder(nn.Module):
    """Two levels, at stride 4 and 8."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, width), nn.MaxPool2d(4), Residual(width, 6), Residual(width, 6))
        self.coarse = nn.Sequential(nn.MaxPool2d(2), conv(width, width))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.stem(pixels)
        return fine, self.coarse(fine)


class Elsewhere(nn.Module):
    """Knows classes from 0 and no images but of 64 x 64 pixels."""

    def __init__(self, classes: int = 3, width: int = 8) -> None:
        super().__init__()
        self.encoder = Encoder(width)
        self.classify, self.regress = nn.Conv2d(width, classes, 1), nn.Conv2d(width, 4, 1)

    def forward(self, pixels: Tensor, labels: list[Tensor] | None = None) -> Output:
        assert pixels.shape[1:] == (3, SIDE, SIDE)
        levels = self.encoder(pixels)
        logits, boxes = (
            torch.cat([head(level).flatten(2).transpose(1, 2) for level in levels], dim=1)
            for head in (self.classify, self.regress)
        )
        loss = None
        if labels is not None:
            wanted = torch.stack([F.one_hot(each, logits.shape[2]).sum(0).clamp(max=1).float() for each in labels])
            loss = F.binary_cross_entropy_with_logits(logits.amax(1), wanted)
        return Output(loss, logits, boxes.sigmoid())


def batch(images: list[Tensor]) -> Tensor:
    """``[N, 3, 64, 64]`` in -1..1."""
    return 2 * torch.cat([F.interpolate(image[None], (SIDE, SIDE), mode="bilinear") for image in images]) - 1


def losses(model: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {"loss_class": model(batch(images), [target["labels"] - 1 for target in targets]).loss}


def predict(model: nn.Module, images: list[Tensor]) -> list[dict[str, Tensor]]:
    output, found = model(batch(images)), []
    for image, logits, boxes in zip(images, output.logits, output.boxes, strict=True):
        scores, labels = logits.sigmoid().max(dim=1)
        kept = scores.topk(5).indices
        centre, half = boxes[kept, :2], boxes[kept, 2:] / 2
        size = image.new_tensor([image.shape[2], image.shape[1]] * 2)
        found.append(
            {
                "boxes": torch.cat((centre - half, centre + half), dim=1) * size,
                "labels": labels[kept] + 1,
                "scores": scores[kept],
            }
        )
    return found


def make(width: int = 8, classes: int = 3) -> nn.Module:
    return adopt(awake(Elsewhere(classes, width)), losses=losses, predict=predict, pyramid="encoder")
