"""1x1 convolutions from a student's channels to its teacher's, that begin as the best linear prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jdkd.distill.alignment import PyramidSnapshot, aligned_pairs
from jdkd.errors import InputError
from jdkd.reference.pearson import CONSTANT, match_size

Solution = tuple[Tensor, Tensor]  # weights [C_t, C_s] and bias [C_t]


class Adapters(nn.ModuleList):
    """One 1x1 convolution for every pair of levels, in float32; trained along with the student, and dropped afterwards.

    The adapter of PKD (Cao et al., NeurIPS 2022) and the regressor of FitNets (Romero et al., ICLR 2015), for widths
    that differ.

    Args:
        solutions: of every pair of levels, what the convolution begins as, see :meth:`Regression.solved`.
        bias: whether they add one, which Pearson's correlation does not see.
        trained: whether they have gradients; without, they are an alignment that stays as it was fitted.
    """

    def __init__(self, solutions: Sequence[Solution], *, bias: bool, trained: bool = True) -> None:
        super().__init__(_convolution(*solution, bias=bias) for solution in solutions)
        self.requires_grad_(trained)

    def forward(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> tuple[list[Tensor], Sequence[Tensor]]:
        """The student's levels ``[N, C_s, H, W]`` in the teacher's channels, and the teacher's as they are.

        Raises:
            InputError: these are not the levels that they were fitted to.
        """
        adapters = [cast(nn.Conv2d, adapter) for adapter in self]
        check_fitted(students, teachers, [(adapter.in_channels, adapter.out_channels) for adapter in adapters])
        device = students[0].device
        if adapters[0].weight.device != device:
            self.to(device)
        with torch.autocast(device.type, enabled=False):
            pairs = zip(adapters, students, strict=True)
            adapted = [adapter(level.to(adapter.weight.dtype)) for adapter, level in pairs]
        return adapted, teachers


def check_fitted(students: Sequence[Tensor], teachers: Sequence[Tensor], fitted: list[tuple[int, int]]) -> None:
    """Refuses levels of other numbers of channels than an alignment was fitted to.

    Args:
        students, teachers: levels ``[N, C, H, W]``.
        fitted: channels of student and teacher, of every pair.

    Raises:
        InputError: they differ.
    """
    found = [(ours.shape[1], theirs.shape[1]) for ours, theirs in zip(students, teachers, strict=True)]
    if found != fitted:
        raise InputError(
            f"the levels that are compared have {found} channels of student and teacher, and the adapters were "
            f"fitted to {fitted}; call calibrate(batches) anew for this pair"
        )


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


TINY = 1e-30  # keeps a student whose channels are all constant solvable


def _convolution(weights: Tensor, offsets: Tensor, *, bias: bool) -> nn.Conv2d:
    outputs, inputs = weights.shape
    convolution = nn.utils.skip_init(nn.Conv2d, inputs, outputs, 1, bias=bias, device=weights.device)
    with torch.no_grad():
        convolution.weight.copy_(weights[:, :, None, None])
        if bias:
            convolution.bias.copy_(offsets)
    return convolution


class SquaredError:
    """Imitation by the mean squared error (FitNets; Romero et al., ICLR 2015), in place of the Pearson tap.

    Args:
        loss_weight: weight of each level.
    """

    def __init__(self, loss_weight: float) -> None:
        self.loss_weight = loss_weight

    def __call__(
        self, students: Sequence[Tensor], teachers: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Tensor, Tensor]:
        """The levels ``[N, C, H, W]`` as they are, half the squared error, and its part by level ``[L]``."""
        pairs = (match_size(*pair, resize_stu=False) for pair in zip(students, teachers, strict=True))
        errors = [F.mse_loss(ours.float(), theirs.float()) / 2 for ours, theirs in pairs]
        losses = self.loss_weight * torch.stack(errors)
        return students, losses.sum(), losses.detach()


@torch.no_grad()
def explained(students: Sequence[PyramidSnapshot], teachers: Sequence[PyramidSnapshot]) -> float:
    """How much of a teacher's features an adapter could say in a student's: Pearson's r between the teacher's channels
    and their best linear prediction, mean over channels, then over levels.

    Args:
        students, teachers: what the two made of the same batches, see :func:`pyramids`.

    Raises:
        InputError: no level matches.
    """
    regressions: dict[tuple[int, int], Regression] = {}  # by stride and place among the pairs
    for ours, theirs in zip(students, teachers, strict=True):
        for place, pair in enumerate(aligned_pairs(ours, theirs, channels=None)):
            prior = pair.student.new_zeros(pair.teacher.shape[1], pair.student.shape[1])
            regressions.setdefault((pair.stride, place), Regression(prior)).add(pair.student, pair.teacher)
    return sum(1 - regression.distance() for regression in regressions.values()) / len(regressions)
