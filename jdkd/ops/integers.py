"""Integers of every kind, as users give them, made Python's own: those of numpy, of tensors in host memory, of enums.

Bools and floats are none, however whole: ``True`` channels and ``8.0`` channels are slips more often than counts.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def plain(value: Any) -> Any:
    """Returns: what an array of numpy or a tensor in host memory holds, in ints and lists; anything else as it is."""
    if isinstance(value, Tensor):
        return value.tolist() if value.device.type == "cpu" and not torch.compiler.is_compiling() else value
    return value.tolist() if hasattr(value, "dtype") and hasattr(value, "tolist") else value


def integer(value: Any) -> int | None:
    """Returns: an integer of any kind as an int; None for anything else, numbers on a device too."""
    if type(value) is int:
        return value
    value = plain(value)
    if isinstance(value, bool | Tensor) or not hasattr(value, "__index__"):
        return None
    return operator.index(value)


def integers(value: Any) -> list[int] | None:
    """Returns: a sequence of integers of any kind as a list of ints; None for anything else, iterators and text too."""
    value = plain(value)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray | memoryview):
        return None
    numbers = [integer(entry) for entry in value]
    return None if None in numbers else numbers
