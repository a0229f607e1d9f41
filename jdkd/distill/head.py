"""Distillation through the box head: what the teacher would have said of the student's regions."""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jdkd.distill.feature import as_weight
from jdkd.distill.gradients import check_gradient
from jdkd.distill.hooks import Hook
from jdkd.distill.teacher import TeacherRunner
from jdkd.errors import InputError
from jdkd.nn.unwrapping import unwrapped


class HeadDistiller:
    """Class logits of the regions that the student sampled, against the teacher's for the same regions.

    The teacher pools its own features at the student's regions and classifies them; the loss is the mean
    Kullback-Leibler divergence over regions at temperature 1, whose gradient is that of the soft cross
    entropy (Hinton et al. 2015; for detectors Chen et al., NIPS 2017, section 3.1, here without their class
    weights).

    A context manager, used as :class:`jdkd.distill.feature.FeatureDistiller` is.

    Args:
        student, teacher: two-stage detectors as torchvision's, for the same classes.
        loss_weight: weight of the loss.
        runner: a shared runner of the teacher; by default its own.

    Raises:
        InputError: one of the two has no box head, or they know different numbers of classes.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        loss_weight: float = 1.0,
        runner: TeacherRunner | None = None,
    ) -> None:
        student, teacher = unwrapped(student), unwrapped(teacher)
        for who, model in (("student", student), ("teacher", teacher)):
            if not hasattr(model, "roi_heads"):
                raise InputError(
                    f"the {who} ({type(model).__name__}) has no roi_heads, and head distillation needs them "
                    "on both; distil its features only."
                )
        ours, theirs = (model.roi_heads.box_predictor.cls_score.out_features - 1 for model in (student, teacher))
        if ours != theirs:
            raise InputError(
                f"the student knows {ours} classes and the teacher {theirs}, and head distillation needs the "
                "same; distil the features only."
            )
        self.runner = runner or TeacherRunner(student, teacher)
        self.loss_weight = as_weight(loss_weight)
        self._hooks: list[Any] = []
        self._regions: tuple[list[Tensor], list[tuple[int, int]]] | None = None
        self._logits: Tensor | None = None  # [R, 1 + K]
        self._ran_with_gradients = False
        self._autocast: tuple[bool, torch.dtype] = False, torch.bfloat16  # during the student's forward

    def __enter__(self) -> Self:
        self.runner.__enter__()
        heads = self.runner.student.roi_heads
        self._hooks = [
            heads.box_roi_pool.register_forward_pre_hook(Hook(self._see_regions)),
            heads.box_predictor.register_forward_hook(Hook(self._see_logits)),
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._regions, self._logits = [], None, None
        self.runner.__exit__(*error)

    def loss(self) -> Tensor:
        """The loss of the student's last forward, a scalar in fp32; once per forward.

        Raises:
            RuntimeError: the student has not run since the last call.
            InputError: the loss is a constant, as no gradient can reach the student through its class logits.
        """
        if self._logits is None or self._regions is None:
            raise RuntimeError("the student has not run since the last loss(): call it first, inside the with block")
        (regions, sizes), logits = self._regions, self._logits
        self._regions = self._logits = None
        if self._ran_with_gradients:
            check_gradient(logits, self.runner.student, "class logits", ran_with_gradients=True)
        enabled, dtype = self._autocast
        with torch.no_grad(), torch.autocast(logits.device.type, dtype, enabled):
            taught = self._taught(regions, sizes)
        divergence = F.kl_div(
            F.log_softmax(logits.float(), dim=1),
            F.log_softmax(taught.float(), dim=1),
            reduction="sum",
            log_target=True,
        )
        return divergence * (self.loss_weight / max(1, len(logits)))

    def _taught(self, regions: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        """The teacher's class logits ``[R, 1 + K]``; half precision is pooled in single, as autocast does."""
        heads, pyramid = self.runner.teacher.roi_heads, self.runner.teacher_pyramid
        like = next(heads.parameters())
        wide = torch.promote_types(like.dtype, torch.float32)
        levels = {name: level.to(wide) for name, level in pyramid.items()}
        pooled = heads.box_roi_pool(levels, [region.to(wide) for region in regions], sizes)  # [R, C, 7, 7]
        return heads.box_predictor(heads.box_head(pooled.to(like.dtype)))[0]

    def _see_regions(self, pool: nn.Module, inputs: tuple[Any, ...]) -> None:
        _, regions, sizes = inputs
        self._regions = [region.detach() for region in regions], list(sizes)

    def _see_logits(self, predictor: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        self._logits, self._ran_with_gradients = output[0], torch.is_grad_enabled()
        kind = output[0].device.type
        self._autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
