"""See :class:`Regression`."""

from __future__ import annotations

import torch
from torch import Tensor

from jdkd.reference.pearson import CONSTANT

TINY = 1e-30  # keeps a student whose channels are all constant solvable
Solution = tuple[Tensor, Tensor]  # weights [C_t, C_s] and bias [C_t]


class Regression:
    """The least squares of a teacher's level on a student's, over batches, in float64.

    Args:
        prior: ``[C_t, C_s]``, the weights that few positions leave as they are.
    """

    def __init__(self, prior: Tensor) -> None:
        self.prior = prior.double()
        self.count = 0
        self._means = self._products = self.prior.new_zeros(())  # [C_s + C_t]; [C_s + C_t, C_s + C_t], centred

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        """Takes in a pair of levels ``[N, C, H, W]``."""
        values = torch.cat([level.double().transpose(0, 1).flatten(1) for level in (ours, theirs)])  # [C_s + C_t, M]
        means = values.mean(1)
        values = values - means[:, None]
        self._join(values.shape[1], means, values @ values.mT)

    def joined(self, other: Regression) -> Regression:
        """That over the positions of both."""
        both = Regression(self.prior)
        for part in (self, other):
            if part.count:
                both._join(part.count, part._means, part._products)
        return both

    def is_finite(self) -> bool:
        """Whether all values that were taken in are finite."""
        return bool(self._products.isfinite().all())

    def solved(self) -> Solution:
        """Weights ``[C_t, C_s]`` and bias ``[C_t]``: a ridge regression towards the prior.

        Its strength is as if every channel of the student had been seen once more by itself: next to nothing where a
        level has many positions, and enough where it has fewer than channels.
        """
        inner, cross = self._covariances()
        ridge = inner.diagonal().sum() / self.count
        system = inner + torch.eye(len(inner), dtype=inner.dtype, device=inner.device) * ridge.clamp(min=TINY)
        weights = self.prior + torch.linalg.solve(system, cross - self.prior @ inner, left=False)
        width = len(inner)
        return weights, self._means[width:] - weights @ self._means[:width]

    def correlation(self) -> Tensor:
        """``[C_t, C_s]``, Pearson's r between every channel of the teacher and every one of the student."""
        _, cross = self._covariances()
        ours, theirs = self._variances()
        squares = theirs[:, None] * ours
        return torch.where(squares > 0, cross / squares.sqrt(), 0.0)

    def explained_by(self, weights: Tensor) -> Tensor:
        """``[C_t]``, Pearson's r between the teacher's channels and what weights ``[C_t, C_s]`` predict them to be."""
        inner, cross = self._covariances()
        predicted = (weights @ inner * weights).sum(1)  # [C_t], their variances
        squares = predicted * self._variances()[1]
        return torch.where(squares > 0, (weights * cross).sum(1) / squares.sqrt(), 0.0)

    def distance(self) -> float:
        """Mean of 1 - r over the teacher's channels, r being Pearson's between them and their prediction."""
        return float((1 - self.explained_by(self.solved()[0])).mean())

    def _join(self, count: int, means: Tensor, products: Tensor) -> None:
        """Chan, Golub and LeVeque (1983)."""
        both, gap = self.count + count, means - self._means
        self._products = self._products + products + gap[:, None] * gap * (self.count * count / both)
        self._means = self._means + gap * (count / both)
        self.count = both

    def _covariances(self) -> tuple[Tensor, Tensor]:
        """``[C_s, C_s]`` of the student's channels, and ``[C_t, C_s]`` of the teacher's with them."""
        width, covariance = self.prior.shape[1], self._products / self.count
        return covariance[:width, :width], covariance[width:, :width]

    def _variances(self) -> tuple[Tensor, Tensor]:
        """``[C_s]`` and ``[C_t]``; 0 where a channel is constant but for rounding."""
        variances = self._products.diagonal() / self.count
        moves = variances > (CONSTANT * self._means).square()
        width = self.prior.shape[1]
        return tuple(torch.where(moves, variances, 0.0).split([width, len(variances) - width]))
