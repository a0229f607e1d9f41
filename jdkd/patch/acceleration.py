"""See :func:`accelerate`."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from jdkd._tuned import machine
from jdkd.detect.contract import not_scripted
from jdkd.detect.input_size import input_transform
from jdkd.errors import InputError, said
from jdkd.export.parity import Tolerance
from jdkd.latency.calls import check_images
from jdkd.latency.protocol import measure_quick
from jdkd.latency.statistics import Ratio
from jdkd.nn.unwrapping import unwrapped
from jdkd.patch.agreement import TOLERANCE, Difference, Reference
from jdkd.patch.convolutions import refusal
from jdkd.patch.overrides import Overrides
from jdkd.patch.plans import FUSED, INGREDIENTS, Plan, planned, structure_of

TIMING = {"rounds": 8, "max_seconds": 20.0}  # of each ingredient


@dataclass(frozen=True)
class Trial:
    """What came of an ingredient.

    Args:
        ingredient: one of :data:`jdkd.patch.INGREDIENTS`.
        kept: whether the model runs with it.
        reason: why, in one clause.
        ratio: latency with it over latency without it, both with what was kept before; None where it was not timed.
        difference: from the plain model; None where it was not run.
    """

    ingredient: str
    kept: bool
    reason: str
    ratio: Ratio | None = None
    difference: Difference | None = None


class Acceleration:
    """What :func:`accelerate` has done to a model, and the way back.

    Attributes:
        kept: the ingredients that it runs with.
        trials: what came of each.
        unfollowed: why code of some modules is not fused, by their paths: what it raised when it was followed.
        source: from where the choice comes: ``"checked on"`` or ``"checked and timed on"`` which device.
        ratio: its latency over that of the plain model; None where nothing was timed or kept.
        difference: from the plain model; None where nothing was kept.
    """

    def __init__(self, model: nn.Module, plan: Plan, trials: Sequence[Trial], source: str) -> None:
        self.trials, self.source = tuple(trials), source
        self.kept = tuple(trial.ingredient for trial in trials if trial.kept)
        self.unfollowed = plan.unfollowed
        self.ratio: Ratio | None = None
        self.difference: Difference | None = None
        self._overrides = Overrides()
        self._handles: list[RemovableHandle] = []
        self._places: list[tuple[nn.Module, str, nn.Module]] = []
        if self.kept:
            self._put(model, plan)

    def _put(self, model: nn.Module, plan: Plan) -> None:
        self._overrides = plan.put(model, self.kept)
        changed, guard = set(self._overrides.modules), _Guard(self)
        self._places = [
            (parent, name, child)
            for parent in model.modules()
            for name, child in parent.named_children()
            if child in changed
        ]
        self._handles = [
            model.register_forward_pre_hook(guard.enter, prepend=True, with_kwargs=True),
            model.register_forward_hook(guard.leave, always_call=True),
        ]

    def exchanged(self) -> str | None:
        """The name of a module that is another one than when the model was accelerated."""
        return next((name for parent, name, child in self._places if parent._modules.get(name) is not child), None)

    def restore(self) -> None:
        """Gives the model back as it was; may be called again."""
        self._overrides.remove()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def __str__(self) -> str:
        """A line an ingredient, one a module whose code could not be followed, and one for all that were kept."""
        lines = []
        for trial in self.trials:
            ratio = "" if trial.ratio is None else f"  {trial.ratio} of the time without"
            lines.append(f"{trial.ingredient:14} {'kept' if trial.kept else 'left out':9}{ratio}  {trial.reason}")
        lines += [f"{path} is not {FUSED}: {why}" for path, why in self.unfollowed.items()]
        total = "nothing kept" if not self.kept else f"{', '.join(self.kept)}"
        if self.ratio is not None:
            total += f": {self.ratio} of the plain model's latency"
        return "\n".join([*lines, f"{total}; {self.source}"])


class _Guard:
    """Refuses what an accelerated model is not for, and lets the rest run without gradients; a copy's does nothing."""

    def __init__(self, acceleration: Acceleration | None) -> None:
        self.acceleration = acceleration
        self._entered = threading.local()

    def enter(self, model: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        if self.acceleration is None:
            return
        stack = vars(self._entered).setdefault("stack", [])
        stack.append(torch.is_grad_enabled())
        if any(module.training for module in model.modules()):
            raise InputError(refusal("it is in training mode"))
        if (name := self.acceleration.exchanged()) is not None:
            raise InputError(refusal(f"its {name} is another module than then"))
        asked = (leaf for leaf in tree_leaves((args, named)) if isinstance(leaf, Tensor) and leaf.requires_grad)
        if torch.is_grad_enabled() and any(True for _ in asked):
            raise InputError(refusal("a gradient is asked of it"))
        torch.set_grad_enabled(False)

    def leave(self, model: nn.Module, args: Any, out: Any) -> None:
        if self.acceleration is not None:
            torch.set_grad_enabled(self._entered.stack.pop())

    def __deepcopy__(self, memo: dict[int, Any]) -> _Guard:
        return _Guard(None)

    def __reduce__(self) -> Any:
        return _Guard, (None,)


def accelerate(
    model: nn.Module,
    images: Sequence[Tensor] | None = None,
    *,
    ingredients: Sequence[str] = INGREDIENTS,
    timed: bool = True,
    tolerance: Tolerance = TOLERANCE,
    **timing: Any,
) -> Acceleration:
    """Makes a detector faster where it is, by what is seen equal and faster on this machine.

    The ingredients are tried in turn on copies that share the model's tensors: ``folded``, normalisations in the
    convolutions before them; ``channels_last``, weights channels-last; ``packed``, weights in the order in which oneDNN
    multiplies (CPU); ``fused``, a convolution with its normalisation, residual and ReLU in one pass; ``grouped``, heads
    that run once over all levels of a pyramid; ``graphs``, backbone, neck and heads in a CUDA graph for every size of a
    batch. One is kept if stages and detections agree with the plain model's, and the interval of its latency over that
    without it lies below 1. If all that were kept are not faster than the plain model, none is, and the model is left
    as it was.

    The model keeps its modules, its parameters and its ``state_dict()``: only what modules run is exchanged. Weights
    that are loaded or written are folded anew at the next call; after a write through ``.data`` or in inference mode,
    accelerate it again. Its forward computes no gradients and refuses training mode. A module that has hooks runs as it
    did, as long as it has them. A deep copy or a pickle is plain.

    Args:
        model: in eval mode, on the device and with the number of threads that it is to run with; of one that torch
            wraps (DDP, EMA), the one inside is changed.
        images: ``[3, H, W]``, uint8 or floats in 0..1, to compare and time on; by default one of noise, of the size
            to which the model resizes.
        ingredients: to try; always in the order of :data:`INGREDIENTS`.
        timed: whether the clock decides; without it all that agree are kept.
        tolerance: what counts as equal.
        timing: of :func:`jdkd.latency.measure_quick`, for each comparison; by default 8 rounds, at most 20 seconds.

    Returns:
        What was kept and why, and ``restore()``.

    Raises:
        InputError: the model trains, is scripted or accelerated already, cannot be copied or does not run on the
            images; or an ingredient is unknown.
    """
    model = _checked(model, ingredients)
    images = _drawn(model) if images is None else _on_host(images)
    plan = planned(_copy(model), images)
    compare = _Comparison(model, plan, images, tolerance, {**TIMING, **timing} if timed else None)
    trials = [compare.trial(name) for name in INGREDIENTS if name in ingredients]
    ratio = compare.all_together()
    if ratio is not None and not ratio.high < 1:
        together = f"all that were kept take {ratio} of the plain model's time"
        trials = [replace(each, kept=False, reason=together) if each.kept else each for each in trials]
    source = f"{'checked and timed' if timed else 'checked'} on {machine(plan.device)}"
    acceleration = Acceleration(model, plan, trials, source)
    if acceleration.kept:
        acceleration.ratio, acceleration.difference = ratio, compare.difference
    return acceleration


def restore(model: nn.Module) -> None:
    """Gives an accelerated model back as it was, for who does not hold what :func:`accelerate` returned.

    Args:
        model: as it was given there; one that is not accelerated stays as it is.
    """
    if (acceleration := _acceleration_of(unwrapped(model))) is not None:
        acceleration.restore()


class _Comparison:
    """Tries ingredients one after the other, each with those that were kept before it.

    Args:
        model: the model; it does not run.
        plan: of it.
        images: ``[3, H, W]`` on the host.
        tolerance: what counts as equal.
        timing: of :func:`jdkd.latency.measure_quick`; None keeps all that is equal.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, images: Sequence[Tensor], tolerance: Tolerance, timing: Any
    ) -> None:
        self._model, self._plan, self._images, self._tolerance, self._timing = model, plan, images, tolerance, timing
        self._kept: tuple[str, ...] = ()
        self._now = _copy(model)
        self._reference = Reference(_copy(model), images)
        self.difference: Difference | None = None

    def trial(self, ingredient: str) -> Trial:
        """Tries one, and keeps it if it is equal and faster."""
        if reason := self._plan.why_not(ingredient):
            return Trial(ingredient, False, reason)
        other = _copy(self._model)
        self._plan.put(other, (*self._kept, ingredient))
        found = self._reference.difference(other, self._tolerance)
        if found.reason:
            return Trial(ingredient, False, f"it is not equal: {found.reason}", None, found)
        ratio = self._ratio(self._now, other)
        if ratio is not None and not ratio.high < 1:
            return Trial(ingredient, False, "slower" if ratio.low > 1 else "no gain beyond noise", ratio, found)
        self._kept, self._now, self.difference = (*self._kept, ingredient), other, found
        return Trial(ingredient, True, "equal, not timed" if ratio is None else "equal and faster", ratio, found)

    def all_together(self) -> Ratio | None:
        """The latency of what was kept over that of the plain model."""
        return self._ratio(_copy(self._model), self._now) if self._kept else None

    def _ratio(self, before: nn.Module, after: nn.Module) -> Ratio | None:
        if self._timing is None:
            return None
        models = {"without": before, "with": after}
        return measure_quick(models, self._images, device=self._plan.device, **self._timing).ratio("with")


def _checked(model: nn.Module, ingredients: Sequence[str]) -> nn.Module:
    """The model inside wrappers, if it can be accelerated."""
    if not isinstance(model, nn.Module):
        raise InputError(f"accelerate takes a torch.nn.Module, got a {type(model).__name__}.")
    if unknown := set(ingredients) - set(INGREDIENTS):
        raise InputError(f"ingredients has {', '.join(sorted(map(str, unknown)))}; known are {', '.join(INGREDIENTS)}.")
    not_scripted(model, "accelerate")
    model = unwrapped(model)
    if _acceleration_of(model) is not None:
        raise InputError(f"this {type(model).__name__} is accelerated already; call restore() first.")
    training = next((name for name, module in model.named_modules() if module.training), None)
    if training is not None:
        raise InputError(
            f"{training or 'the model'} is in training mode, and accelerate is for inference; call model.eval() first, "
            "and accelerate it when it has been trained."
        )
    if not any(True for _ in model.parameters()):
        raise InputError(f"this {type(model).__name__} has no parameters, and nothing to accelerate.")
    return model


def _acceleration_of(model: nn.Module) -> Acceleration | None:
    owners = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    return next((owner.acceleration for owner in owners if isinstance(owner, _Guard) and owner.acceleration), None)


def _drawn(model: nn.Module) -> list[Tensor]:
    """One image of noise, of the size to which a model resizes."""
    transform = input_transform(model)
    if transform is None:
        raise InputError(
            f"this {type(model).__name__} does not say what size of images it is for; give accelerate some images."
        )
    size = transform.fixed_size or (int(transform.min_size[-1]), int(transform.max_size))
    return [torch.randint(256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))]


def _on_host(images: Sequence[Tensor]) -> list[Tensor]:
    if strangers := [type(image).__name__ for image in images if not isinstance(image, Tensor)]:
        raise InputError(f"images holds a {strangers[0]}; give tensors [3, H, W], uint8 or floats in 0..1.")
    check_images(images)
    return [image.cpu() for image in images]


def _copy(model: nn.Module) -> nn.Module:
    try:
        return structure_of(model)
    except Exception as error:  # whatever a module's own copying says
        raise InputError(
            f"this {type(model).__name__} cannot be copied ({said(error)}), and accelerate compares it with a copy; "
            "give one that copy.deepcopy takes."
        ) from error
