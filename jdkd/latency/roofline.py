"""How little time the operators of a detector could take on a device: see :class:`Roofline`.

Source of the method: S. Williams, A. Waterman, D. Patterson. Roofline: An Insightful Visual Performance Model for
Multicore Architectures. Communications of the ACM 52(4), 2009.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from jdkd.detect.stages import STAGES
from jdkd.latency.clock import Clock, clock_for

REPEATS = 8  # of which the fastest counts
FLOATS = {"cpu": (2**14, 2**18, 2**21, 2**24), "cuda": (2**18, 2**22, 2**25, 2**27)}  # of copies: caches, then memory


@dataclass(frozen=True)
class Ceilings:
    """The most that a device does in a second.

    Args:
        flops: floating-point operations in fp32; a multiply-accumulate is two.
        copies: bytes read and written by a copy, the fewest first, and how many a second were.
    """

    flops: float
    copies: tuple[tuple[int, float], ...]

    def seconds(self, flops: float, moved: int) -> float:
        """The least that so many operations and moved bytes take, which may go on at once.

        What is moved goes as fast as the fastest copy of as much or more, as a cache may hold it.
        """
        rates = [rate for size, rate in self.copies if size >= moved] or [self.copies[-1][1]]
        return max(flops / self.flops, moved / max(rates))


def measured_ceilings(device: torch.device, clock: Clock | None = None) -> Ceilings:
    """What a device does at most with the threads and settings of this process, measured in about a second.

    Args:
        device: where.
        clock: tells the time; by default that of the device.

    Returns:
        The operations of a large matrix product or 3x3 convolution, whichever are more, and the bytes of copies.
    """
    clock = clock or clock_for(device)
    side, batch, width = (8192, 16, 512) if device.type == "cuda" else (1024, 1, 128)
    random = torch.Generator(device).manual_seed(0)  # zeros are moved and multiplied at less power

    def drawn(*shape: int) -> Tensor:
        return torch.rand(shape, generator=random, device=device)

    def a_second(work: int, call: Callable[[], object]) -> float:
        return 1e3 * work / min(clock.time(call) for _ in range(REPEATS))

    matrix, images, weight = drawn(side, side), drawn(batch, width, 64, 64), drawn(width, width, 3, 3)
    images, weight = (each.contiguous(memory_format=torch.channels_last) for each in (images, weight))
    copies = []
    with torch.inference_mode():
        product = a_second(2 * side**3, lambda: matrix @ matrix)
        convolution = a_second(2 * 9 * width**2 * batch * 64**2, lambda: F.conv2d(images, weight, padding=1))
        for count in FLOATS[device.type]:
            source, target = drawn(count), drawn(count)
            copies.append((2 * source.nbytes, a_second(2 * source.nbytes, partial(target.copy_, source))))
    return Ceilings(max(product, convolution), tuple(copies))


class Roofline(TorchDispatchMode):
    """Adds up, stage by stage, the least time of all operators that run meanwhile, one after the other.

    Each reads what it is given and writes what it returns once, at a device's ceiling. What is fused needs less.

    Args:
        ceilings: of the device.
        stage: the one that an operator belongs to, asked when it has run.

    Attributes:
        seconds: of each of :data:`jdkd.detect.stages.STAGES`.
    """

    def __init__(self, ceilings: Ceilings, stage: Callable[[], str]) -> None:
        super().__init__()
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._ceilings, self._stage = ceilings, stage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        flops = 0 if count is None else count(*args, **kwargs, out_val=out)
        self.seconds[self._stage()] += self._ceilings.seconds(flops, _moved(func, (args, kwargs), out))
        return out


def _moved(func: Any, given: Any, out: Any) -> int:
    """Bytes that an operator reads and writes; none where it makes a view, or memory that nothing is written to."""
    read, written = ([leaf for leaf in tree_leaves(each) if isinstance(leaf, Tensor)] for each in (given, out))
    places = {each.untyped_storage().data_ptr() for each in read}
    new = any(each.untyped_storage().data_ptr() not in places for each in written)
    if "empty" in func._schema.name or not (new or func._schema.is_mutable):
        return 0
    return sum(min(each.nbytes, each.untyped_storage().nbytes()) for each in (*read, *written))
