"""Two processes that train a student with a teacher attached, and what each of them found.

The teacher is attached before the student is wrapped in
DistributedDataParallel, and in a second training after; in a third it is wider, with adapters that are fitted to other
images in each process.
"""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from jdkd.distill import attach
from tests.detectors import detector, small_spec

BOXES = torch.tensor([[4.0, 4.0, 40.0, 44.0], [20.0, 10.0, 60.0, 50.0]])


def train(rank: int, when: str) -> dict[str, object]:
    how = {"adapter": when == "adapters"}
    student, teacher = (
        detector(small_spec()).train(),
        detector(small_spec("bottleneck", fpn=24 if how["adapter"] else 16), seed=7),
    )
    handle = attach(student, teacher) if when == "before" else None
    wrapped = DistributedDataParallel(student)
    handle = handle or attach(wrapped, teacher, **how)
    trained = [*student.parameters()]
    if how["adapter"]:
        handle.calibrate([list(torch.rand(4, 3, 64, 80, generator=torch.Generator().manual_seed(9 + rank)))])
        trained += handle.adapters.parameters()
    begun = trained[-1].detach().clone()
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    generator = torch.Generator().manual_seed(rank)
    terms = []
    for _ in range(2):  # a parameter without a gradient would be an error from the second step on
        images = [torch.rand(3, 64, 80, generator=generator) for _ in range(2)]
        losses = wrapped(images, [{"boxes": BOXES, "labels": torch.tensor([1, 3])}] * 2)
        terms.append(losses["loss_pkd"].item())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    weights = torch.cat([parameter.detach().flatten() for parameter in trained])
    other = weights.clone()
    dist.broadcast(other, src=0)
    buckets = wrapped._get_ddp_logging_data()["bucket_sizes"]
    return {
        "terms": terms,
        "levels": list(handle.losses),
        "adapters changed": not torch.equal(begun, trained[-1]),
        "weights agree": bool(torch.equal(weights, other)),
        "bytes in buckets": sum(int(size) for size in buckets.split(", ")),
        "bytes of the student": sum(p.numel() * p.element_size() for p in student.parameters() if p.requires_grad),
        "teacher has gradients": any(p.grad is not None for p in teacher.parameters()),
    }


def work(rank: int) -> dict[str, dict[str, object]]:
    return {when: train(rank, when) for when in ("before", "after", "adapters")}
