"""A training loop in plain PyTorch, with the Pearson loss in its two forms.

``PKDLoss`` is a loss as any other. ``PearsonTap`` gives the same number, and features for the heads in place of the
network's: the gradients of heads and loss are then added in the pass over memory that computes the loss's. Both
trainings below start from the same weights and go the same way.

    python examples/plain_pytorch.py
"""

import torch
from torch import Tensor, nn

from jdkd.nn import PearsonTap, PKDLoss


class Pyramid(nn.Module):
    """A small network with one level of 16 channels at stride 2, 4 and 8 each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Conv2d(inputs, width, 3, 2, 1) for inputs in (3, width, width))
        self.laterals = nn.ModuleList(nn.Conv2d(width, 16, 1) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        levels = []
        for stage, lateral in zip(self.stages, self.laterals, strict=True):
            x = stage(x).relu()
            levels.append(lateral(x))
        return levels


def train(criterion: PKDLoss | PearsonTap, steps: int, batch: int, size: int) -> list[float]:
    """Distils a small network on a task of its own, to find the brightest channel; returns the loss of every step."""
    torch.manual_seed(0)
    student, teacher, head = Pyramid(8), Pyramid(32).eval().requires_grad_(False), nn.Conv2d(16, 3, 1)
    optimizer = torch.optim.Adam([*student.parameters(), *head.parameters()], lr=1e-2)
    history = []
    for _ in range(steps):
        images = torch.rand(batch, 3, size, size)
        targets = images.mean(dim=(2, 3)).argmax(dim=1)  # [batch]
        features = student(images)
        with torch.no_grad():
            taught = teacher(images)
        if isinstance(criterion, PearsonTap):
            features, distillation = criterion(features, taught)
        else:
            distillation = criterion(features, taught)
        scores = torch.stack([head(level).mean(dim=(2, 3)) for level in features]).mean(dim=0)  # [batch, 3]
        loss = nn.functional.cross_entropy(scores, targets) + distillation
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history


def main(steps: int = 60, batch: int = 8, size: int = 64) -> tuple[list[float], list[float]]:
    loss, tap = (train(criterion, steps, batch, size) for criterion in (PKDLoss(1.0), PearsonTap(1.0)))
    for step in range(0, steps, max(1, steps // 6)):
        print(f"step {step:3d}  loss with PKDLoss {loss[step]:.4f}  with PearsonTap {tap[step]:.4f}")
    return loss, tap


if __name__ == "__main__":
    main()
