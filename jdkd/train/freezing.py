"""See :func:`frozen`."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def frozen(part: nn.Module) -> Iterator[None]:
    """Keeps a part of a detector as it is while :func:`jdkd.train.fit` trains the rest.

    It gets no gradients, and runs in evaluation mode whatever mode the detector is in, so that batch norms neither
    learn nor count. Afterwards what was trainable is so again.
    """
    before = [(parameter, parameter.requires_grad) for parameter in part.parameters()]
    stay = part.register_forward_pre_hook(lambda module, inputs: module.eval() and None)
    part.requires_grad_(False)
    try:
        yield
    finally:
        stay.remove()
        for parameter, required in before:
            parameter.requires_grad_(required)
