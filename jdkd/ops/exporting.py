"""Whether a program is being exported, where an autograd Function would leave its forward behind without its rule."""

from __future__ import annotations

import torch


def is_exporting() -> bool:
    """Whether ``torch.export`` traces; ``torch.compiler.is_exporting`` says so under ``torch.compile`` as well."""
    return torch.compiler.is_exporting()


# What torch.compiler.assume_constant_result sets: the question is asked in Python, and not answered by the tracer.
is_exporting._dynamo_marked_constant = True
