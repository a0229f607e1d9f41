"""See :func:`take_neck_and_heads`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from jdkd.detect.architecture import known_architecture
from jdkd.detect.predictors import class_layers, class_outputs
from jdkd.errors import InputError, few
from jdkd.nn.necks import BACKBONE, neck_of, trunk_of
from jdkd.nn.unwrapping import unwrapped

BODY = "body"  # torchvision's and our name for what a backbone with a pyramid is without it


@dataclass(frozen=True)
class Taken:
    """What a student took over from its teacher, by the names of tensors.

    Attributes:
        taken: those that agreed.
        left: those of its neck and heads that did not, in name, in shape or in what they are for.
        outputs: of tensors that are for classes which lie elsewhere in the teacher's, where they lie there.
        classes: how the classes of the two differ, in words; empty where they do not.
    """

    taken: tuple[str, ...]
    left: tuple[str, ...]
    outputs: Mapping[str, Sequence[int]] = field(default_factory=dict)
    classes: str = ""

    def __str__(self) -> str:
        left = f"; its own are {', '.join(_parts(self.left))} ({len(self.left)} tensors)" if self.left else ""
        classes = f"; {self.classes}" if self.classes else ""
        return (
            f"taken over from the teacher: {', '.join(_parts(self.taken))} ({len(self.taken)} tensors){left}{classes}"
        )


@torch.no_grad()
def take_neck_and_heads(student: nn.Module, teacher: nn.Module) -> Taken:
    """Copies into a student what its teacher has under the same names and in the same shapes, but for the backbone.

    The inheriting of FGD and MGD (Yang et al., CVPR 2022 and ECCV 2022). What predicts classes is taken for each class
    by its name, and only where the teacher knows all classes of the student.

    Args:
        student: a detector, changed in place.
        teacher: another one, wrapped or not.

    Raises:
        InputError: nothing agrees; the student is as it was then.
    """
    found, theirs = in_common(student, teacher), unwrapped(teacher).state_dict()
    ours = unwrapped(student).state_dict()
    for name in found.taken:
        rows = found.outputs.get(name)
        ours[name].copy_(theirs[name] if rows is None else theirs[name][list(rows)])
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
    classes, outputs = _by_class(student, teacher)
    theirs = {name: tensor[outputs[name]] if name in outputs else tensor for name, tensor in theirs.items()}
    taken = [name for name in wanted if name in theirs and theirs[name].shape == ours[name].shape]
    if classes and (layers := tuple(f"{layer}." for layer in class_layers(student))):
        taken = [name for name in taken if name in outputs or not name.startswith(layers)]
    elif classes:  # any of its heads may have a place for each class
        taken = [name for name in taken if name.startswith(f"{neck_of(student) or BACKBONE}.")]
    if not any(ours[name].dim() > 1 for name in taken):
        raise InputError(
            f"the student ({type(student).__name__}) can take over nothing from its teacher "
            f"({type(teacher).__name__}): no tensor of their necks and heads has the same name and shape"
            f"{f' and the same classes, as {classes}' if classes else ''}; leave inherit out."
        )
    if classes:
        by_name = any(name in outputs for name in taken)
        classes = f"what predicts classes was {'taken by their names' if by_name else 'not'}, as {classes}"
    return Taken(tuple(taken), tuple(name for name in wanted if name not in taken), outputs, classes)


def _by_class(student: nn.Module, teacher: nn.Module) -> tuple[str, dict[str, list[int]]]:
    """How the classes of two detectors differ, in words, and the outputs of the teacher that are for the student's.

    Returns:
        Nothing of both where they know the same classes in the same order; no outputs where the teacher does not know
        all of the student's, or one of the two does not say which it knows.
    """
    models = {"student": student, "teacher": teacher}
    known = {who: found.classes if (found := known_architecture(model)) else () for who, model in models.items()}
    ours, theirs = known.values()
    if unknown := [who for who, classes in known.items() if not classes]:
        words = "do not say which they know" if unknown[1:] else "does not say which it knows"
        return f"the {' and the '.join(unknown)} {words}", {}
    if ours == theirs:
        return "", {}
    words = " and ".join(f"the {who} knows {few(classes)}" for who, classes in known.items())
    if not set(ours) <= set(theirs):
        return words, {}
    tensors, outputs = teacher.state_dict(), {}
    numbers = [0, *(theirs.index(name) + 1 for name in ours)]  # the background comes first
    for layer, count in class_layers(teacher).items():
        if count == len(theirs) + 1:
            held = {name for name in (f"{layer}.weight", f"{layer}.bias") if name in tensors}
            outputs |= {name: class_outputs(layer, len(tensors[name]), count, numbers) for name in held}
    return words, outputs


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
