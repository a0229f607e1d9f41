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
        self._edges: list[np.ndarray] = []  # [2, E] each
        self._joined: list[np.ndarray] = []  # of these, between parameters that make one weight
        self._played: dict[str, list[np.ndarray]] = {"in": [], "out": []}
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

    def couple(self, one: np.ndarray, other: np.ndarray, *, one_weight: bool = False) -> None:
        """Channels at equal places live and die together; the two broadcast against each other.

        Args:
            one, other: channels.
            one_weight: whether they are of parameters that make one weight, and so are read and written together.
        """
        one, other = np.broadcast_arrays(one, other)
        pairs = np.stack((one.ravel(), other.ravel()))
        pairs = pairs[:, pairs[0] != pairs[1]]
        if pairs.size:
            self._edges.append(pairs)
            if one_weight:
                self._joined.append(pairs)

    def freeze(self, numbers: np.ndarray, reason: str) -> None:
        """These channels, and all that are coupled to them, keep their places."""
        if numbers.size:
            self._frozen.append((numbers.ravel(), reason))

    def play(self, numbers: np.ndarray, role: str) -> None:
        """The axes that these channels belong to are read (``"in"``) or written (``"out"``) by a product."""
        self._played[role].append(numbers.ravel())

    def roles(self) -> list[str]:
        """What every axis is to products: ``"in"``, ``"out"``, or ``"scale"`` where it is neither."""
        component = _components(self._joined, self.count)
        played = {}
        for role, numbers in self._played.items():
            played[role] = np.zeros(self.count, dtype=bool)
            played[role][component[np.concatenate([np.empty(0, dtype=np.int64), *numbers])]] = True
        found = []
        for axis in self.axes:
            roots = component[axis.first : axis.first + axis.size]
            found.append(next((role for role in ("in", "out") if played[role][roots].any()), "scale"))
        return found

    def components(self) -> np.ndarray:
        """For every channel the number of the component that it is coupled into: ``[count]``."""
        return _components(self._edges, self.count)

    def reasons(self, component: np.ndarray) -> dict[int, str]:
        """What keeps components from changing, by their numbers; of several reasons the one found first."""
        reasons: dict[int, str] = {}
        for numbers, reason in self._frozen:
            for root in dict.fromkeys(component[numbers].tolist()):
                reasons.setdefault(root, reason)
        return reasons

    def _fresh(self, size: int) -> np.ndarray:
        numbers = np.arange(self.count, self.count + size)
        self.count += size
        return numbers


def _components(edges: list[np.ndarray], count: int) -> np.ndarray:
    """The number of the connected component of each of ``count`` nodes, for edges ``[2, E]`` each."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    one, other = np.concatenate([np.empty((2, 0), dtype=np.int64), *edges], axis=1)
    graph = coo_array((np.ones(len(one), dtype=np.int8), (one, other)), shape=(count, count))
    return connected_components(graph, directed=False)[1]
