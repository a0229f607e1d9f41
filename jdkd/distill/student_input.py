"""What a student's backbone was given, and how to call another one with the same."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from jdkd.errors import InputError

IMAGES = ("pixel_values", "images", "image", "inputs", "input", "imgs", "img", "x")
MASKS = ("pixel_mask", "padding_mask", "mask", "masks")
BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
TARGETS = ("targets", "labels", "data_samples", "batch_data_samples")


@dataclass(frozen=True)
class StudentInput:
    """A batch as it went into a student's backbone, or into the student itself.

    Args:
        images: ``[N, C, H, W]``, detached.
        mask: ``[N, H, W]`` or ``[N, 1, H, W]``, which pixels are no padding, if it was given one.
        others: what else it was given, by the names of the parameters.
        name: of the parameter that the images were.
        sizes: height and width of every image, where it was given a list of them; ``images`` are padded then.
    """

    images: Tensor
    mask: Tensor | None = None
    others: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    sizes: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, names: Iterable[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> StudentInput | None:
        """Finds images and mask among the arguments of a call, by their shapes; None where there are no images.

        A mapping among them, as Ultralytics' models are trained with, is looked into.

        Args:
            names: of the parameters, in order.
            args, kwargs: of the call.
        """
        names = [*names, *map(str, range(len(args)))]  # of what goes into *args, the place
        named = dict(zip(names, args, strict=False)) | dict(kwargs)
        named |= {
            key: v for m in [*named.values()] if isinstance(m, Mapping) for key, v in m.items() if key not in named
        }
        four = {name: value for name, value in named.items() if isinstance(value, Tensor) and value.dim() == 4}
        usual = [name for name in IMAGES if name in four and four[name].shape[1] > 1]
        coloured = [name for name, value in four.items() if value.shape[1] == 3]
        name = next(iter((*usual, *coloured, *four)), None)
        if name is None:
            listed = next(((name, value) for name, value in named.items() if _is_list_of_images(value)), None)
            return None if listed is None else cls._of_list(*listed)
        images, others = four[name], {other: value for other, value in named.items() if other != name}
        shapes = {(images.shape[0], *images.shape[2:]), (images.shape[0], 1, *images.shape[2:])}
        masks = [(k, v) for k, v in others.items() if isinstance(v, Tensor) and tuple(v.shape) in shapes]
        mask = next((value == 0 if "padding" in other else value for other, value in masks), None)
        return cls(images.detach(), mask, others, name)

    @classmethod
    def _of_list(cls, name: str, listed: Sequence[Tensor]) -> StudentInput:
        """Of images ``[3, H, W]`` as torchvision's detectors take them, padded at the right and below."""
        sizes = tuple((image.shape[1], image.shape[2]) for image in listed)
        height, width = (max(sides) for sides in zip(*sizes, strict=True))
        images = listed[0].new_zeros(len(listed), listed[0].shape[0], height, width)
        mask = images.new_zeros(len(listed), height, width, dtype=torch.bool)
        for number, (image, (rows, columns)) in enumerate(zip(listed, sizes, strict=True)):
            images[number, :, :rows, :columns] = image.detach()
            mask[number, :rows, :columns] = True
        return cls(images, mask, {}, name, sizes)

    def as_list(self, images: Tensor) -> list[Tensor]:
        """Images ``[N, C, H, W]`` as the student was given its own, without the padding."""
        return [image[:, :rows, :columns] for image, (rows, columns) in zip(images, self.sizes, strict=True)]

    @property
    def inside(self) -> Tensor | None:
        """bool ``[N, H, W]``, True where the images are."""
        return None if self.mask is None else self.mask.reshape(-1, *self.images.shape[2:]) != 0

    def arguments_for(self, module: nn.Module, images: Tensor | list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What to call another backbone with: the images, the mask if it takes one, and what it cannot do without.

        Raises:
            InputError: it cannot do without something that the student was not given.
        """
        parameters = parameters_of(module)
        others = [name for name in parameters if name not in (*MASKS, *TARGETS)]
        name = next((name for name in (*IMAGES, self.name, *others) if name in parameters), None)
        if name is None:
            return (images,), {}
        given: dict[str, Any] = {}
        for other, parameter in parameters.items():
            required = parameter.default is inspect.Parameter.empty
            if other == name:
                given[other] = images
            elif other in MASKS and (required or self.mask is not None):
                given[other] = self._mask_for(other)
            elif required and other in self.others:
                given[other] = self.others[other]
            elif required and other in TARGETS:
                given[other] = None
            elif required:
                raise InputError(
                    f"the teacher's {type(module).__name__} wants {other} beside the images, which the student was not "
                    "given; name a teacher_neck inside a module that is called with images alone"
                )
        leading = takewhile(lambda name: name in given and parameters[name].kind in BY_PLACE, parameters)
        return tuple(given.pop(name) for name in tuple(leading)), given

    def _mask_for(self, name: str) -> Tensor:
        mask = self.images.new_ones(self.images[:, 0].shape, dtype=torch.long) if self.mask is None else self.mask
        return mask == 0 if "padding" in name else mask


def listed_images(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Sequence[Tensor]:
    """The list of images ``[3, H, W]`` among the arguments of a call; empty where there is none."""
    return next(filter(_is_list_of_images, (*args, *kwargs.values())), ())


def _is_list_of_images(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(isinstance(image, Tensor) and image.dim() == 3 and image.is_floating_point() for image in value)
        and len({image.shape[0] for image in value}) == 1
    )


def parameters_of(module: nn.Module) -> dict[str, inspect.Parameter]:
    """The parameters of a module's forward that have names."""
    many = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    try:
        parameters = inspect.signature(getattr(module, "_orig_mod", module).forward).parameters
    except (TypeError, ValueError):
        return {}
    return {name: parameter for name, parameter in parameters.items() if parameter.kind not in many}
