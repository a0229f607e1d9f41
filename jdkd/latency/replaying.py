"""See :class:`Replayed`."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Captured = tuple[Any, Tensor, Any]
"""A graph, what it reads, and what it writes."""


def captured(call: Callable[[Tensor], Any], images: Tensor) -> Captured:
    """Runs a call three times, and once more for a CUDA graph.

    Args:
        call: takes and returns tensors on a GPU.
        images: kept as what the graph reads.
    """
    side = torch.cuda.Stream(images.device)
    side.wait_stream(torch.cuda.current_stream(images.device))
    with torch.cuda.stream(side):
        for _ in range(3):
            call(images)
    torch.cuda.current_stream(images.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(images.device)):  # torch's own is of one device for ever
        out = call(images)
    return graph, images, out


class Replayed:
    """A call that is captured once for every size of a batch and replayed from then on.

    What it returned last for a size is overwritten.

    Args:
        call: takes a batch ``[N, 3, H, W]`` on a GPU.
        most: sizes to keep; the one that was not used for longest goes.
        after: how often a size must have been seen until it is captured; before that the call runs as it is.
        capture: makes a graph, see :func:`captured`.
    """

    def __init__(
        self,
        call: Callable[[Tensor], Any],
        *,
        most: int | None = None,
        after: int = 1,
        capture: Callable[[Callable[[Tensor], Any], Tensor], Captured] = captured,
    ) -> None:
        self._call, self._most, self._after, self._capture = call, most, after, capture
        self._seen: Counter[Any] = Counter()
        self._graphs: OrderedDict[Any, Captured] = OrderedDict()

    def __call__(self, images: Tensor) -> Any:
        key = tuple(images.shape), images.dtype, images.device
        if key not in self._graphs:
            self._seen[key] += 1
            if self._seen[key] < self._after:
                return self._call(images)
            if self._most is not None and len(self._graphs) >= self._most:
                forgotten, _ = self._graphs.popitem(last=False)
                del self._seen[forgotten]
            self._graphs[key] = self._capture(self._call, images.clone())
        self._graphs.move_to_end(key)
        graph, inside, out = self._graphs[key]
        inside.copy_(images)
        graph.replay()
        return out

    def sizes(self) -> list[tuple[int, ...]]:
        """The sizes of batches that there are graphs of, the one used last at the end."""
        return [shape for shape, _, _ in self._graphs]

    def forget(self) -> None:
        """Drops all graphs, whose weights have changed."""
        self._graphs.clear()
        self._seen.clear()
