"""See :class:`Order`."""

from __future__ import annotations

import numpy as np

_SHUFFLE = 0  # the random stream of a seed that orders images; another decides flips
_KEPT = 4  # epochs whose shuffle is remembered


class Order:
    """Which images a training sees: epochs without end, each shuffled anew, cut into batches of images of one group.

    Images are walked through in the order of their epochs; each joins the batch that its group is filling, and a batch
    that is full comes next. So every image comes once an epoch, none is dropped, a batch may span epochs, and batch k
    is a function of (seed, k) that needs no batch before it. One group gives the epochs laid end to end.

    Args:
        size: number of images.
        batch: images a batch.
        seed: decides the shuffles.
        groups: [size] the group of each image from 0 on, such as by aspect ratio, so that a batch is padded little.
            A group that has less than a batch of images is none: all are one then.
    """

    def __init__(self, size: int, batch: int, seed: int, groups: np.ndarray | None = None) -> None:
        groups = np.zeros(size, dtype=np.int64) if groups is None else np.unique(groups, return_inverse=True)[1]
        if np.bincount(groups).min() < batch:
            groups = np.zeros(size, dtype=np.int64)
        self.groups, self.batch, self.seed = groups, batch, seed
        self._sizes = np.bincount(groups)  # [G]
        self._epochs: dict[int, tuple[list[np.ndarray], np.ndarray]] = {}

    def __getitem__(self, number: int) -> list[int]:
        """The images of a batch, by its number."""
        epoch = self._epoch_of(number)
        group, nth = self._epoch(epoch)[1][number - self._before(epoch)].tolist()
        places = np.arange(nth * self.batch, (nth + 1) * self.batch)  # in the group's epochs laid end to end
        epochs, ranks = np.divmod(places, self._sizes[group])
        return [int(self._epoch(each)[0][group][rank]) for each, rank in zip(epochs.tolist(), ranks, strict=True)]

    def _before(self, epoch: int) -> int:
        """How many batches are full before an epoch."""
        return int((epoch * self._sizes // self.batch).sum())

    def _epoch_of(self, number: int) -> int:
        """The epoch in which a batch is filled."""
        epoch = number * self.batch // len(self.groups)  # or a later one
        while self._before(epoch + 1) <= number:
            epoch += 1
        return epoch

    def _epoch(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """The shuffled images of each group, and [n, 2] the batches filled: group, and which of the group's it is."""
        if epoch not in self._epochs:
            shuffled = np.random.default_rng((self.seed, _SHUFFLE, epoch)).permutation(len(self.groups))
            streams, full = [], []
            for group, size in enumerate(self._sizes):
                walked = np.flatnonzero(self.groups[shuffled] == group)  # places in the epoch
                streams.append(shuffled[walked])
                count = epoch * size + np.arange(1, size + 1)  # images of the group up to each of them
                last = count % self.batch == 0
                full += zip(walked[last], [group] * last.sum(), count[last] // self.batch - 1, strict=True)
            while len(self._epochs) >= _KEPT:
                del self._epochs[next(iter(self._epochs))]
            self._epochs[epoch] = streams, np.array(sorted(full), dtype=np.int64).reshape(-1, 3)[:, 1:]
        return self._epochs[epoch]
