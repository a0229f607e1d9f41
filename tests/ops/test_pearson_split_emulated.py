"""The Pearson loss on CUDA in split form, thread by thread on the host, against the 2x rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from jdkd.reference import pearson as reference
from tests.ops.emulated import placed
from tests.ops.pearson_cases import CASES, DTYPES, PLAIN, WEIGHT, Case, assert_as_exact_as_eager, gradient_unit

# Planes of two blocks and of a warp, so large that packs follow each other; a map of one position; rows of sixteen
# bytes, and several blocks of channels.
ODD = ((1, 1, 129, 131), (2, 2, 33, 35), (3, 4, 1, 1), (2, 72, 3, 5))
OFFSETS = [(0, 0, 0), (1, 1, 1), (3, 0, 1), (8, 3, 0), (0, 8, 3)]


class Loss(NamedTuple):
    """What a forward returns."""

    loss: Tensor
    losses: Tensor
    table: Tensor
    moments: Tensor


def run(ops, case: Case, offsets: Sequence[int] = (0, 0, 0), *, tap: bool = False) -> None:
    """Holds a case to the 2x rule, both sides' gradients; levels of students, teachers and heads begin at offsets."""
    drawn = case.levels()
    students, teachers = ([placed(x, offset) for x in side] for side, offset in zip(drawn, offsets, strict=False))
    heads = []
    for s, t in zip(students, teachers, strict=True) if tap else ():
        drawn_head = torch.randn_like(s, dtype=torch.float32) * gradient_unit(s, t, case.upstream) / 3
        heads.append(placed(drawn_head.to(s.dtype), offsets[2]))
    found = Loss(*ops.pearson_fwd(students, teachers, [WEIGHT] * len(students), 1e-6, False))
    upstream = torch.tensor(case.upstream)
    gradients = ops.pearson_bwd(upstream, students, teachers, found.table[0], heads)
    gradients += ops.pearson_bwd(upstream, teachers, students, found.table[1], [])
    for dx, x in zip(gradients, (*students, *teachers), strict=True):
        assert dx.stride() == x.stride() and not dx.isnan().any()
    assert_as_exact_as_eager(found.loss, gradients, students, teachers, case.upstream, heads, case.loss_unit)
    _, losses, table, moments = reference.pearson_fwd(students, teachers, [WEIGHT] * len(students), 1e-6, False)
    torch.testing.assert_close(found.losses, losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.table[:, 3:], table[:, 3:], rtol=1e-6, atol=1e-6)
    assert torch.equal(found.moments[0], moments[0])


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", CASES)
def test_is_as_exact_as_the_eager_formula_up_to_the_last_byte_of_a_page(emulation, name, channels_last):
    dtype = DTYPES[([*CASES].index(name) + channels_last) % len(DTYPES)]  # these take turns
    with emulation.memory("end"):
        run(emulation.ops, replace(CASES[name], dtype=dtype, channels_last=channels_last))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_long_plane_whose_first_packs_lie_far_from_the_rest_keeps_the_rule(emulation, dtype):
    corner = replace(CASES["padded_corner"], shapes=((1, 1, 128, 128),), change=lambda level: level[:, :, :18].zero_())
    with emulation.memory("end"):
        run(emulation.ops, replace(corner, dtype=dtype))


def test_long_chunks_of_rows_that_begin_in_a_padded_margin_keep_the_rule(emulation):
    margin = Case(shapes=((1, 32, 130, 256),), mean=300.0, change=lambda level: level[..., :9].zero_())
    run(emulation.ops, replace(margin, channels_last=True))  # chunks of one image row


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
def test_takes_levels_at_any_address_and_the_heads_gradients(emulation, offsets, dtype):
    channels_last = bool((OFFSETS.index(offsets) + DTYPES.index(dtype)) % 2)  # layouts take turns
    case = replace(PLAIN, shapes=ODD, mean=3.0, dtype=dtype, channels_last=channels_last)
    with emulation.memory("begin"):
        run(emulation.ops, case, offsets, tap=True)


def test_levels_of_both_layouts_and_more_of_them_than_a_launch_takes(emulation):
    shapes = [(1, 3, 5, 4), (2, 8, 2, 3), (40, 1, 1, 3)] * 6
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    with emulation.memory("end"):
        for i, shape in enumerate(shapes):
            for side, level in zip(sides, Case(shapes=(shape,), mean=i, channels_last=i % 4 > 1).levels(), strict=True):
                side.append(level[0].detach())
        weights = [1.0 + i for i in range(len(shapes))]
        found = Loss(*emulation.ops.pearson_fwd(*sides, weights, 1e-6, False))
        gradients = emulation.ops.pearson_bwd(torch.tensor(1.0), *sides, found.table[0], [])
    loss, losses, table, moments = reference.pearson_fwd(*sides, weights)
    torch.testing.assert_close(found.losses, losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.loss, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.moments, moments, rtol=1e-5, atol=1e-5)
    for dx, expected in zip(gradients, reference.pearson_bwd(torch.tensor(1.0), *sides, table[0]), strict=True):
        torch.testing.assert_close(dx, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("channels_last", [False, True])
def test_constant_channels_and_nan_are_as_in_the_reference(emulation, channels_last):
    case = Case(shapes=((2, 3, 9, 7), (1, 8, 6, 5)), channels_last=channels_last)
    students, teachers = ([level.detach() for level in side] for side in case.levels())
    students[0][:, 1], teachers[1][:, 2] = 0.7, -3.0
    students[0][0, 2, 0, 0] = float("nan")
    for skip_constant in (True, False):
        settings = [0.5, 2.0], 1e-3, skip_constant
        with emulation.memory("end"):
            found = Loss(*emulation.ops.pearson_fwd(students, teachers, *settings))
        _, losses, table, _ = reference.pearson_fwd(students, teachers, *settings)
        torch.testing.assert_close(found.losses, losses, rtol=1e-5, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(found.table, table, rtol=1e-4, atol=1e-6, equal_nan=True)
        assert found.losses[0].isnan() and found.losses[1].isfinite()
        assert not skip_constant or (found.table[:, :3, 1] == 0).all()


@pytest.mark.parametrize("channels_last", [False, True])
def test_threads_in_another_order_give_the_same_bits(emulation, channels_last):
    case = Case(shapes=((2, 3, 60, 41), (3, 16, 9, 5)), channels_last=channels_last)
    sides = [[level.detach() for level in side] for side in case.levels()]
    runs = []
    for order in range(3):
        emulation.reorder(order)
        found = Loss(*emulation.ops.pearson_fwd(*sides, [1.0, 2.0], 1e-6, False))
        gradients = emulation.ops.pearson_bwd(torch.tensor(1.0), *sides, found.table[0], [])
        runs.append([*found, *gradients])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_pyramid_takes_two_launches_forward_and_one_backward(emulation, channels_last):
    case = Case(shapes=((2, 40, 9, 7), (1, 24, 6, 5), (1, 24, 2, 1)), channels_last=channels_last)
    students, teachers = ([level.detach() for level in side] for side in case.levels())
    before = emulation.launches()
    found = Loss(*emulation.ops.pearson_fwd(students, teachers, [1.0, 2.0, 3.0], 1e-6, False))
    assert emulation.launches() == before + 2
    emulation.ops.pearson_bwd(torch.tensor(1.0), students, teachers, found.table[0], [])
    assert emulation.launches() == before + 3


def test_any_block_of_the_finish_may_be_the_last(emulation):
    case = Case(shapes=((1, 40, 3, 5), (2, 20, 2, 2)))
    sides = [[level.detach() for level in side] for side in case.levels()]
    _, losses, _, _ = reference.pearson_fwd(*sides, [1.0, 2.0])
    seen = set()
    for order in range(8):
        emulation.reorder(order)
        with emulation.memory("end"):
            found = Loss(*emulation.ops.pearson_fwd(*sides, [1.0, 2.0], 1e-6, False))
        torch.testing.assert_close(found.losses, losses, rtol=1e-5, atol=1e-6)
        seen.add((found.loss.item(), *found.losses.tolist()))
    assert len(seen) == 1
