"""1x1 convolutions from a student's channels to its teacher's, that begin as the best linear prediction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jdkd.distill.alignment import PyramidSnapshot, aligned_pairs
from jdkd.errors import InputError
from jdkd.reference.pearson import match_size


class Adapters(nn.ModuleList):
    """One 1x1 convolution for every pair of levels, in float32; trained along with the student, and dropped afterwards.

    The adapter of PKD (Cao et al., NeurIPS 2022) and the regressor of FitNets (Romero et al., ICLR 2015), for widths
    that differ.

    Args:
        regressions: of every pair of levels.
        bias: whether they add one, which Pearson's correlation does not see.
    """

    def __init__(self, regressions: Sequence[Regression], *, bias: bool) -> None:
        super().__init__(_convolution(*regression.solved(), bias=bias) for regression in regressions)

    def forward(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> list[Tensor]:
        """The student's levels ``[N, C_s, H, W]`` in the teacher's channels.

        Raises:
            InputError: these are not the levels that they were fitted to.
        """
        found = [(ours.shape[1], theirs.shape[1]) for ours, theirs in zip(students, teachers, strict=True)]
        fitted = [(adapter.in_channels, adapter.out_channels) for adapter in self]
        if found != fitted:
            raise InputError(
                f"the levels that are compared have {found} channels of student and teacher, and the adapters were "
                f"fitted to {fitted}; call fit_adapters(batches) anew for this pair"
            )
        kind = students[0].device.type
        with torch.autocast(kind, enabled=False):
            return [adapter(level.to(adapter.weight.dtype)) for adapter, level in zip(self, students, strict=True)]


class Regression:
    """The least squares of a teacher's level on a student's, over batches, in float64.

    Args:
        prior: ``[C_t, C_s]``, the weights that few positions leave as they are.
    """

    def __init__(self, prior: Tensor) -> None:
        self.prior = prior.double()
        self._count = 0
        self._shift: Tensor | None = None  # [C_s + C_t, 1]
        self._sums = self._products = prior.new_zeros((), dtype=torch.float64)  # [C_s + C_t], [C_s + C_t, C_s + C_t]

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        """Takes in a pair of levels ``[N, C, H, W]``."""
        values = torch.cat([level.double().transpose(0, 1).flatten(1) for level in (ours, theirs)])  # [C_s + C_t, M]
        self._shift = values.mean(1, keepdim=True) if self._shift is None else self._shift
        values = values - self._shift
        self._count += values.shape[1]
        self._sums = self._sums + values.sum(1)
        self._products = self._products + values @ values.mT

    def solved(self) -> tuple[Tensor, Tensor]:
        """Weights ``[C_t, C_s]`` and bias ``[C_t]``: a ridge regression towards the prior.

        Its strength is as if every channel of the student had been seen once more by itself: next to nothing where a
        level has many positions, and enough where it has fewer than channels.
        """
        width = self.prior.shape[1]
        covariance = self._covariance()
        inner, cross = covariance[:width, :width], covariance[width:, :width]
        ridge = inner.diagonal().sum() / self._count
        system = inner + torch.eye(width, dtype=inner.dtype, device=inner.device) * ridge.clamp(min=TINY)
        weights = self.prior + torch.linalg.solve(system, cross - self.prior @ inner, left=False)
        means = self._sums / self._count + self._shift[:, 0]
        return weights, means[width:] - weights @ means[:width]

    def distance(self) -> float:
        """Mean of 1 - r over the teacher's channels, r being Pearson's between them and their prediction."""
        width = self.prior.shape[1]
        covariance, (weights, _) = self._covariance(), self.solved()
        predicted = (weights @ covariance[:width, :width] * weights).sum(1)  # [C_t], their variances
        products = (weights * covariance[width:, :width]).sum(1)
        squares = predicted * covariance.diagonal()[width:]
        r = torch.where(squares > 0, products / squares.sqrt(), 0.0)
        return float((1 - r).mean())

    def _covariance(self) -> Tensor:
        means = self._sums / self._count
        return self._products / self._count - means[:, None] * means


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

    def __call__(self, students: list[Tensor], teachers: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
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
