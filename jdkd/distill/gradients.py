"""Gradients: a loss that teaches nothing is an error; and which pass is under way."""

import torch
from torch import nn

from jdkd.errors import InputError

FORWARD = -1  # no backward pass is under way


def pass_number() -> int:
    """:data:`FORWARD`, or a number of its own for each backward pass, in which checkpoints recompute activations."""
    return FORWARD if torch.compiler.is_compiling() else torch._C._current_graph_task_id()


def check_gradient(learns: bool, student: nn.Module, what: str, *, ran_with_gradients: bool) -> None:
    """Refuses what no gradient can pass, though gradients are wanted.

    Args:
        learns: whether what the loss is made of depends on what is trained.
        student: who is to learn.
        what: which part of the student it comes from.
        ran_with_gradients: whether gradients were enabled while that part ran.

    Raises:
        InputError: no parameter of the student would get a gradient from it.
    """
    if learns or not torch.is_grad_enabled():
        return
    name = type(student).__name__
    if not ran_with_gradients:
        raise InputError(
            f"the student ({name}) ran the part that makes its {what} without gradients, so the distillation loss "
            "would be a constant; take torch.no_grad, inference_mode or detach away from there, and checkpoint "
            "activations with use_reentrant=False"
        )
    raise InputError(
        f"the {what} of the student ({name}) depends on no parameter that is trained, so the distillation loss would "
        "be a constant; unfreeze its backbone or neck, take away the detach() there, or set loss_weight to 0 meanwhile"
    )
