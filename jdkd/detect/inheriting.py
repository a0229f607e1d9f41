"""See :func:`take_neck_and_heads`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from jdkd.errors import InputError
from jdkd.nn.necks import BACKBONE, neck_of, trunk_of
from jdkd.nn.unwrapping import unwrapped

BODY = "body"  # torchvision's and our name for what a backbone with a pyramid is without it


@dataclass(frozen=True)
class Taken:
    """What a student took over from its teacher, by the names of tensors.

    Attributes:
        taken: those that agreed.
        left: those of its neck and heads that did not, in name or in shape.
    """

    taken: tuple[str, ...]
    left: tuple[str, ...]

    def __str__(self) -> str:
        left = f"; its own are {', '.join(_parts(self.left))} ({len(self.left)} tensors)" if self.left else ""
        return f"taken over from the teacher: {', '.join(_parts(self.taken))} ({len(self.taken)} tensors){left}"


@torch.no_grad()
def take_neck_and_heads(student: nn.Module, teacher: nn.Module) -> Taken:
    """Copies into a student what its teacher has under the same names and in the same shapes, but for the backbone.

    The inheriting of FGD and MGD (Yang et al., CVPR 2022 and ECCV 2022).

    Args:
        student: a detector, changed in place.
        teacher: another one, wrapped or not.

    Raises:
        InputError: nothing agrees; the student is as it was then.
    """
    found, theirs = in_common(student, teacher), unwrapped(teacher).state_dict()
    ours = unwrapped(student).state_dict()
    for name in found.taken:
        ours[name].copy_(theirs[name])
    return found


def in_common(student: nn.Module, teacher: nn.Module) -> Taken:
    """What :func:`take_neck_and_heads` would take over.

    Raises:
        InputError: nothing agrees.
    """
    student, teacher = unwrapped(student), unwrapped(teacher)
    ours, theirs = student.state_dict(), teacher.state_dict()
    bodies = tuple(f"{path}." for path in (_body_of(student), _body_of(teacher)))
    wanted = [name for name in ours if not name.startswith(bodies)]
    taken = [name for name in wanted if name in theirs and theirs[name].shape == ours[name].shape]
    if not any(ours[name].dim() > 1 for name in taken):
        raise InputError(
            f"the student ({type(student).__name__}) can take over nothing from its teacher "
            f"({type(teacher).__name__}): no tensor of their necks and heads has the same name and shape; leave "
            "inherit out."
        )
    return Taken(tuple(taken), tuple(name for name in wanted if name not in taken))


def _body_of(model: nn.Module) -> str:
    """Path of the backbone without its neck."""
    path, trunk = neck_of(model), trunk_of(model)
    if path is None:
        return BACKBONE
    if len(trunk) == 2:  # the neck stands beside the backbone
        return next(name for name, module in model.named_modules() if module is trunk[0])
    inside = getattr(trunk[0], BODY, None)
    return f"{path}.{BODY}" if isinstance(inside, nn.Module) else path


def _parts(names: Iterable[str]) -> list[str]:
    """The modules that tensors are of, one level below the detector's own children."""
    return list(dict.fromkeys(".".join(name.split(".")[:-1][:2]) or name for name in names))
