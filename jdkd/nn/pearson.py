"""The Pearson losses as modules; they have no parameters and no buffers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any, Self

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from jdkd.functional import dist_loss, pearson_tap, pkd_loss
from jdkd.reference.pearson import Features


class _Pearson(nn.Module):
    """What the Pearson losses of features are set to."""

    def __init__(
        self,
        loss_weight: float = 1.0,
        *,
        pairing: str = "index",
        levels: Sequence[int] | None = None,
        level_weights: Sequence[float] | None = None,
        statistics: str = "batch",
        zero_variance: str = "keep",
        group: ProcessGroup | None = None,
        return_levels: bool = False,
    ) -> None:
        super().__init__()
        self.loss_weight = loss_weight
        self.options: dict[str, Any] = {
            "pairing": pairing,
            "levels": tuple(levels) if isinstance(levels, Iterable) else levels,
            "level_weights": level_weights,
            "statistics": statistics,
            "zero_variance": zero_variance,
            "group": group,
            "return_levels": return_levels,
        }

    def __deepcopy__(self, memo: dict) -> Self:
        memo[id(self.options["group"])] = self.options["group"]  # processes cannot be copied, as an average needs it
        copy = type(self).__new__(type(self))
        copy.__dict__ = deepcopy(self.__dict__, memo)
        return copy

    def extra_repr(self) -> str:
        settings = {"loss_weight": self.loss_weight, **self.options}
        defaults = _Pearson.__init__.__kwdefaults__ or {}
        return ", ".join(f"{name}={value!r}" for name, value in settings.items() if value != defaults.get(name))


class PKDLoss(_Pearson):
    """See :func:`jdkd.functional.pkd_loss`.

    Args:
        loss_weight: factor of the loss; the paper's two-stage detectors use 6, its dense ones 10.
        resize_stu: where sizes differ, resize the student's level (True) or the teacher's (False).
        **options: pairing, levels, level_weights, statistics, zero_variance, group and return_levels of
            :func:`jdkd.functional.pkd_loss`.
    """

    def __init__(self, loss_weight: float = 1.0, resize_stu: bool = True, **options: Any) -> None:
        super().__init__(loss_weight, **options)
        self.resize_stu = resize_stu

    def forward(
        self,
        student: Features | None = None,
        teacher: Features | None = None,
        mask: Tensor | Sequence[Tensor] | None = None,
        *,
        preds_S: Features | None = None,
        preds_T: Features | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """See :func:`jdkd.functional.pkd_loss`."""
        names = {"preds_S": preds_S, "preds_T": preds_T}
        options = {"mask": mask, **names, **self.options}
        return pkd_loss(student, teacher, self.loss_weight, self.resize_stu, **options)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.resize_stu else ", resize_stu=False")


class PearsonTap(_Pearson):
    """See :func:`jdkd.functional.pearson_tap`: ``features, loss = tap(features, teacher_features)``.

    Args:
        loss_weight: factor of the loss; the paper's two-stage detectors use 6, its dense ones 10.
        **options: pairing, levels, level_weights, statistics, zero_variance, group and return_levels of
            :func:`jdkd.functional.pearson_tap`.
    """

    def forward(
        self, students: Features, teachers: Features, mask: Tensor | Sequence[Tensor] | None = None
    ) -> tuple[Features, Tensor] | tuple[Features, Tensor, Tensor]:
        """See :func:`jdkd.functional.pearson_tap`."""
        return pearson_tap(students, teachers, self.loss_weight, mask=mask, **self.options)


class DISTLoss(nn.Module):
    """See :func:`jdkd.functional.dist_loss`.

    Args:
        inter_loss_weight: factor of the relation between the classes of a sample.
        intra_loss_weight: factor of the relation between the samples of a class.
        tau: temperature.
    """

    def __init__(self, inter_loss_weight: float = 1.0, intra_loss_weight: float = 1.0, tau: float = 1.0) -> None:
        super().__init__()
        self.inter_loss_weight = inter_loss_weight
        self.intra_loss_weight = intra_loss_weight
        self.tau = tau

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """See :func:`jdkd.functional.dist_loss`; logits ``[B, K]``."""
        return dist_loss(student, teacher, self.inter_loss_weight, self.intra_loss_weight, self.tau)

    def extra_repr(self) -> str:
        return f"inter_loss_weight={self.inter_loss_weight}, intra_loss_weight={self.intra_loss_weight}, tau={self.tau}"
