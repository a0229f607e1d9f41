"""Both terms of distillation, over one forward of the teacher."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, Self, cast

from torch import Tensor, nn

from jdkd.distill.adapter import Adapters
from jdkd.distill.calibration import Agreements, Permutations
from jdkd.distill.feature import FeatureDistiller
from jdkd.distill.head import HeadDistiller
from jdkd.distill.teacher import TeacherRunner

TERMS = {"pearson": "loss_pkd", "mse": "loss_mse", "cwd": "loss_cwd"}


class Distiller:
    """Feature and head distillation from one teacher, whose backbone runs once per forward of the student.

    It runs during the student's forward, for the features; ``runner.enabled = False`` before a forward whose losses
    will not be asked for spares it.

    Args:
        student, teacher: detectors; see :class:`FeatureDistiller` and :class:`HeadDistiller`.
        feature_weight: weight of each level of the features' loss; 0 leaves the term out.
        head_weight: weight of the class logits; 0 leaves the term out. Ask :func:`can_distil_heads` first where the two
            may be of any kind.
        reuse: keep the teacher's features while the student is given the very same images, for several
            subnets in one step; see :class:`TeacherRunner`.
        own_size: the teacher sees the batch at its own input size instead of the student's.
        adapter: compare features through trained 1x1 convolutions, see :meth:`calibrate`; their parameters are
            :attr:`adapters`.
        align: ``"none"``, ``"permute"`` or ``"linear"``, for detectors of unrelated origin; see
            :class:`FeatureDistiller`, and call :meth:`calibrate`.
        imitation: of features, ``"pearson"``, ``"mse"`` or ``"cwd"``; see :class:`FeatureDistiller`.
        tau: temperature of ``"cwd"``.
        levels: strides of the levels of features to compare; by default all that both have.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        feature_weight: float = 6.0,
        head_weight: float = 0.0,
        reuse: bool = False,
        own_size: bool = False,
        adapter: bool = False,
        align: str = "none",
        imitation: str = "pearson",
        tau: float = 1.0,
        levels: Iterable[int] | None = None,
    ) -> None:
        self.adapts = adapter and bool(feature_weight)
        self.runner = runner = TeacherRunner(student, teacher, reuse=reuse, own_size=own_size)
        self.terms: dict[str, FeatureDistiller | HeadDistiller] = {}
        self._features: FeatureDistiller | None = None
        if feature_weight:
            how: dict[str, Any] = {"adapter": adapter, "align": align, "imitation": imitation, "tau": tau}
            how |= {"levels": levels, "runner": runner}
            self._features = FeatureDistiller(student, teacher, loss_weight=feature_weight, **how)
            self._term = TERMS[imitation]
            self.terms[self._term] = self._features
        if head_weight:
            self.terms["loss_head_kd"] = HeadDistiller(student, teacher, loss_weight=head_weight, runner=runner)
        self._entered = ExitStack()

    @property
    def adapters(self) -> Adapters | Permutations | None:
        """What stands between the channels of both, once it is fitted; with ``fit(..., auxiliary=distiller.adapters)``
        it is trained with the student, if it is to be, and a resumed run has the same.
        """
        return None if self._features is None else self._features.adapters

    def calibrate(self, batches: Iterable[Any], call: Callable[[Any], Any] | None = None) -> Agreements:
        """See :meth:`FeatureDistiller.calibrate`; without a loss of features there is nothing to bring together."""
        return Agreements({}, "none") if self._features is None else self._features.calibrate(batches, call)

    def parts(self) -> dict[str, Tensor]:
        """What the loss of features was in the student's last forward, by level; ``fit(..., parts=distiller.parts)``.

        Returns:
            ``"loss_pkd of stride 8"`` and so on -> a scalar without gradients.
        """
        features = self._features if self.runner.enabled else None
        losses = {} if features is None else features.level_losses
        return {f"{self._term} of stride {stride}": loss for stride, loss in losses.items()}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for term in self.terms.values():
                stack.enter_context(term)
            self._entered = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.__exit__(*error)

    def losses(self) -> dict[str, Tensor]:
        """The terms of the student's last forward, to be added to its own losses; once per forward."""
        return {name: term.loss() for name, term in self.terms.items()}

    def loss(self) -> Tensor:
        """Their sum."""
        return cast(Tensor, sum(self.losses().values()))
