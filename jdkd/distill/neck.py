"""Where a detector's pyramid comes out, and the way there from a batch of images."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from jdkd.errors import InputError
from jdkd.ops.pearson_pairs import rebuilt

NECKS = ("neck", "backbone")  # where a pyramid comes out in OpenMMLab's detectors, and in torchvision's

Pyramid = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


def find_neck(model: nn.Module, who: str, path: str | None = None) -> nn.Module:
    """The submodule that returns the pyramid.

    Args:
        model: a detector.
        who: what errors call it.
        path: its dotted name ("" is the model itself); by default ``neck``, or else ``backbone``.

    Raises:
        InputError: there is no such submodule.
    """
    for name in NECKS if path is None else (path,):
        with suppress(AttributeError):
            return model.get_submodule(name)
    children = ", ".join(name for name, _ in model.named_children()) or "none"
    wanted = " or ".join(NECKS) if path is None else path
    raise InputError(
        f"the {who} ({type(model).__name__}) has no submodule {wanted}; name the one that returns its pyramid with "
        f"{'teacher_neck' if who == 'teacher' else 'neck'}, a dotted path (its children: {children})"
    )


def entrance(model: nn.Module) -> nn.Module:
    """What the normalised images go into: the backbone of a detector that has one, else the whole model."""
    backbone = getattr(model, "backbone", None)
    return backbone if isinstance(backbone, nn.Module) else model


def run_to_neck(model: nn.Module, neck: nn.Module, batch: Tensor) -> Pyramid:
    """The pyramid of a batch of normalised images ``[N, 3, H, W]``; what comes after the neck does not run.

    Raises:
        InputError: the neck is not on the way of the images through the model.
    """
    first = entrance(model)
    if neck is first:
        return first(batch)
    caller = first if any(module is neck for module in first.modules()) else model
    hook = neck.register_forward_hook(_stop)
    try:
        caller(batch)
    except _Reached as reached:
        return reached.pyramid
    finally:
        hook.remove()
    raise InputError(
        f"{type(model).__name__} never called {type(neck).__name__}, which teacher_neck names, on a batch of images; "
        "name a submodule that it calls"
    )


def levels_of(pyramid: Pyramid) -> dict[str, Tensor]:
    """Name -> level ``[N, C, H, W]``; what is no such tensor is left out, and a sequence is named by index."""
    if isinstance(pyramid, Tensor):
        pyramid = [pyramid]
    named = pyramid if isinstance(pyramid, Mapping) else {str(i): level for i, level in enumerate(pyramid)}
    return {name: level for name, level in named.items() if isinstance(level, Tensor) and level.dim() == 4}


def with_levels(pyramid: Pyramid, before: Sequence[Tensor], after: Sequence[Tensor]) -> Pyramid:
    """The pyramid, of the same type, with some of its levels exchanged."""
    exchanged = {id(old): new for old, new in zip(before, after, strict=True)}
    if isinstance(pyramid, Tensor):
        levels = [pyramid]
    else:
        levels = list(pyramid.values() if isinstance(pyramid, Mapping) else pyramid)
    return rebuilt(pyramid, [exchanged.get(id(level), level) for level in levels])


class _Reached(Exception):
    def __init__(self, pyramid: Pyramid) -> None:
        super().__init__("the neck was reached")
        self.pyramid = pyramid


def _stop(neck: nn.Module, inputs: tuple[Any, ...], pyramid: Pyramid) -> None:
    raise _Reached(pyramid)
