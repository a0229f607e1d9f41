"""Several processes train one model: each takes its share of the images, gradients are averaged in every step.

``torchrun --nproc-per-node N -m jdkd train ...`` starts them; with ``--max-restarts``, what it starts anew carries on
from the last checkpoint. The batch size is of one process. No wrapper is needed: what a step draws (subnets) depends on
seed and step alone, so all processes run the same layers.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

from jdkd.errors import InputError

T = TypeVar("T")


def processes() -> int:
    """How many train together; 1 outside of a process group."""
    return distributed.get_world_size() if _joined() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return distributed.get_rank() if _joined() else 0


def is_first() -> bool:
    """Whether this process is the one that writes, scores and reports."""
    return rank() == 0


def _joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()


@contextmanager
def process_group(device: str) -> Iterator[str]:
    """Joins the processes that torchrun started, for the duration of the block; does nothing without it, or in a group.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``.

    Yields:
        The device of this process: on GPUs, the one of its place on its machine.

    Raises:
        InputError: there are more processes than GPUs.
    """
    if _joined() or not (distributed.is_available() and distributed.is_torchelastic_launched()):
        yield device
        return
    on_gpu = device.startswith("cuda")
    if on_gpu:
        place, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if place >= there:
            raise InputError(f"process {place + 1} of this machine has no GPU, there are {there}; start {there}.")
        device = f"cuda:{place}"
        torch.cuda.set_device(place)
    # the store outlives a restart, and what the processes before have left in it must not be taken for theirs
    store, number, size = next(distributed.rendezvous("env://"))
    attempt = distributed.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    distributed.init_process_group("nccl" if on_gpu else "gloo", store=attempt, rank=number, world_size=size)
    try:
        yield device
    finally:
        distributed.destroy_process_group()


def own_batches(start: int, steps: int, accumulate: int = 1) -> dict[str, int]:
    """Which batches of :func:`jdkd.data.batches` are this process's, in steps ``start .. steps - 1``.

    Together, N processes that accumulate over A batches of B take what one takes with batches of N * A * B.
    """
    count = processes()
    each = count * accumulate
    return {"start": start * each + rank(), "steps": steps * each, "every": count, "joined": each}


@torch.no_grad()
def average_gradients(parameters: Sequence[Tensor]) -> None:
    """Gives all processes the mean of their gradients; what has none in any of them stays without."""
    count = processes()
    if count == 1 or not parameters:
        return
    device = parameters[0].device
    has = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8, device=device)
    distributed.all_reduce(has, distributed.ReduceOp.MAX)
    learning = [parameter for parameter, any_has in zip(parameters, has.tolist(), strict=True) if any_has]
    gradients = [torch.zeros_like(one) if one.grad is None else one.grad for one in learning]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])  # [sum of sizes]
    distributed.all_reduce(flat)
    for parameter, gradient, mean in zip(
        learning, gradients, (flat / count).split([one.numel() for one in gradients]), strict=True
    ):
        parameter.grad = gradient.copy_(mean.view_as(gradient))


@torch.no_grad()
def align(model: nn.Module) -> None:
    """Gives all processes the parameters and buffers of the first, statistics of batch norms among them."""
    if processes() == 1:
        return
    for tensor in (*model.parameters(), *model.buffers()):
        dense = tensor.detach().contiguous()
        distributed.broadcast(dense, 0)
        tensor.copy_(dense)


def mean_of_all(values: Mapping[str, float]) -> dict[str, float]:
    """The mean over all processes of what each has under a name; one that has nothing there counts as 0."""
    count = processes()
    if count == 1:
        return dict(values)
    everyones: list = [None] * count
    distributed.all_gather_object(everyones, dict(values))
    return {name: sum(own.get(name, 0.0) for own in everyones) / count for own in everyones for name in own}


def gathered(make: Callable[[], T]) -> list[T]:
    """What every process makes, in the first, and nothing in the others; where one raises, all do."""
    if processes() == 1:
        return [make()]
    everyones: list = [None] * processes()
    distributed.gather_object(_attempted(make), everyones if is_first() else None)

    def refuse() -> None:
        for _, error in everyones:
            if error is not None:
                raise error

    from_first(refuse)
    return [value for value, _ in everyones] if is_first() else []


@contextmanager
def first_goes_ahead() -> Iterator[None]:
    """Lets the other processes into the block when the first is through it, so that they find what it wrote."""
    if processes() > 1 and not is_first():
        distributed.barrier()
    try:
        yield
    finally:
        if processes() > 1 and is_first():
            distributed.barrier()


def _attempted(make: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What is made, or the error."""
    try:
        return make(), None
    except Exception as error:
        return None, error


def from_first(make: Callable[[], T]) -> T:
    """What the first process makes, in all of them; where it raises, all do."""
    if processes() == 1:
        return make()
    answer: list = [*_attempted(make)] if is_first() else [None, None]  # value, error
    distributed.broadcast_object_list(answer, 0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]
