"""Whether something looks into a call, where an ``autograd.Function`` or an opaque operator would hide what it does."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def is_looked_into() -> bool:
    """Whether a call is to be plain torch.

    ``torch.export`` keeps of a Function what its forward ran, without its gradient; ``torch.jit.trace``, the transforms
    of ``torch.func`` and forward-mode differentiation know no rule of it.
    """
    return is_exporting() or is_transformed() or is_forward_mode() or is_traced()


def is_exporting() -> bool:
    """Whether ``torch.export`` traces; ``torch.compiler.is_exporting`` says so under ``torch.compile`` as well."""
    return torch.compiler.is_exporting()


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` (vmap, grad, jvp, ...) is active."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def is_traced() -> bool:
    """Whether ``torch.jit.trace`` traces."""
    return not torch.compiler.is_compiling() and torch.jit.is_tracing()


def is_forward_mode() -> bool:
    """Whether a call is in a level of forward-mode differentiation."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


# What torch.compiler.assume_constant_result sets: the question is asked in Python, and not answered by the tracer.
is_exporting._dynamo_marked_constant = True
