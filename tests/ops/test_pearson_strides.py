"""The one rule that tells the strides of a pyramid from its sizes."""

from collections.abc import Callable

import pytest
import torch

from jdkd.errors import InputError
from jdkd.functional import pkd_loss
from jdkd.notices import Notice
from jdkd.ops.pearson_strides import pairs_of, strides_of

ROUNDING = {"up": lambda size: -(-size // 2), "down": lambda size: size // 2}


@pytest.mark.parametrize("rounding", ROUNDING)
def test_strides_double_from_p2_to_p7_whatever_the_image_and_the_rounding(rounding: str):
    halve: Callable[[int], int] = ROUNDING[rounding]
    for height in range(33, 400, 7):
        for width in range(33, 400, 11):
            size, sizes = (height, width), []
            for _ in range(7):
                size = (halve(size[0]), halve(size[1]))
                sizes.append(size)
            sizes = [size for size in sizes[1:] if min(size) > 0]
            for first in (0, 1):  # from P2, and from P3
                expected = [4 * 2**k for k in range(first, len(sizes))]
                assert strides_of(sizes[first:], (height, width)) == expected, (height, width, sizes)


def test_p7_of_a_small_image_is_told_from_p6():
    sizes = [(20, 20), (10, 10), (5, 5), (3, 3), (2, 2)]
    assert strides_of(sizes, (160, 160)) == [8, 16, 32, 64, 128]
    assert strides_of(sizes[::-1], (160, 160)) == [128, 64, 32, 16, 8], "in any order"
    assert strides_of([(1, 1), (1, 1)], (64, 64)) == [64, 128]
    assert strides_of([(5, 5), (5, 5), (3, 3)], (160, 160)) == [32, 32, 64], "two of one size have one stride"
    assert strides_of([(40, 40), (5, 5)], (160, 160)) == [4, 32], "levels may be left out"
    assert strides_of([(32, 48), (16, 24), (8, 12), (4, 6)], (100, 167)) == [4, 8, 16, 32], "padded inside to 128x192"


def test_equal_strides_are_paired_in_order():
    assert pairs_of([8, 16, 32, 32], [32, 32, 64, 8]) == [(0, 3), (2, 0), (3, 1)]
    assert pairs_of([32, 32], [32]) == [(0, 0)]


def test_the_loss_pairs_the_whole_pyramid_of_a_small_image_by_stride():
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(2, 3, size, size, generator=generator) for size in (20, 10, 5, 3, 2)]
    others = [torch.randn(2, 3, size, size, generator=generator) for size in (10, 5, 3, 2)]
    with pytest.warns(Notice, match="leaves out the student's levels of sizes 20x20"):
        loss = pkd_loss(levels, others, pairing="stride")
    torch.testing.assert_close(loss, pkd_loss(levels[1:], others))
    twins = [*levels[:3], torch.randn(2, 3, 5, 5, generator=generator)]
    theirs = [level.flip(0) for level in twins]
    torch.testing.assert_close(pkd_loss(twins, theirs, pairing="stride"), pkd_loss(twins, theirs))


def test_levels_with_channels_last_are_refused():
    levels = [torch.randn(1, 16, 16, 24), torch.randn(1, 8, 8, 48)]
    with pytest.raises(
        InputError, match=r"student has a level of 8x48 .* of 16x24, a stride below 1; .* channels last"
    ):
        pkd_loss(levels, levels, pairing="stride")
