"""Elastic kernel size: the centre of a shared kernel, the padding that keeps positions aligned, the transform.

A smaller kernel is the centre of the largest one, of the same parity in each direction, so that both have the same
middle. Where the window shrinks by some taps on each side, the padding shrinks by as many pixels, times the dilation:
the output keeps its size, and its positions their places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

from jdkd.errors import InputError
from jdkd.ops.active_channels import Kernel, crop
from jdkd.ops.integers import integer, integers

KernelLike = int | Sequence[int] | None
Padding = int | Sequence[int] | str


def pair(value: int | Sequence[int]) -> tuple[int, int]:
    """Returns: ``(vertical, horizontal)`` of one number or two."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def active_kernel(value: KernelLike, maximum: Sequence[int]) -> Kernel:
    """Reads what a user may give as an active kernel size.

    Args:
        value: None (the whole kernel), one size, or ``(kh, kw)``, in taps.
        maximum: ``(kh, kw)`` of the shared kernel.

    Returns:
        The size; None for the whole kernel.

    Raises:
        InputError: on a size that is larger, smaller than 1, or of another parity.
    """
    if value is None:
        return None
    size = integer(value)
    numbers = integers(value) if size is None else [size]
    if numbers is None or len(numbers) not in (1, 2):
        raise InputError(f"kernel_size={value!r} is no kernel size; give an int, a pair of ints or None for all")
    kernel, maximum = pair(numbers if len(numbers) == 2 else numbers[0]), pair(maximum)
    for size, full in zip(kernel, maximum, strict=True):
        if not 1 <= size <= full or (full - size) % 2:
            raise InputError(
                f"kernel_size={value!r} is no centre of the supernet's {maximum[0]}x{maximum[1]} kernel; give one of "
                f"{', '.join(str(k) for k in range(full % 2 or 2, full + 1, 2))} where it has {full} taps"
            )
    return None if kernel == maximum else kernel


def active_padding(kernel: Kernel, maximum: Sequence[int], padding: Padding, dilation: int | Sequence[int]) -> Padding:
    """Shrinks the padding with the kernel, so that every output stays where it is.

    Args:
        kernel: active centre; None: the whole kernel.
        maximum: ``(kh, kw)`` of the shared kernel.
        padding: of the whole kernel, in pixels, or ``"same"`` or ``"valid"``.
        dilation: distance between taps, in pixels.

    Returns:
        The padding of the active kernel.

    Raises:
        InputError: if it would be negative.
    """
    if kernel is None or padding == "same":
        return padding
    whole, apart = pair(0 if isinstance(padding, str) else padding), pair(dilation)
    less = tuple(apart[d] * (maximum[d] - kernel[d]) // 2 for d in (0, 1))
    if whole[0] < less[0] or whole[1] < less[1]:
        raise InputError(
            f"kernel_size={kernel[0]}x{kernel[1]} of {maximum[0]}x{maximum[1]} needs {less[0]}, {less[1]} pixels less "
            f"padding and padding={padding!r} has no more than {whole[0]}, {whole[1]}; pad the whole kernel by as many "
            'pixels at least, or with "same"'
        )
    return whole[0] - less[0], whole[1] - less[1]


def transform_sizes(maximum: int) -> Iterator[tuple[int, int]]:
    """Yields: the steps from the largest square kernel down, ``(7, 5), (5, 3), (3, 1)`` for 7."""
    for size in range(maximum, 2, -2):
        yield size, size - 2


def transformed(part: Tensor, kernel: tuple[int, int], transforms: Mapping[tuple[int, int], Tensor]) -> Tensor:
    """Shrinks filters step by step: the centre, times the matrix of that step.

    Args:
        part: active filters with the whole kernel, ``[Cout, Cin / groups, k, k]``.
        kernel: the size wanted, square.
        transforms: ``[k' k', k' k']`` of every step from a size to the next smaller one, k'.

    Returns:
        ``[Cout, Cin / groups, *kernel]``.

    Source:
        Cai et al., Once-for-All, ICLR 2020, section 3.2.
    """
    for larger, smaller in transform_sizes(part.shape[-1]):
        if larger <= kernel[0]:
            break
        centre = crop(part, (smaller, smaller))
        part = F.linear(centre.flatten(2), transforms[larger, smaller]).view_as(centre)
    return part
