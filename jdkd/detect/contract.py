"""What is asked of a detector: torchvision's interface."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from jdkd.errors import InputError, said
from jdkd.nn.unwrapping import unwrapped
from jdkd.notices import say_once

FOUND = {"boxes": "[M, 4]", "labels": "[M]", "scores": "[M]"}
EXTRA_HEADS = {"masks": "mask_predictor", "keypoints": "keypoint_predictor"}
"""What torchvision's detectors train on besides boxes and labels, and the head that does."""


def not_scripted(model: nn.Module, what: str) -> None:
    """Refuses what ``torch.jit.script`` or ``trace`` made, whose layers cannot be told apart.

    Raises:
        InputError: ``model`` is or holds such a module; ``what`` begins the message.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(
                f"{what} cannot look into {name or 'the model'}, a scripted or traced module; give the module that it "
                "was made from, and script what comes out"
            )


def extra_targets(model: nn.Module) -> tuple[str, ...]:
    """What a detector trains on besides boxes and labels: ``"masks"``, ``"keypoints"``, both or nothing."""
    modules = list(model.modules())
    return tuple(
        target
        for target, head in EXTRA_HEADS.items()
        if any(isinstance(getattr(module, head, None), nn.Module) for module in modules)
    )


def detections(model: nn.Module, images: Sequence[Tensor]) -> list[Mapping[str, Tensor]]:
    """What a detector in evaluation mode finds on images, checked for torchvision's interface.

    Args:
        model: the detector; a scripted one, which returns (losses, detections), counts too.
        images: ``[3, H, W]`` floats in 0..1.

    Returns:
        For every image ``boxes`` [M, 4] xyxy in pixels, ``labels`` [M] whole numbers and ``scores`` [M]; from one with
        masks also ``masks`` [M, 1, H, W], how sure each pixel is in 0..1.

    Raises:
        InputError: the model does not take such images, or returns anything else.
    """
    kind = type(unwrapped(model)).__name__
    try:
        found = model(list(images))
    except (TypeError, AttributeError) as error:
        raise InputError(
            f"{kind} does not run on a list of images [3, H, W] ({said(error)}); give a detector that does, as "
            "torchvision's do, or wrap it in one"
        ) from error
    if isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Mapping) and isinstance(found[1], list):
        found = found[1]
    return checked(found, images, kind)


def checked(found: Any, images: Sequence[Tensor], who: str) -> list[Mapping[str, Tensor]]:
    """What ``who`` returned for images ``[3, H, W]``, if it is what :func:`detections` says.

    Raises:
        InputError: it is anything else.
    """
    if not isinstance(found, list | tuple) or len(found) != len(images):
        length = f" of {len(found)}" if hasattr(found, "__len__") else ""
        raise InputError(
            f"{who} returned a {type(found).__name__}{length} for {len(images)} image(s); return one dictionary of "
            f"{', '.join(FOUND)} for every image, as torchvision's detectors do in evaluation mode"
        )
    for each, image in zip(found, images, strict=True):
        if complaint := _complaint(each, image.shape[-2:]):
            raise InputError(f"{who} returned {complaint}; give {', '.join(f'{k} {v}' for k, v in FOUND.items())}")
    return list(found)


def require_learner(model: nn.Module, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]]) -> None:
    """Refuses what does not train as torchvision's detectors do, by one forward of a copy of it.

    Args:
        model: the detector; it stays as it is.
        images: ``[3, H, W]`` floats in 0..1.
        targets: for every image, what it trains on.

    Raises:
        InputError: it has nothing to train, does not take images and targets, or returns no losses.
    """
    kind = type(unwrapped(model)).__name__
    remedy = (
        "give a detector whose forward(images, targets) returns its losses by name while it trains, as torchvision's "
        "do, or wrap it with jdkd.detect.adopt"
    )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"{kind} has no parameter that can be trained; {remedy}.")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            found = copy.deepcopy(model).train()(list(images), list(targets))
        except (TypeError, AttributeError, NotImplementedError) as error:
            reason = str(error).split("\n")[0]
            raise InputError(
                f"{kind} does not train on a list of images [3, H, W] and one of targets ({reason}); {remedy}."
            ) from error
        except Exception as error:  # it takes them; whether this batch and device suit it shows in training
            say_once(
                f"{kind} raised {said(error)} on a first trial of {len(images)} image(s); the training tries it again"
            )
            return
    if complaint := losses_complaint(found, trains=False):
        raise InputError(f"{kind} returned {complaint} while training; {remedy}.")


def losses_complaint(found: Any, trains: bool) -> str | None:
    """What of the losses is not as it should be."""
    if not isinstance(found, Mapping):
        return f"a {type(found).__name__}"
    if not found:
        return "no loss"
    for name, loss in found.items():
        if not isinstance(loss, Tensor):
            return f"a {type(loss).__name__} as {name}"
        if loss.numel() != 1 or not loss.is_floating_point():
            return f"a tensor {list(loss.shape)} of {loss.dtype} as {name}"
    if trains and torch.is_grad_enabled() and not any(loss.requires_grad for loss in found.values()):
        return f"{', '.join(map(str, found))}, of which none depends on a parameter that is trained"
    return None


def as_scalar(name: str, loss: Tensor) -> Tensor:
    """A loss in fp32 without dimensions; some detectors return theirs as ``[1]``.

    Raises:
        InputError: it has more values than one, or none.
    """
    if loss.numel() != 1:
        raise InputError(
            f"{name} is a tensor {list(loss.shape)}, and a loss is a scalar; let it be the sum or the mean."
        )
    return loss.float().reshape(())


@contextmanager
def capped(model: nn.Module, most: int | None) -> Iterator[None]:
    """Lets the detector make so many detections an image for a while; torchvision's name for it is everywhere one."""
    limited = () if most is None else model.modules()
    heads = [module for module in limited if isinstance(getattr(module, "detections_per_img", None), int)]
    before = [head.detections_per_img for head in heads]
    try:
        for head in heads:
            head.detections_per_img = most
        yield
    finally:
        for head, cap in zip(heads, before, strict=True):
            head.detections_per_img = cap


def _complaint(found: Any, size: Sequence[int]) -> str | None:
    """What of the detections of an image of a size (height, width) is not as it should be."""
    if not isinstance(found, Mapping):
        return f"a {type(found).__name__} for an image"
    if missing := [key for key in FOUND if not isinstance(found.get(key), Tensor)]:
        return f"no tensor of {' and '.join(missing)} for an image, but {', '.join(map(str, found)) or 'nothing'}"
    count = len(found["labels"]) if found["labels"].dim() else 1
    shapes = {key: list(found[key].shape) for key in FOUND}
    none = count == 0 and all(found[key].numel() == 0 for key in FOUND)
    if not none and shapes != {"boxes": [count, 4], "labels": [count], "scores": [count]}:
        return ", ".join(f"{key} {shape}" for key, shape in shapes.items())
    labels = found["labels"].dtype
    if not none and (labels.is_floating_point or labels.is_complex or labels == torch.bool):
        return f"labels of {labels}, which are no whole numbers"
    masks = found.get("masks")
    if masks is not None and not none and list(getattr(masks, "shape", ())) != [count, 1, *size]:
        shown = list(masks.shape) if isinstance(masks, Tensor) else f"in a {type(masks).__name__}"
        return f"masks {shown} where {[count, 1, *size]} is the shape of these"
    return None
