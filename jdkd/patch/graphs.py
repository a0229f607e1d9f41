"""Backbone, neck and the heads behind them in one CUDA graph for every size of a batch: see :func:`put_graphs`."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from jdkd.latency.folding import is_hooked
from jdkd.latency.replaying import Replayed
from jdkd.patch.convolutions import state
from jdkd.patch.overrides import Override, Overrides

MOST, AFTER = 8, 2  # sizes that have a graph, and how often one must have been seen

_ready = threading.local()


class Trunk(Override):
    """Replays backbone, neck and heads; a size that was not seen before runs eagerly.

    A size is that of the padded batch. A detector's transform pads to multiples of its ``size_divisible``, 32 pixels,
    and these are the buckets: to pad further would change what a convolution sees at the border of an image.

    Levels and what heads return are copies, as the next replay writes over what this one has written.

    Args:
        trunk: is called with a batch ``[N, 3, H, W]``, and returns levels.
        heads: are called with a list of its levels and nothing else; which of the levels, by number.
    """

    def __init__(self, trunk: nn.Module, heads: Mapping[nn.Module, Sequence[int]], **options: Any) -> None:
        super().__init__(trunk)
        self._heads = {head: (tuple(numbers), head.forward) for head, numbers in heads.items()}
        self._parts = [module for part in (trunk, *heads) for module in part.modules()]
        self._slots = [(own, name) for each in self._parts for own in (each._parameters, each._buffers) for name in own]
        self._read: list[Any] = []
        self.replayed = Replayed(self._all, **{"most": MOST, "after": AFTER, **options})

    def run(self, images: Tensor) -> Any:
        _ready.found = {}
        if any(map(is_hooked, self._parts)):  # a replay calls nobody
            return self.inner(images)
        if (read := [state(own.get(name)) for own, name in self._slots]) != self._read:
            self.replayed.forget()  # weights that were exchanged are not where the graphs read them
            self._read = read
        levels, found = self.replayed(images)
        levels = _copied(levels)
        _ready.found = {id(head): (self._of(levels, head), _copied(out)) for head, out in found.items()}
        return levels

    def _all(self, images: Tensor) -> tuple[Any, dict[nn.Module, Any]]:
        levels = self.inner(images)
        return levels, {head: run(self._of(levels, head)) for head, (_, run) in self._heads.items()}

    def _of(self, levels: Any, head: nn.Module) -> list[Tensor]:
        leaves = tree_leaves(levels)
        return [leaves[number] for number in self._heads[head][0]]


class Behind(Override):
    """A head that may have run in the graph already."""

    def run(self, levels: Any, *args: Any, **named: Any) -> Any:
        given, out = getattr(_ready, "found", {}).pop(id(self.module), ((), None))
        alike = isinstance(levels, list | tuple) and [*map(id, levels)] == [*map(id, given)]
        return out if given and alike and not args and not named else self.inner(levels, *args, **named)


def _copied(values: Any) -> Any:
    return tree_map_only(Tensor, Tensor.clone, values)


def why_no_graph(device: torch.device, trunk: str | None) -> str | None:
    """Why nothing can be captured, in one clause; None where it may be.

    Args:
        device: of the model.
        trunk: what is captured, where it is known.
    """
    if device.type != "cuda":
        return f"it captures work of an NVIDIA GPU, and the model is on {device}"
    return None if trunk else "there is no telling which module makes levels of a batch of images"


def put_graphs(overrides: Overrides, trunk: nn.Module, heads: Mapping[nn.Module, Sequence[int]]) -> None:
    """Lets a detector replay its trunk, with the heads that are called with its levels."""
    overrides.put(Trunk(trunk, heads))
    for head in heads:
        overrides.put(Behind(head))
