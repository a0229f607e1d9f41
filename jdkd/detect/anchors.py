"""Where torchvision's generators put anchors, as functions of tensors that an exporter can follow."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator


class Anchors(nn.Module):
    """The anchors of a torchvision generator, level by level, for maps of any size."""

    def __init__(self, generator: AnchorGenerator) -> None:
        super().__init__()
        self.levels = len(generator.cell_anchors)
        for number, cells in enumerate(generator.cell_anchors):
            self.register_buffer(f"cells_{number}", cells.float(), persistent=False)

    def forward(self, number: int, level: Tensor, images: Tensor) -> Tensor:
        """``[A, 4]`` of a level ``[N, C, h, w]`` of images ``[N, 3, H, W]``; steps are whole pixels, as there."""
        cells = getattr(self, f"cells_{number}")
        (height, width), (full_height, full_width) = level.shape[-2:], images.shape[-2:]
        y = torch.arange(height, device=cells.device) * (full_height // height)
        x = torch.arange(width, device=cells.device) * (full_width // width)
        y, x = y[:, None].expand(height, width), x[None].expand(height, width)
        return (torch.stack((x, y, x, y), dim=-1)[:, :, None] + cells).reshape(-1, 4)


class DefaultBoxes(nn.Module):
    """The default boxes of a torchvision generator, level by level, for maps of any size."""

    def __init__(self, generator: DefaultBoxGenerator) -> None:
        super().__init__()
        self.steps = generator.steps
        for number, sides in enumerate(generator._wh_pairs):
            self.register_buffer(f"sides_{number}", sides.clamp(0, 1) if generator.clip else sides, persistent=False)

    def forward(self, number: int, level: Tensor, images: Tensor) -> Tensor:
        """``[A, 4]`` of a level ``[N, C, h, w]`` of images ``[N, 3, H, W]``."""
        sides = getattr(self, f"sides_{number}")  # [a, 2], width and height as shares of the image's
        (height, width), (full_height, full_width) = level.shape[-2:], images.shape[-2:]
        step = None if self.steps is None else self.steps[number]
        rows, columns = (height, width) if step is None else (full_height / step, full_width / step)
        y = ((torch.arange(height, device=sides.device) + 0.5) / rows)[:, None].expand(height, width)
        x = ((torch.arange(width, device=sides.device) + 0.5) / columns)[None].expand(height, width)
        centers = torch.stack((x, y), dim=-1)[:, :, None]  # [h, w, 1, 2]
        boxes = torch.cat((centers - 0.5 * sides, centers + 0.5 * sides), dim=-1)  # [h, w, a, 4]
        return boxes.reshape(-1, 4) * boxes.new_tensor([full_width, full_height] * 2)
