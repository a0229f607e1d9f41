"""A shape that `jdkd tune` times, and what the shapes of all tables have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from jdkd._dispatch import Table, use_backend

DTYPES = {  # the one that is trained in most comes first
    "cpu": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.bfloat16, torch.float32, torch.float16),
}
LAYOUTS = (torch.contiguous_format, torch.channels_last)

Run = Callable[[Any], Any]


@dataclass(frozen=True)
class Shape:
    """One shape of a region of a table.

    Args:
        table: whose candidates are timed.
        call: what the table decides by, for these inputs; tensors in it have no values.
        label: the shape, in words.
        make: draws a set of inputs.
        runs: what runs on a set of inputs, by candidate.
    """

    table: Table
    call: Any
    label: str
    make: Callable[[], Any]
    runs: Mapping[str, Run]


def on_backend(name: str, run: Run) -> Run:
    """What runs under the request for a backend."""

    def asked(inputs: Any) -> Any:
        with use_backend(name):
            return run(inputs)

    return asked


def copied(inputs: Any) -> Any:
    """The same inputs in memory of their own."""
    return tree_map(_copied, inputs)


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf


def nbytes(inputs: Any) -> int:
    """Bytes of all tensors of a set of inputs."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
