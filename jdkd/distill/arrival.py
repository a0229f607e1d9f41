"""What reaches a backbone when its detector is called with one colour: how its images are normalised in truth."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from jdkd.distill.normalisation import Normalisation
from jdkd.distill.route import Route
from jdkd.distill.student_input import StudentInput, parameters_of
from jdkd.errors import InputError
from jdkd.nn.modes import mode
from jdkd.nn.unwrapping import is_compiled, unwrapped
from jdkd.notices import say_once

COLOUR = (0.2, 0.5, 0.8)  # of the image that detectors are called with; no two channels alike
SIDE = 256  # of that image, in pixels; what pads to a multiple of a stride leaves it as it is
TOLERANCE = 0.02


@torch.no_grad()
def arrival(route: Route) -> tuple[float, ...] | None:
    """What a detector's backbone is given, a number a channel, when the detector is called with an image of one colour.

    The detector is called as torchvision's, detectron2's and those that take a batch are, in evaluation mode, and
    stopped in front of its backbone.

    Returns:
        None where nothing comes before the backbone, or there is no telling how the detector is called.
    """
    model = unwrapped(route.chain[0])
    if model is route.entrance or any(map(is_compiled, model.modules())):
        return None
    first = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), torch.zeros(()))
    image = torch.tensor(COLOUR, dtype=first.dtype, device=first.device)[:, None, None].expand(3, SIDE, SIDE)
    errors: list[Exception] = []
    try:
        with mode(model, training=False), torch.random.fork_rng(devices=[]):
            for given in ([image.clone()], image[None].clone(), [{"image": image.clone()}]):
                batch = _stopped_at(route.entrance, model.forward, given, errors)
                if batch is not None and batch.shape[1] == len(COLOUR):
                    return tuple(batch[0].flatten(1).float().median(dim=1).values.tolist())
    except NotImplementedError:  # an exported program, which has no modes
        return None
    if any(not isinstance(error, NotImplementedError) for error in errors):  # else it has no call at all
        say_once(
            f"what {type(model).__name__} gives its backbone was not checked, as no usual call of it gets there "
            f"({type(errors[0]).__name__}: {errors[0]!s:.120}); it is taken at its word"
        )
    return None


def check_arrival(route: Route, says: Normalisation | None, who: str, *, own_size: bool = False) -> tuple[float, ...]:
    """Refuses a detector whose backbone is given something else than it says.

    Args:
        route: the way of the images through it.
        says: how it says that its images are normalised; None: it says nothing.
        who: what errors call it.
        own_size: whether it is to be called with images in 0..1 itself, instead of its backbone with others.

    Returns:
        What its backbone is given for :data:`COLOUR`, that itself if there is no telling.

    Raises:
        InputError: it says one thing and does another.
    """
    seen = arrival(route)
    if seen is None or says is None or len(says.mean) not in (1, len(COLOUR)):
        return COLOUR if seen is None else seen
    expected = _normalised(says)
    allowed = [expected] if own_size else [COLOUR, expected, _normalised(says, as_given=True)]
    if not any(agree(seen, one) for one in allowed):
        kind = type(route.chain[-1]).__name__
        remedy = f"pass {who}_normalisation, what its backbone gets in the end"
        if own_size:
            remedy = (
                "with own_size it is called with images in 0..1 and has to normalise them itself; wrap it with "
                "jdkd.detect.adopt in functions that do, or leave own_size out"
            )
        raise InputError(
            f"the {who} ({kind}) says that its images have {says}, for a pixel of {_written(COLOUR)} therefore "
            f"{_written(expected)}, and called with such an image it gives its backbone {_written(seen)}; {remedy}"
        )
    return seen


def check_unsaid(ours: Route, theirs: Route) -> None:
    """Refuses a teacher that normalises its images in another way than its student, where neither says how.

    Args:
        ours, theirs: the ways of the images through student and teacher.

    Raises:
        InputError: the teacher changes the colours of an image on the way to its backbone, and the student not so; or
            one is of a kind whose images are normalised elsewhere.
    """
    pair = {"student": ours, "teacher": theirs}
    for who, route in pair.items():
        if processor := _elsewhere(route.chain):
            raise InputError(
                f"the images of the {who} ({type(route.chain[-1]).__name__}) are normalised by {processor}, no part of "
                f"it, and nothing says how; pass it as {who}_normalisation, or teacher_normalisation='same' if student "
                "and teacher get the same images"
            )
    student, teacher = (check_arrival(route, None, who) for who, route in pair.items())
    if agree(teacher, COLOUR) or agree(teacher, student):
        return
    raise InputError(
        f"the teacher ({type(theirs.chain[-1]).__name__}) changes its images on the way to its backbone, a pixel of "
        f"{_written(COLOUR)} to {_written(teacher)}, and the student ({type(ours.chain[-1]).__name__}) to "
        f"{_written(student)}; say how their backbones get them, student_normalisation and "
        "teacher_normalisation=(mean, std, scale, order)"
    )


def agree(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether two colours are the same, up to rounding in half precision."""
    return all(abs(a - b) <= TOLERANCE * (1 + abs(b)) for a, b in zip(ours, theirs, strict=True))


def _normalised(says: Normalisation, *, as_given: bool = False) -> tuple[float, ...]:
    """:data:`COLOUR` as a backbone gets it; ``as_given``: where it had been given in the scale and order wanted."""
    count = len(COLOUR)
    mean, std = (values * (count // len(values)) for values in (says.mean, says.std))
    colour = COLOUR if as_given or says.order == "rgb" else COLOUR[::-1]
    scale = 1.0 if as_given else says.scale
    return tuple((scale * value - m) / s for value, m, s in zip(colour, mean, std, strict=False))


def _stopped_at(entrance: nn.Module, call: Callable[[Any], Any], given: Any, errors: list[Exception]) -> Tensor | None:
    """The images that a module is called with; None where it is not, or with none. What it raises joins ``errors``."""
    found: list[StudentInput | None] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(StudentInput.of(parameters_of(module), args, kwargs))
        raise _Stopped

    hook = entrance.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        with warnings.catch_warnings(action="ignore"):  # of a call that nobody made
            call(given)
    except _Stopped:
        pass
    except Exception as error:  # somebody else's forward, called in one of three ways; what fails is no way to call it
        errors.append(error)
    finally:
        hook.remove()
    return found[0].images if found and found[0] is not None else None


class _Stopped(Exception): ...


def _elsewhere(chain: Sequence[nn.Module]) -> str | None:
    """What normalises the images of a detector outside of it, where its kind tells."""
    hugging_face = any(getattr(module, "main_input_name", None) == "pixel_values" for module in chain)
    return "its image processor" if hugging_face else None


def _written(colour: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:.3g}" for value in colour) + "]"
