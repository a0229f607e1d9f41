"""The kernels that pack weights on CUDA, thread by thread on the host: every bit is the reference's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from jdkd._backend import use_backend
from jdkd.ops import pack_operators
from jdkd.ops.active_channels import Channels
from jdkd.ops.pack import Part, pack, packed_weights, unpack_add_
from tests.ops.emulated import Emulation, placed
from tests.ops.pack_cases import channels, weight

# Stems, 3x3 of one piece and of several, 1x1, depthwise and grouped, linear, bias; some of no whole vectors.
SHAPES = (
    (16, 3, 7, 7),
    (24, 16, 3, 3),
    (64, 48, 3, 3),
    (33, 130, 3, 3),
    (40, 72, 1, 1),
    (20, 24, 5, 5),
    (24, 1, 3, 3),
    (7, 5, 1, 1),
    (10, 24),
    (24,),
)
FLOAT, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
PLACES = [("begin", 0), ("end", 0), ("begin", 1)]
PAIRS = [(FLOAT, BRAIN), (FLOAT, FLOAT), (BRAIN, BRAIN), (BRAIN, FLOAT), (FLOAT, HALF), (HALF, HALF)]


@contextmanager
def as_on_cuda(emulation: Emulation) -> Iterator[None]:
    """Packs tensors of the CPU with the kernels of CUDA."""
    on_cuda = patch.object(pack_operators, "_selected", lambda *_: "cuda")
    with on_cuda, patch.object(torch.ops, "jdkd_C", emulation.ops):
        yield


def drawn_channels(draw: random.Random, maximum: int) -> Channels:
    count = draw.randint(1, maximum)
    kinds = [draw.sample(range(maximum), count), count, maximum, max(1, maximum // 16 * 8)]
    return channels(draw.choice(kinds), maximum)


def drawn_parts(draw: random.Random) -> Iterator[tuple[tuple[int, ...], bool, Part]]:
    """Yields shape, whether channels-last, and the active part of weights."""
    for shape in SHAPES:
        columns = drawn_channels(draw, shape[1]) if len(shape) > 1 and draw.random() < 0.8 else None
        kernel = (1, 1) if len(shape) == 4 and shape[2] == 3 and draw.random() < 0.3 else None
        yield shape, draw.random() < 0.5, Part(drawn_channels(draw, shape[0]), columns, kernel)


def everything(
    weights: list[Tensor], parts: list[Part], gradients: list[Tensor], dtype: torch.dtype, offset: int = 0
) -> list[Tensor]:
    """Packed weights, dense gradients, and gradients added in place."""
    leaves = [placed(whole, offset).requires_grad_() for whole in weights]
    packed = packed_weights(leaves, parts, dtype)
    torch.autograd.backward(packed, gradients)
    added = [placed(whole, offset) for whole in weights]
    unpack_add_(added, parts, gradients)
    return [*(view.detach() for view in packed), *(leaf.grad for leaf in leaves), *added]


def run(emulation: Emulation, seed: int, shared: torch.dtype, dtype: torch.dtype, where: str, offset: int = 0) -> None:
    """Drawn parts, see :func:`run_parts`."""
    run_parts(emulation, list(drawn_parts(random.Random(seed))), seed, shared, dtype, where, offset)


def run_parts(
    emulation: Emulation,
    drawn: list[tuple[tuple[int, ...], bool, Part]],
    seed: int,
    shared: torch.dtype,
    dtype: torch.dtype,
    where: str,
    offset: int = 0,
) -> None:
    """Packs parts, brings their gradients back in both ways, and compares bits."""
    parts = [part for *_, part in drawn]
    with emulation.memory(where):
        weights = [weight(shape, i, shared, last) for i, (shape, last, _) in enumerate(drawn)]
        with use_backend("reference"):
            shapes = [view.shape for view in pack(weights, parts, dtype)]
            gradients = [weight(shape, 100 + i, dtype, seed % 2 == 0) for i, shape in enumerate(shapes)]
            expected = everything(weights, parts, gradients, dtype)
        with as_on_cuda(emulation):
            found = everything(weights, parts, gradients, dtype, offset)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.stride() == theirs.stride() and torch.equal(ours, theirs)


@pytest.mark.parametrize("place", range(len(PLACES)))
@pytest.mark.parametrize(("shared", "dtype"), PAIRS, ids=str)
def test_drawn_parts_have_the_bits_of_the_reference(emulation, shared, dtype, place):
    seed = (PAIRS.index((shared, dtype)) + place) % 3  # the parts take turns
    run(emulation, seed, shared, dtype, *PLACES[place])


def test_more_parts_than_a_launch_takes(emulation):
    biases = [weight((3,), seed) for seed in range(482)]
    parts = [Part(channels([2, 0], 3))] * len(biases)
    with emulation.memory("end"), as_on_cuda(emulation):
        packed = pack([bias.clone() for bias in biases], parts, FLOAT)
    assert all(torch.equal(view, bias[[2, 0]]) for view, bias in zip(packed, biases, strict=True))
