"""The Pearson distillation loss as a module."""

from __future__ import annotations

from torch import Tensor, nn

from jdkd.functional import pkd_loss
from jdkd.reference.pearson import Features


class PKDLoss(nn.Module):
    """See :func:`jdkd.functional.pkd_loss`. It has no parameters and no buffers.

    Args:
        loss_weight: factor of the loss; the paper's two-stage detectors use 6, its dense ones 10.
        resize_stu: where sizes differ, resize the student's level (True) or the teacher's (False).
    """

    def __init__(self, loss_weight: float = 1.0, resize_stu: bool = True) -> None:
        super().__init__()
        self.loss_weight = loss_weight
        self.resize_stu = resize_stu

    def forward(self, student: Features, teacher: Features) -> Tensor:
        """See :func:`jdkd.functional.pkd_loss`."""
        return pkd_loss(student, teacher, self.loss_weight, self.resize_stu)

    def extra_repr(self) -> str:
        return f"loss_weight={self.loss_weight}, resize_stu={self.resize_stu}"
