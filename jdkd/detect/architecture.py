"""The architecture that a detector carries, and the classes in it."""

from collections.abc import Sequence

from torch import nn

from jdkd.errors import InputError, few
from jdkd.nn.unwrapping import unwrapped
from jdkd.rewrite import Architecture


def architecture_of(model: nn.Module, what: str) -> Architecture:
    """The architecture that a detector carries, wrapped or not.

    Args:
        model: anything.
        what: who asks, as the message begins.

    Raises:
        InputError: it carries none.
    """
    if (known := known_architecture(model)) is None:
        raise InputError(
            f"{what} takes a detector that carries its architecture, and this {type(unwrapped(model)).__name__} has "
            "none: open it with jdkd.detect.open_model(NAME or 'package.module:function'), or set model.architecture "
            "to jdkd.rewrite.describe(model, 'package.module:function')"
        )
    return known


def known_architecture(model: nn.Module) -> Architecture | None:
    """The architecture that a detector carries, wrapped or not; None where it carries none."""
    known = getattr(unwrapped(model), "architecture", None)
    return known if isinstance(known, Architecture) else None


def identity(model: nn.Module) -> str | None:
    """The id of a detector's architecture, 64 hexadecimal digits; None where it carries none."""
    known = known_architecture(model)
    return known.id if known else None


def require_classes(model: nn.Module, who: str, classes: tuple[str, ...], where: object) -> None:
    """Refuses a detector of other classes than the data's, or of unknown ones.

    Args:
        model: the detector.
        who: what errors call it.
        classes: of the data.
        where: what errors call these: the file of their annotations.

    Raises:
        InputError: they are not the same in the same order.
    """
    known = architecture_of(model, who).classes
    if known != classes:
        has = f"knows the classes {few(known)}" if known else "does not say which classes it knows"
        raise InputError(
            f"{who} {has}, and {where} has {few(classes)}: {unlike(known, classes)}; give the data that it was made "
            "for, or import it with --classes, in the order of its labels."
        )


def unlike(theirs: Sequence[str], ours: Sequence[str]) -> str:
    """The first class in which two lists differ, in words; empty where they are equal."""
    for number in range(max(len(theirs), len(ours))):
        one, other = (names[number] if number < len(names) else None for names in (theirs, ours))
        if one != other:
            one, other = ("missing" if name is None else repr(name) for name in (one, other))
            return f"class {number + 1} is {one} in the first and {other} in the second"
    return ""
