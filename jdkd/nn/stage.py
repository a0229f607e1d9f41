"""Blocks in a row, of which the first ones run."""

from __future__ import annotations

import copy
import itertools
from typing import Any, NamedTuple

from torch import Tensor, nn

from jdkd.errors import InputError
from jdkd.nn.elastic import Elastic
from jdkd.nn.symbolic import Proxy, as_node
from jdkd.ops.integers import integer


class _Depth(NamedTuple):
    """The active part of a stage."""

    depth: int | None  # None: all blocks that there are


class ElasticStage(Elastic, nn.Sequential):
    """Blocks in a row, of which the first ones run; built as ``nn.Sequential``, with its state dict.

    ``active_depth`` says how many run now; :func:`export` gives them as ``nn.Sequential``. (Elastic depth: Cai et al.,
    Once-for-All, ICLR 2020, section 3.2.)
    """

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.set_active()

    def set_active(self, depth: int | None = None) -> None:
        """Chooses how many blocks the next forwards run.

        Args:
            depth: the first ones; None: all, those that are added later too.

        Raises:
            InputError: if the stage has no such number of blocks; the active ones stay as they were.
        """
        self._put(self.part(depth))

    def part(self, depth: int | None = None) -> _Depth:
        """Reads what :meth:`set_active` is given, and activates nothing."""
        return _Depth(active_depth(depth, len(self), "ElasticStage.set_active: depth"))

    @property
    def active_depth(self) -> int:
        depth = self._record.active.depth
        return len(self) if depth is None else min(depth, len(self))  # blocks may have been deleted

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return as_node(self, x, x)
        for block in itertools.islice(self._modules.values(), self._now().depth):
            x = block(x)
        return x

    def exported(self, plain: dict[int, Any]) -> nn.Sequential:
        """The blocks that run, copied; ``plain`` says what stands for their layers, as ``copy.deepcopy`` takes it."""
        blocks = list(self._modules.values())[: self.active_depth]
        return nn.Sequential(*(copy.deepcopy(block, plain) for block in blocks)).train(self.training)

    def extra_repr(self) -> str:
        return f"active={self.active_depth}/{len(self)} blocks"


def active_depth(value: int | None, blocks: int, argument: str) -> int | None:
    """Reads a number of blocks, None for all; raises InputError on one that there are not."""
    if value is None:
        return None
    depth = integer(value)
    if depth is None or not 1 <= depth <= blocks:
        raise InputError(f"{argument}={value!r} of {blocks} blocks; give a number from 1 to {blocks}")
    return depth
