"""See :class:`RunningAverage`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from jdkd.nn.unwrapping import unwrapped


class RunningAverage:
    """An exponential running average of a model's weights and buffers (Polyak and Juditsky, 1992).

    Args:
        model: what is trained; a copy of it holds the average.
        decay: how much of the average stays at a step, once training has gone on for long.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay, self._now = decay, decay
        self._averaged = AveragedModel(unwrapped(model), multi_avg_fn=self._mix, use_buffers=True)

    def update(self, model: nn.Module, step: int) -> None:
        """Takes in the weights after a step, counted from 0."""
        self._now = min(self._decay, (1 + step) / (10 + step))
        self._averaged.update_parameters(unwrapped(model))

    def copy_to(self, model: nn.Module) -> None:
        """Gives a model the average."""
        unwrapped(model).load_state_dict(self._averaged.module.state_dict())

    def state_dict(self) -> dict[str, Any]:
        return self._averaged.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._averaged.load_state_dict(state)

    def _mix(self, averaged: list[Tensor], now: list[Tensor], count: Any) -> None:
        get_ema_multi_avg_fn(self._now)(averaged, now, count)
