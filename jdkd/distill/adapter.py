"""1x1 convolutions from a student's channels to its teacher's, that begin as the best linear prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from jdkd.distill.regression import Solution
from jdkd.errors import InputError


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


def _convolution(weights: Tensor, offsets: Tensor, *, bias: bool) -> nn.Conv2d:
    outputs, inputs = weights.shape
    convolution = nn.utils.skip_init(nn.Conv2d, inputs, outputs, 1, bias=bias, device=weights.device)
    with torch.no_grad():
        convolution.weight.copy_(weights[:, :, None, None])
        if bias:
            convolution.bias.copy_(offsets)
    return convolution
