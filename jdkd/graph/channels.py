"""The channels that a trace meets: one number each, with what couples them and what keeps them from changing."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Axis(NamedTuple):
    """One dimension of one parameter or buffer; its channels are numbered from ``first`` on.

    Args:
        tensor: name in the model's state.
        dim: which of its dimensions.
        first: number of its first channel.
        size: how many channels it has.
    """

    tensor: str
    dim: int
    first: int
    size: int

    @property
    def numbers(self) -> np.ndarray:
        """Its channels: ``[size]``."""
        return np.arange(self.first, self.first + self.size)


class Channels:
    """Numbers the channels of every axis, and remembers which are coupled, read, written, and frozen."""

    def __init__(self) -> None:
        self.axes: list[Axis] = []
        self.count = 0
        self.roles: dict[tuple[str, int], str] = {}
        self._edges: list[np.ndarray] = []  # [2, E] each
        self._frozen: list[tuple[np.ndarray, str]] = []

    def axis(self, tensor: str, dim: int, size: int) -> np.ndarray:
        """Numbers for an axis that is new: ``[size]``."""
        self.axes.append(Axis(tensor, dim, self.count, size))
        return self._fresh(size)

    def constant(self, size: int, reason: str) -> np.ndarray:
        """Numbers for positions that belong to no parameter and cannot change: ``[size]``."""
        numbers = self._fresh(size)
        self.freeze(numbers, reason)
        return numbers

    def couple(self, one: np.ndarray, other: np.ndarray) -> None:
        """Channels at equal places live and die together; the two broadcast against each other."""
        one, other = np.broadcast_arrays(one, other)
        pairs = np.stack((one.ravel(), other.ravel()))
        pairs = pairs[:, pairs[0] != pairs[1]]
        if pairs.size:
            self._edges.append(np.unique(pairs, axis=1))

    def freeze(self, numbers: np.ndarray, reason: str) -> None:
        """These channels, and all that are coupled to them, keep their places."""
        if numbers.size:
            self._frozen.append((np.unique(numbers), reason))

    def play(self, numbers: np.ndarray, role: str) -> None:
        """The axes that these channels belong to are read (``"in"``) or written (``"out"``) by a product."""
        firsts = [axis.first for axis in self.axes]
        for place in np.unique(np.searchsorted(firsts, np.unique(numbers), side="right") - 1):
            axis = self.axes[place]
            if place >= 0 and numbers.min() < axis.first + axis.size:
                self.roles[axis.tensor, axis.dim] = role

    def components(self) -> np.ndarray:
        """For every channel the number of the component that it is coupled into: ``[count]``."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        one, other = np.concatenate([np.empty((2, 0), dtype=np.int64), *self._edges], axis=1)
        graph = coo_array((np.ones(len(one), dtype=np.int8), (one, other)), shape=(self.count, self.count))
        return connected_components(graph, directed=False)[1]

    def reasons(self, component: np.ndarray) -> dict[int, str]:
        """What keeps components from changing, by their numbers; of several reasons the one found first."""
        reasons: dict[int, str] = {}
        for numbers, reason in self._frozen:
            for root in np.unique(component[numbers]).tolist():
                reasons.setdefault(root, reason)
        return reasons

    def _fresh(self, size: int) -> np.ndarray:
        numbers = np.arange(self.count, self.count + size)
        self.count += size
        return numbers
