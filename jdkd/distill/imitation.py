"""Losses between two pyramids other than Pearson's, which stand in the place of its tap."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from jdkd.reference.pearson import match_size


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


class ChannelWiseDivergence:
    """Imitation by channel-wise distillation (CWD; Shu et al., ICCV 2021), in place of the Pearson tap.

    Of each channel of each image the values at all positions, divided by ``tau``, become a distribution by softmax;
    the loss is the Kullback-Leibler divergence of the student's from the teacher's, times ``tau`` squared, mean over
    channels and images.

    Args:
        loss_weight: weight of each level.
        tau: temperature.
    """

    def __init__(self, loss_weight: float, tau: float = 1.0) -> None:
        self.loss_weight, self.tau = loss_weight, tau

    def __call__(
        self, students: Sequence[Tensor], teachers: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Tensor, Tensor]:
        """The levels ``[N, C, H, W]`` as they are, the loss, and its part by level ``[L]``."""
        pairs = (match_size(*pair, resize_stu=False) for pair in zip(students, teachers, strict=True))
        losses = self.loss_weight * torch.stack([self._divergence(*pair) for pair in pairs])
        return students, losses.sum(), losses.detach()

    def _divergence(self, ours: Tensor, theirs: Tensor) -> Tensor:
        with torch.autocast(ours.device.type, enabled=False):
            said, taught = ((level.float() / self.tau).flatten(2).log_softmax(2) for level in (ours, theirs))
            channels = said.shape[0] * said.shape[1]
            return F.kl_div(said, taught, reduction="sum", log_target=True) * (self.tau**2 / channels)
