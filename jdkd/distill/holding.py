"""A teacher while it teaches: in evaluation mode, without gradients; and afterwards as it was before."""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

from torch import nn

from jdkd.errors import InputError


class _Held(NamedTuple):
    """How a teacher was before it taught: the modes of its modules, and which parameters wanted gradients."""

    modes: list[tuple[nn.Module, bool]]
    gradients: list[tuple[nn.Parameter, bool]]


_held: WeakKeyDictionary[nn.Module, list[_Held]] = WeakKeyDictionary()  # one entry a runner that is entered


def hold(teacher: nn.Module) -> None:
    """Puts a teacher into evaluation mode without gradients; several students may hold one teacher."""
    modes = [(module, module.training) for module in teacher.modules()]
    gradients = [(each, each.requires_grad) for each in teacher.parameters() if not each.is_inference()]  # have none
    try:
        teacher.eval()
    except NotImplementedError as error:
        raise InputError(
            f"the teacher ({type(teacher).__name__}) is an exported program, which cannot be run up to its neck; pass "
            "the model that it was exported from"
        ) from error
    for parameter, _ in gradients:
        parameter.requires_grad_(False)
    _held.setdefault(teacher, []).append(_Held(modes, gradients))


def release(teacher: nn.Module) -> None:
    """The last one to leave a teacher puts it back as the first one found it."""
    entries = _held[teacher]
    if len(entries) > 1:
        entries.pop()
        return
    for module, training in entries[0].modes:
        module.training = training
    for parameter, required in entries[0].gradients:
        parameter.requires_grad_(required)
    del _held[teacher]
