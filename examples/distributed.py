"""Two processes with half of the images each, and the loss of all of them.

With ``group`` the statistics are those of the images of all ranks together, so every rank gets the loss that one
process with all the images would, and the gradients that ``DistributedDataParallel`` averages are that process's too.
Without ``group`` each rank compares its own images, as the published loss does.

    python examples/distributed.py
"""

import tempfile

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from jdkd.nn import PearsonTap


class Student(nn.Module):
    """One level and a head; returns the loss on a task of its own, and the teacher's."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1))
        self.head = nn.Conv2d(16, 1, 1)
        self.tap = PearsonTap(loss_weight=6.0, group=group)

    def forward(self, images: Tensor, taught: Tensor) -> tuple[Tensor, Tensor]:
        level, distillation = self.tap(self.body(images), taught)
        return self.head(level).square().mean(), distillation


def work(rank: int, ranks: int, rendezvous: str, steps: int, size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks)
    torch.manual_seed(0)  # the same weights and images everywhere
    student = Student(group=dist.group.WORLD)
    teacher = nn.Sequential(nn.Conv2d(3, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, 16, 3, 2, 1)).requires_grad_(False)
    images = torch.rand(4 * ranks, 3, size, size)
    taught = teacher(images)
    alone = Student(group=None)
    alone.load_state_dict(student.state_dict())
    wrapped = DistributedDataParallel(student)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2)

    for step in range(steps):
        task, distillation = wrapped(images.chunk(ranks)[rank], taught.chunk(ranks)[rank])
        optimizer.zero_grad()
        (task + distillation).backward()
        if step == 0:
            whole = alone(images, taught)
            sum(whole).backward()
            torch.testing.assert_close(distillation, whole[1], rtol=1e-4, atol=1e-5)
            for ours, theirs in zip(student.parameters(), alone.parameters(), strict=True):
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)
            print(f"rank {rank}: loss and gradients are those of one process with all {len(images)} images", flush=True)
        optimizer.step()
        if rank == 0 and step % max(1, steps // 5) == 0:
            print(f"step {step:3d}  loss of all images {distillation.item():.4f}", flush=True)
    dist.destroy_process_group()


def main(ranks: int = 2, steps: int = 20, size: int = 32) -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (ranks, f"{folder}/rendezvous", steps, size), nprocs=ranks)


if __name__ == "__main__":
    main()
