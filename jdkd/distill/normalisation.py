"""How a detector normalises its images, read off it whatever framework it is from, and the way from one to another."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from jdkd.errors import InputError
from jdkd.nn.necks import head_of

SAME = "same"  # what stands for the other side's normalisation
ORDERS = ("rgb", "bgr")
IMAGENET = (0.485, 0.456, 0.406)  # means of red, green and blue
MOST_CHANNELS = 16  # a longer ``mean`` is that of something else
GENERIC = ("normalize", "normalizer", "normalise", "normalization", "preprocess", "preprocessor", "transform")
PROCESSORS = ("image_processor", "processor", "feature_extractor")


@dataclass(frozen=True)
class Normalisation:
    """Images as a backbone gets them: ``(scale * image - mean) / std`` of ``image`` in 0..1, its channels in ``order``.

    Args:
        mean, std: one number a channel, in the order of ``order``, or one for all.
        scale: what a white pixel is before ``mean`` is subtracted: 1 or 255.
        order: ``"rgb"`` or ``"bgr"``.
        source: where it was found, for errors.

    Raises:
        InputError: these are no such numbers.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1.0
    order: str = "rgb"
    source: str = field(default="as given", compare=False)

    def __post_init__(self) -> None:
        mean, std = _numbers(self.mean), _numbers(self.std)
        if mean is None or std is None or len({len(mean), len(std)} - {1}) > 1 or min(std) <= 0:
            raise InputError(
                f"a normalisation has mean {self.mean!r} and std {self.std!r}; give a finite number a channel for "
                "each, and std above 0"
            )
        count = max(len(mean), len(std))
        mean, std = mean * (count // len(mean)), std * (count // len(std))
        if len(set(zip(mean, std, strict=True))) == 1:
            mean, std = mean[:1], std[:1]
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)
        scale = _numbers(self.scale)
        if scale is None or len(scale) != 1 or scale[0] <= 0:
            raise InputError(f"a normalisation has scale {self.scale!r}; give what a white pixel is, 1 or 255")
        object.__setattr__(self, "scale", scale[0])
        order = self.order.lower() if isinstance(self.order, str) else self.order
        if order not in ORDERS:
            raise InputError(f"a normalisation has channel order {self.order!r}; choose one of {', '.join(ORDERS)}")
        object.__setattr__(self, "order", order)

    def __str__(self) -> str:
        mean, std = ([float(f"{value:.6g}") for value in values] for values in (self.mean, self.std))
        return f"mean {mean}, std {std}, white {self.scale:g}, {self.order} ({self.source})"

    def equals(self, other: Normalisation) -> bool:
        """Whether images are the same either way, up to how the numbers were rounded."""
        sides = [
            [value / one.scale for value in (*one.mean, *one.std)] + [float(ORDERS.index(one.order))]
            for one in (self, other)
        ]
        close = (math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-8) for a, b in zip(*sides, strict=False))
        return len(sides[0]) == len(sides[1]) and all(close)

    def raw(self) -> Normalisation:
        """Images that are yet to be normalised so."""
        return Normalisation((0.0,), (1.0,), self.scale, self.order, f"before {self.source}")


def normalisation_of(chain: Sequence[nn.Module], entrance: nn.Module, who: str) -> Normalisation | None:
    """How the images are normalised that reach ``entrance``, as far as any module says.

    Known are the ways of torchvision (``transform``), OpenMMLab (``data_preprocessor``), Hugging Face
    (``image_processor``), detectron2 (``pixel_mean``), a child with mean and std and no weights, such as a
    ``normalize`` module, the bare attributes ``image_mean`` or ``mean``, and, where nothing else is said, that images
    are in 0..1 for Ultralytics' models, and timm's ``pretrained_cfg`` of the backbone.

    Args:
        chain: the modules from the model down to the one whose child ``entrance`` is, or that it is.
        entrance: the module that the images go into.
        who: what errors call the model.

    Raises:
        InputError: two modules of the chain say different things.
    """
    found: list[Normalisation] = []
    for module in dict.fromkeys((*chain, entrance)):
        declared = next((one for one in _declared(module) if one is not None), None)
        if declared is not None:
            one, applied_inside = declared
            found.append(one.raw() if applied_inside and module is entrance else one)
    if any(not one.equals(found[0]) for one in found):
        raise InputError(
            f"the {who} normalises images in more than one place: {'; '.join(map(str, found))}; pass "
            f"{who}_normalisation, what its backbone gets in the end"
        )
    if found:
        return found[0]
    if any(head_of(module) for module in chain):
        return Normalisation((0.0,), (1.0,), source="its sequence of layers, as Ultralytics' models")
    names = ("pretrained_cfg", "default_cfg")
    configs = (getattr(module, name, None) for module in entrance.modules() for name in names)
    return next((one for one in map(_of_timm, configs) if one is not None), None)


def normalisation_from(given: Any, who: str) -> Normalisation:
    """What a caller gave: a :class:`Normalisation`, ``(mean, std, scale, order)``, or anything that holds them.

    Raises:
        InputError: it says nothing about normalisation.
    """
    if isinstance(given, Normalisation):
        return given
    if isinstance(given, Mapping) and {"mean", "std"} <= given.keys() <= {"mean", "std", "scale", "order"}:
        rest = {name: value for name, value in given.items() if name in ("scale", "order")}
        return Normalisation(given["mean"], given["std"], **({"scale": _white(given["mean"], given["std"])} | rest))
    if isinstance(given, tuple | list) and 2 <= len(given) <= 4:
        more = given[2:] or (_white(given[0], given[1]),)
        return Normalisation(given[0], given[1], *more)
    if not isinstance(given, str | Mapping | tuple | list | Tensor | None):
        readers = (_of_processor, _of_openmmlab if _turns(given) else _of_mean_and_std, _of_pixel_mean)
        found = (reader(given) for reader in readers)
        one = next((one for one in found if one is not None), None)
        one = one or next((entry[0] for entry in _declared(given) if entry is not None), None)
        if one is not None:
            return one
    raise InputError(
        f"{who}_normalisation is {given!r}; pass (mean, std), (mean, std, scale, order) with scale 1 or 255 and order "
        f"rgb or bgr, an image processor that holds them, or {SAME!r} where both get the same images"
    )


@dataclass(frozen=True)
class Conversion:
    """Brings images that one detector normalised to what another would have made of them.

    Args:
        ours: how they are normalised.
        theirs: how they shall be.

    Raises:
        InputError: the two are of different numbers of channels.
    """

    ours: Normalisation | None
    theirs: Normalisation | None

    def __post_init__(self) -> None:
        if self.ours and self.theirs and len({len(self.ours.mean), len(self.theirs.mean)} - {1}) > 1:
            raise InputError(
                f"the student's images have {self.ours} and the teacher's {self.theirs}; give both as many channels"
            )

    @property
    def is_needed(self) -> bool:
        """Whether the two differ, as far as is known."""
        return self.ours is not None and self.theirs is not None and not self.ours.equals(self.theirs)

    def __call__(self, batch: Tensor, inside: Tensor | None = None) -> Tensor:
        """Converts a batch.

        Args:
            batch: ``[N, C, H, W]``.
            inside: bool ``[N, H, W]``, False where the batch was padded after it had been normalised; by default
                rows and columns at the end that are 0 in every channel, where 0 is no colour that an image has.

        Returns:
            ``[N, C, H, W]``, 0 where padded; the batch itself if there is nothing to convert.
        """
        ours, theirs = self.ours, self.theirs
        if ours is None or theirs is None or not self.is_needed:
            return batch
        flips = ours.order != theirs.order
        images = batch if batch.is_floating_point() and batch.dtype.itemsize > 2 else batch.float()
        images = images.flip(1) if flips else images
        count = max(len(ours.mean), len(theirs.mean))
        mean, std = (values[::-1] if flips else values for values in (ours.mean, ours.std))
        mean, std, mean_t, std_t = (v * (count // len(v)) for v in (mean, std, theirs.mean, theirs.std))
        zoom = theirs.scale / ours.scale
        gain = [zoom * a / b for a, b in zip(std, std_t, strict=True)]
        offset = [(zoom * a - b) / c for a, b, c in zip(mean, mean_t, std_t, strict=True)]
        shape = (count, 1, 1)
        images = torch.addcmul(images.new_tensor(offset).view(shape), images, images.new_tensor(gain).view(shape))
        if not any(offset):
            return images
        if inside is None and any(ours.mean):
            inside = _not_padded(batch)
        return images if inside is None else images.where(inside[:, None], 0)


def conversion(ours: Normalisation | None, theirs: Normalisation | None, student: str, teacher: str) -> Conversion:
    """The way from the student's images to the teacher's.

    Raises:
        InputError: one says how it normalises and the other does not.
    """
    if (ours is None) != (theirs is None):
        known, unknown = ("student", "teacher") if theirs is None else ("teacher", "student")
        names = {"student": student, "teacher": teacher}
        raise InputError(
            f"the {known} ({names[known]}) normalises its images with {ours or theirs}, and nothing on the {unknown} "
            f"({names[unknown]}) says how its own are; pass {unknown}_normalisation=(mean, std, scale, order), or "
            f"{SAME!r} if both get the same images"
        )
    return Conversion(ours, theirs)


def _not_padded(batch: Tensor) -> Tensor:
    """``[N, H, W]``: False in the rows and columns at the end of each image that are 0 all over."""
    seen = (batch != 0).any(dim=1)  # [N, H, W]
    rows, columns = (seen.any(dim=dim).flip(1).cumsum(1).flip(1) > 0 for dim in (2, 1))  # [N, H], [N, W]
    return rows[:, :, None] & columns[:, None, :]


def _declared(module: Any) -> Iterator[tuple[Normalisation, bool] | None]:
    """What a module says, by every convention; and whether it normalises in its own forward."""
    yield _found(_of_openmmlab, getattr(module, "data_preprocessor", None), inside=False)
    for name in PROCESSORS:
        yield _found(_of_processor, getattr(module, name, None), inside=False)
    for name in GENERIC:
        yield _found(_of_mean_and_std, getattr(module, name, None), inside=True)
    for child in module.children() if isinstance(module, nn.Module) else ():
        if next(child.parameters(), None) is None:  # a step without weights, as in nn.Sequential(Normalize(...), model)
            yield _found(_of_colours, child, inside=True)
    yield _found(_of_pixel_mean, module, inside=True)
    yield _found(_of_mean_and_std, module, inside=True)


def _found(
    read: Callable[[Any], Normalisation | None], what: Any, *, inside: bool
) -> tuple[Normalisation, bool] | None:
    one = None if what is None else read(what)
    return None if one is None else (one, inside)


def _of_openmmlab(preprocessor: Any) -> Normalisation | None:
    """mmengine's ``ImgDataPreprocessor``: images of 0..255 that were read as BGR unless it turns their channels."""
    inner = getattr(preprocessor, "data_preprocessor", None)  # of several branches
    preprocessor = preprocessor if inner is None else inner
    turns = _turns(preprocessor)
    if not hasattr(preprocessor, "mean") and not hasattr(preprocessor, "_enable_normalize"):
        return None
    mean, std = (_numbers(getattr(preprocessor, name, None)) for name in ("mean", "std"))
    if mean is None or std is None:
        if getattr(preprocessor, "_enable_normalize", True):
            return None
        mean, std = (0.0,), (1.0,)
    if turns.get("rgb_to_bgr"):
        order = "bgr"
    else:
        order = "rgb" if any(turns.values()) else _order(mean, "bgr" if turns else "rgb")
    return Normalisation(mean, std, _white(mean, std, 255.0), order, f"its {type(preprocessor).__name__}")


def _turns(preprocessor: Any) -> dict[str, bool]:
    """Whether mmengine's preprocessor exchanges red and blue; empty for others."""
    names = ("_channel_conversion", "bgr_to_rgb", "rgb_to_bgr")
    return {name: bool(getattr(preprocessor, name)) for name in names if hasattr(preprocessor, name)}


def _of_processor(processor: Any) -> Normalisation | None:
    """Hugging Face's image processors: rescaled to 0..1, then normalised, each if it says so."""
    processor = getattr(processor, "image_processor", processor)
    mean, std = (_numbers(getattr(processor, name, None)) for name in ("image_mean", "image_std"))
    normalises = getattr(processor, "do_normalize", None)
    if normalises is False:
        mean, std = (0.0,), (1.0,)
    if mean is None or std is None:
        return None
    scale = 1.0
    if getattr(processor, "do_rescale", None):
        scale = 255.0 * float(getattr(processor, "rescale_factor", None) or 1 / 255)
        if getattr(processor, "rescale_offset", False):
            mean = tuple(value + 1 for value in mean)
    elif getattr(processor, "do_rescale", None) is False:
        scale = 255.0 if normalises is False else _white(mean, std, 255.0)
    if math.isclose(scale, 1.0):
        scale = 1.0
    order = "bgr" if getattr(processor, "do_flip_channel_order", False) else "rgb"
    return Normalisation(mean, std, scale, order, f"its {type(processor).__name__}")


def _of_pixel_mean(module: Any) -> Normalisation | None:
    """detectron2's models: buffers, for BGR images of 0..255 unless they say otherwise."""
    mean, std = (_numbers(getattr(module, name, None)) for name in ("pixel_mean", "pixel_std"))
    if mean is None or std is None:
        return None
    says = next((f for f in (getattr(module, name, None) for name in ("input_format", "image_format")) if f), None)
    order = says.lower() if isinstance(says, str) and says.lower() in ORDERS else _order(mean, "bgr")
    return Normalisation(mean, std, _white(mean, std, 255.0), order, "its pixel_mean")


def _of_mean_and_std(what: Any) -> Normalisation | None:
    """Anything with ``image_mean`` and ``image_std`` or ``mean`` and ``std``, or a composition with one such part."""
    for names in (("image_mean", "image_std"), ("mean", "std")):
        mean, std = (_numbers(getattr(what, name, None)) for name in names)
        if mean is not None and std is not None and max(len(mean), len(std)) <= MOST_CHANNELS:
            order = _order(mean, "rgb")
            return Normalisation(mean, std, _white(mean, std), order, f"its {type(what).__name__}")
    parts = tuple(what) if isinstance(what, nn.Sequential) else getattr(what, "transforms", None)
    parts = parts if isinstance(parts, list | tuple | nn.ModuleList) else ()
    return next((one for one in map(_of_mean_and_std, parts) if one is not None), None)


def _of_colours(what: Any) -> Normalisation | None:
    """The mean and std of a module of any name, if they are of grey or of three colours."""
    one = _of_mean_and_std(what)
    return one if one is not None and len(one.mean) in (1, 3) else None


def _of_timm(config: Any) -> Normalisation | None:
    read = config.get if isinstance(config, Mapping) else lambda name: getattr(config, name, None)
    mean, std = _numbers(read("mean")), _numbers(read("std"))
    if mean is None or std is None:
        return None
    return Normalisation(mean, std, source="its backbone's pretrained_cfg")


def _numbers(values: Any) -> tuple[float, ...] | None:
    """One number or several as a tuple; None for what is none."""
    if values is None or callable(values) or isinstance(values, str):
        return None
    try:
        numbers = torch.as_tensor(values, dtype=torch.float64).flatten().tolist()
    except (TypeError, ValueError, RuntimeError):
        return None
    return tuple(numbers) if numbers and all(map(math.isfinite, numbers)) else None


def _white(mean: Any, std: Any, usual: float = 1.0) -> float:
    """What white is for such numbers: means and deviations above 1 are of 0..255, fractions of 0..1."""
    mean, std = _numbers(mean) or (), _numbers(std) or ()
    if any(abs(value) > 1 for value in (*mean, *std)):
        return 255.0
    return 1.0 if any(mean) or any(value != 1 for value in std) else usual


def _order(mean: Sequence[float], usual: str) -> str:
    """The channel order that ImageNet's means betray, else the usual one."""
    if len(mean) == 3 and mean[0] != mean[2]:
        size = 255 if max(mean) > 1 else 1
        for order, known in (("rgb", IMAGENET), ("bgr", IMAGENET[::-1])):
            if all(abs(value / size - other) < 0.005 for value, other in zip(mean, known, strict=True)):
                return order
    return usual
