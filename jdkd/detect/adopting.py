"""See :func:`adopt`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from jdkd.detect.contract import checked, losses_complaint
from jdkd.errors import InputError
from jdkd.nn.unwrapping import unwrapped

Losses = Callable[[Any, list[Tensor], list[dict[str, Tensor]]], Mapping[str, Tensor]]
Predict = Callable[[Any, list[Tensor]], Sequence[Mapping[str, Tensor]]]


def adopt(
    model: nn.Module, *, losses: Losses | None = None, predict: Predict | None = None, pyramid: str | None = None
) -> Adopted:
    """Puts a detector of another interface behind torchvision's, which is what everything here asks of a detector.

    Write a function that makes the detector and returns what this makes of it, and name that function wherever a model
    is asked for::

        # mypackage/mymodule.py
        import torch
        import torch.nn.functional as F
        from jdkd.detect import adopt
        from elsewhere import DenseDetector  # of a batch [N, 3, 320, 320]; boxes in fractions of the image

        def batch(images):
            return torch.cat([F.interpolate(image[None], (320, 320), mode="bilinear") for image in images])

        def losses(model, images, targets):
            boxes = [t["boxes"] / scale(image) for image, t in zip(images, targets)]
            output = model(batch(images), boxes, labels=[t["labels"] - 1 for t in targets])
            return {"loss_class": output.class_loss, "loss_box": 2 * output.box_loss}

        def predict(model, images):
            output = model(batch(images))
            return [
                {"boxes": boxes * scale(image), "labels": scores.argmax(1) + 1, "scores": scores.amax(1)}
                for image, boxes, scores in zip(images, output.boxes, output.scores)
            ]

        def scale(image):
            height, width = image.shape[1:]
            return image.new_tensor([width, height, width, height])

        def make():
            return adopt(DenseDetector(classes=20), losses=losses, predict=predict, pyramid="encoder.pyramid")

    ``jdkd inspect mypackage.mymodule:make`` then reads it, and ``--model mypackage.mymodule:make`` trains it. A
    detector that has torchvision's interface already is taken as it is, without this.

    Args:
        model: the detector; it becomes the child ``model`` of what is returned, so the names of its tensors begin
            with ``model.``.
        losses: ``losses(model, images, targets)``, called while training: the scalar losses by name, whose sum is
            trained on. By default the model is called itself. ``images`` are ``[3, H, W]`` floats in 0..1, of any
            sizes, on the model's device; ``targets`` have ``boxes`` [M, 4] xyxy in pixels and ``labels`` [M], from 1.
        predict: ``predict(model, images)``, called in evaluation mode: for every image its ``boxes`` [M, 4] xyxy in
            pixels of that image, ``labels`` [M] from 1 and ``scores`` [M]. By default the model is called itself.
        pyramid: dotted path, in ``model``, of the submodule that returns the levels of features; it is what
            distillation compares. By default what is called ``neck``, or else ``backbone``.

    Returns:
        The detector. Both functions are given the model anew each time, as one that was pruned is another module.

    Raises:
        InputError: an argument is none of what it may be, or a function holds on to the model instead of using the one
            that it is given; and, when it runs, what a function returns is not what is said here.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"adopt takes a torch.nn.Module, got a {type(model).__name__}.")
    model = unwrapped(model)
    _check_function("losses", losses, ("model", "images", "targets"), model)
    _check_function("predict", predict, ("model", "images"), model)
    if pyramid is not None and (
        not isinstance(pyramid, str) or pyramid not in dict(model.named_modules()) or not pyramid
    ):
        children = ", ".join(name for name, _ in model.named_children()) or "none"
        raise InputError(
            f"pyramid is {pyramid!r}, and the {type(model).__name__} has no submodule of that name; give a dotted path "
            f"of one that returns the levels of features (its children: {children})."
        )
    return Adopted(model, losses, predict, pyramid)


class Adopted(nn.Module):
    """A detector behind torchvision's interface; made by :func:`adopt`.

    Attributes:
        model: the detector inside.
        pyramid: path of what returns its levels of features, in this module; None: not said.
    """

    def __init__(
        self, model: nn.Module, losses: Losses | None, predict: Predict | None, pyramid: str | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.losses, self.predict = losses, predict
        self.pyramid = None if pyramid is None else f"model.{pyramid}"

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> dict[str, Tensor] | list[Mapping[str, Tensor]]:
        kind = type(self.model).__name__
        if not self.training:
            found = self.model(images) if self.predict is None else self.predict(self.model, images)
            return checked(found, images, f"predict of the adopted {kind}")
        if targets is None:
            raise InputError(
                f"the adopted {kind} is in training mode and was given no targets; give some, or eval() it."
            )
        found = self.model(images, targets) if self.losses is None else self.losses(self.model, images, targets)
        if complaint := losses_complaint(found, any(parameter.requires_grad for parameter in self.model.parameters())):
            raise InputError(
                f"losses of the adopted {kind} returned {complaint}; return the losses by name, each a tensor of one "
                "number, as torchvision's detectors do in training mode."
            )
        return {name: loss.reshape(()) for name, loss in found.items()}


def _check_function(name: str, function: Any, arguments: tuple[str, ...], model: nn.Module) -> None:
    """Refuses what cannot be called so, or would run the model that was adopted after it was rewritten."""
    if function is None:
        return
    called = f"{name}({', '.join(arguments)})"
    if not callable(function):
        raise InputError(f"{name} is a {type(function).__name__}; give a function that is called as {called}.")
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        raise InputError(f"{name} cannot be called as {called} ({error}); give a function that can.") from None
    except ValueError:  # a builtin that does not say how it is called
        pass
    own = {id(parameter) for parameter in model.parameters()}
    if any(id(parameter) in own for held in _held(function) for parameter in held.parameters()):
        raise InputError(
            f"{name} holds on to the {type(model).__name__} that is adopted, or to a part of it, and would run that "
            f"after it was pruned; use the model that it is called with, {called}."
        )


def _held(function: Any) -> Iterator[nn.Module]:
    """Modules that a function carries with it."""
    if isinstance(function, functools.partial):
        values = [function.func, *function.args, *function.keywords.values()]
    elif inspect.ismethod(function):
        values = [function.__self__, function.__func__]
    elif inspect.isfunction(function):
        values = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
        values += [
            *inspect.getclosurevars(function).nonlocals.values(),
            *inspect.getclosurevars(function).globals.values(),
        ]
    else:
        values = [function, *getattr(function, "__dict__", {}).values()]
    for value in values:
        if isinstance(value, nn.Module):
            yield value
        elif value is not function and (isinstance(value, functools.partial) or inspect.ismethod(value)):
            yield from _held(value)
