"""What a detector returns in training mode, with one more loss in it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from jdkd.errors import InputError

LOSS = "loss_pkd"
TOTAL = "loss"  # under this name Hugging Face's models return the sum of their losses, which is what trainers read


def with_loss(outputs: Any, loss: Tensor, who: str) -> Mapping[str, Any] | tuple[Any, ...]:
    """A detector's outputs, of the same type, with a loss added to them.

    Args:
        outputs: a mapping. Where it has an entry ``loss``, the total that is trained on, the loss is added to that;
            else all of it is losses, and this one comes beside them as ``loss_pkd``. Or a tuple that begins with the
            total, a scalar, or with several losses ``[K]`` that are followed by the same without gradients, ``[K]`` or
            by name, as Ultralytics' models return them for a sum and a log; there it becomes one more, ``[K + 1]``.
        loss: a scalar.
        who: what errors call the detector.

    Raises:
        InputError: these are neither a mapping with a total nor one of losses, nor such a tuple.
    """
    remedy = "use jdkd.distill.FeatureDistiller or jdkd.nn.PearsonTap in your training step"
    if isinstance(outputs, tuple) and _begins_with_losses(outputs):
        first = (
            outputs[0] + loss.to(outputs[0])
            if outputs[0].dim() == 0
            else torch.cat((outputs[0], loss[None].to(outputs[0])))
        )
        return outputs._replace(**{outputs._fields[0]: first}) if hasattr(outputs, "_fields") else (first, *outputs[1:])
    if not isinstance(outputs, Mapping):
        raise InputError(
            f"the student ({who}) returned a {type(outputs).__name__} in training mode, and attach adds {LOSS} to a "
            f"dict of losses; {remedy}"
        )
    if outputs.get(TOTAL) is not None:
        total = outputs[TOTAL]
        if not isinstance(total, Tensor) or total.numel() != 1:
            raise InputError(
                f"the student ({who}) returned {_described(total)} as its {TOTAL}, and attach adds to a "
                f"scalar; {remedy}"
            )
        return _changed(outputs, TOTAL, total + loss.to(total))
    if LOSS in outputs:
        raise InputError(
            f"the student ({who}) returned a loss {LOSS} of its own in training mode, and attach adds {LOSS}; {remedy}"
        )
    for name, value in outputs.items():
        if not _is_loss(value):
            raise InputError(
                f"the student ({who}) returned {_described(value)} as {name} and no {TOTAL} in training mode, and "
                f"attach adds {LOSS} to a dict of scalar losses; give it targets, so that it has a loss, or {remedy}"
            )
    return _changed(outputs, LOSS, loss)


def _begins_with_losses(outputs: tuple[Any, ...]) -> bool:
    first, second = (*outputs, None, None)[:2]
    if not (isinstance(first, Tensor) and first.is_floating_point() and len(outputs) > 1):
        return False
    if first.dim() == 0:
        return first.requires_grad or not torch.is_grad_enabled()
    log = [*second.values()] if isinstance(second, Mapping) else second if isinstance(second, Tensor) else ()
    return first.dim() == 1 and len(first) == len(log) and all(_is_logged(value) for value in log)


def _is_logged(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0 and not value.requires_grad


def _is_loss(value: Any) -> bool:
    """Whether that is a scalar, or a list of one a level, as OpenMMLab's heads return them."""
    if isinstance(value, list | tuple):
        return all(map(_is_loss, value))
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)


def _changed(outputs: Mapping[str, Any], name: str, value: Tensor) -> Mapping[str, Any]:
    changed = copy.copy(outputs) if isinstance(outputs, MutableMapping) else dict(outputs)
    changed[name] = value
    return changed


def _described(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
