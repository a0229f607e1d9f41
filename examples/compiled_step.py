"""The tap under ``torch.compile``: features, loss and heads in one graph.

The loss is an operator that the compiler treats as a box, so ``fullgraph=True`` holds, and the fused kernels run inside
the compiled step. Gradients are those of the step that is not compiled.

    python examples/compiled_step.py
"""

import torch
from torch import Tensor, nn

from jdkd.nn import PearsonTap


class Student(nn.Module):
    """Two levels and a head on each; returns its loss on a task of its own, and the teacher's."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Conv2d(inputs, width, 3, 2, 1) for inputs in (3, width))
        self.head = nn.Conv2d(width, 1, 1)
        self.tap = PearsonTap(loss_weight=2.0)

    def features(self, images: Tensor) -> list[Tensor]:
        fine = self.stages[0](images).relu()
        return [fine, self.stages[1](fine).relu()]

    def forward(self, images: Tensor, taught: list[Tensor]) -> Tensor:
        levels, loss = self.tap(self.features(images), taught)
        return loss + sum(self.head(level).square().mean() for level in levels)


def gradients(step: nn.Module, student: Student, *batch: object) -> Tensor:
    student.zero_grad()
    step(*batch).backward()
    return torch.cat([parameter.grad.flatten() for parameter in student.parameters()])


def main(steps: int = 30, size: int = 64, backend: str = "inductor") -> list[float]:
    torch.manual_seed(0)
    student, teacher = Student(), Student().requires_grad_(False)
    compiled = torch.compile(student, fullgraph=True, backend=backend)
    images = torch.rand(4, 3, size, size)
    taught = teacher.features(images)
    eager, ours = gradients(student, student, images, taught), gradients(compiled, student, images, taught)
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)
    print(f"gradients of the compiled step differ by at most {(ours - eager).abs().max():.1e}")

    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)
    history = []
    for step in range(steps):
        loss = compiled(images, taught)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
        if step % max(1, steps // 5) == 0:
            print(f"step {step:3d}  loss {history[-1]:.4f}")
    return history


if __name__ == "__main__":
    main()
