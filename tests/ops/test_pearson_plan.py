"""How the single pass is laid over the chip: what fits, and that every element is some block's, once."""

from __future__ import annotations

import itertools
import math

import pytest

from jdkd import _ext
from jdkd.ops import pearson_planner
from jdkd.ops.pearson_planner import Launch, Level, Plan

if _ext.library() is None:
    pytest.skip("jdkd._C is not built", allow_module_level=True)

SMS, SHARED_PER_BLOCK, SHARED_PER_SM = 132, 232_448, 233_472  # of sm_90, in bytes
SIZES = {"P2": 200 * 336, "P3": 100 * 168, "P4": 50 * 84, "P5": 25 * 42, "P6": 13 * 21, "P7": 7 * 11}
BF16, FP32 = 2, 4
FIXED = 3072  # bytes of a block besides the features
STAGE, MAX_BARRIERS = 512, 32


def planned(shapes, itemsize, *, sms=SMS, block=SHARED_PER_BLOCK, sm=SHARED_PER_SM, max_cluster=16) -> Plan:
    return pearson_planner.plan(shapes, itemsize, (sms, block, sm, max_cluster))


def levels(images: int, *names: str, channels: int = 256) -> list[tuple[int, int, int]]:
    return [(images, channels, SIZES[name]) for name in names]


def teams_of(shape, level: Level, launch: Launch, vector: int):
    """Rows of every team that works on a level."""
    for cluster, rank, team in itertools.product(range(level.clusters), range(launch.cluster), range(level.teams)):
        yield pearson_planner.rows(shape, level, launch, vector, cluster, rank, team)


@pytest.mark.parametrize(
    ("itemsize", "images", "cluster", "blocks_per_sm", "kilobytes"),
    [
        (BF16, 1, 1, 3, 67),
        (BF16, 2, 2, 3, 67),
        (BF16, 4, 4, 3, 67),
        (BF16, 8, 8, 3, 67),
        (BF16, 16, 16, 3, 67),
        (FP32, 1, 2, 3, 67),
        (FP32, 2, 4, 3, 67),
        (FP32, 4, 8, 3, 67),
        (FP32, 8, 16, 3, 67),
        (FP32, 16, 16, 1, 134),
    ],
)
def test_p3_to_p7_fit_with_the_clusters_of_the_design(itemsize, images, cluster, blocks_per_sm, kilobytes):
    plan = planned(levels(images, "P3", "P4", "P5", "P6", "P7"), itemsize)
    launch = plan.launches[plan.levels[0].launch]
    assert plan.fits
    assert (launch.cluster, launch.blocks_per_sm) == (cluster, blocks_per_sm)
    assert kilobytes <= launch.shared_bytes / 1000 <= SHARED_PER_SM / blocks_per_sm / 1000 - 1
    if blocks_per_sm == 3:
        assert len(plan.launches) == 1


@pytest.mark.parametrize(("itemsize", "most"), [(BF16, 8), (FP32, 4)])
def test_p2_fits_up_to_the_limit_of_the_design_and_is_reported_beyond(itemsize, most):
    plan = planned(levels(most, "P2", "P3"), itemsize)
    p2, p3 = plan.levels
    assert plan.fits and p2.ranks == 16
    assert plan.launches[p2.launch].blocks_per_sm == 1
    assert plan.launches[p3.launch].blocks_per_sm == 3
    beyond = planned(levels(2 * most, "P2", "P4"), itemsize)
    assert not beyond.fits
    assert beyond.levels[0].launch is None and beyond.levels[1].launch == 0


def test_without_clusters_of_sixteen_everything_but_the_largest_batch_fits_eight():
    for itemsize, images in ((BF16, 16), (FP32, 8)):
        plan = planned(levels(images, "P3", "P4", "P5", "P6", "P7"), itemsize, max_cluster=8)
        assert plan.fits
        assert max(launch.cluster for launch in plan.launches) == 8
        assert plan.launches[plan.levels[0].launch].blocks_per_sm == 1
    assert not planned(levels(16, "P3"), FP32, max_cluster=8).fits


CHIPS = [{}, {"max_cluster": 8}, {"block": 9_216, "sm": 24_576}, {"sms": 4000}, {"max_cluster": 1, "block": 20_000}]
ODD = [(1, 1, 1), (3, 5, 1), (2, 7, 3), (5, 3, 77), (2, 9, 273), (3, 4, 1050), (7, 2, 111), (1, 3, 640), (16, 2, 64)]


@pytest.mark.parametrize("itemsize", [BF16, FP32])
@pytest.mark.parametrize("chip", CHIPS, ids=str)
@pytest.mark.parametrize("aligned", [True, False])
def test_every_element_is_one_blocks_and_has_a_place_of_its_own(itemsize, chip, aligned):
    plan = planned(ODD, itemsize, **chip)
    assert plan.fits or "block" in chip
    vector = 16 // itemsize if aligned else 1
    for shape, level in zip(ODD, plan.levels, strict=True):
        if level.launch is None:
            continue
        elements = math.prod(shape)
        seen = [0] * elements
        room = level.room * 16 // itemsize // vector
        for rows in teams_of(shape, level, plan.launches[level.launch], vector):
            end = 0
            for channel, start, length, phase, offset, vectors, bulk, _ in rows:
                plane, inside = divmod(start, shape[2])
                assert plane % shape[1] == channel and inside + length <= shape[2]
                assert length > 0 and (start - phase) % vector == 0 and 0 <= phase < vector
                assert vectors == -(-(phase + length) // vector)
                assert offset >= end  # rows do not overlap in shared memory
                end = offset + vectors
                # Bulk copies stay inside the tensor, and leave less than one vector to plain loads.
                assert start - phase + bulk * vector <= elements and vectors - bulk in (0, 1)
                for element in range(start, start + length):
                    seen[element] += 1
            assert end <= room and all(row[-1] == end for row in rows)
        assert seen == [1] * elements


@pytest.mark.parametrize("chip", CHIPS, ids=str)
def test_launches_keep_to_the_limits_of_the_chip(chip):
    for images, itemsize in itertools.product((1, 2, 3, 7, 16, 64), (BF16, FP32)):
        shapes = [*levels(images, *SIZES), *ODD]
        plan = planned(shapes, itemsize, **chip)
        for index, launch in enumerate(plan.launches):
            limit = min(
                chip.get("block", SHARED_PER_BLOCK), chip.get("sm", SHARED_PER_SM) // launch.blocks_per_sm - 1024
            )
            assert launch.shared_bytes <= limit
            assert launch.cluster <= chip.get("max_cluster", 16) and launch.warps in (8, 16)
            assert launch.levels and all(plan.levels[i].launch == index for i in launch.levels)
            clusters = 0
            for i in launch.levels:
                level = plan.levels[i]
                assert level.first_cluster == clusters
                clusters += level.clusters
                assert launch.cluster % level.ranks == 0 and 1 in (level.ranks, level.teams)
                assert FIXED + level.teams * 2 * level.room * 16 <= launch.shared_bytes
                assert level.teams * -(-level.room // STAGE) <= MAX_BARRIERS
                channels = launch.cluster // level.ranks * level.teams
                assert (level.clusters - 1) * channels < shapes[i][1] <= level.clusters * channels
            assert clusters == launch.clusters


def test_the_fullest_blocks_go_first_and_small_levels_share_theirs():
    plan = planned(levels(2, "P7", "P5", "P3"), BF16)
    (launch,) = plan.launches
    filled = [level.teams * level.room for level in plan.levels]
    assert [filled[i] for i in launch.levels] == sorted(filled, reverse=True)
    p7, p5, p3 = plan.levels
    assert (p7.teams, p5.teams, p3.teams) == (8, 8, 1)
    assert p7.clusters == p5.clusters == 16 and p3.clusters == 256


def test_a_launch_that_would_leave_half_the_chip_idle_is_spread():
    packed, spread = (planned(levels(2, "P6"), BF16, sms=sms).launches[0] for sms in (32, 132))
    assert 2 * spread.clusters * spread.cluster > 132
    assert spread.clusters * spread.cluster > packed.clusters * packed.cluster


def test_whole_planes_go_to_a_rank_where_the_batch_divides():
    for itemsize, images in ((BF16, 8), (BF16, 16), (FP32, 16)):
        (level,) = planned(levels(images, "P3"), itemsize).levels
        assert level.chunk % SIZES["P3"] == 0 or images < level.ranks


@pytest.mark.parametrize("itemsize", [BF16, FP32])
def test_offsets_are_right_past_2_to_the_31_elements(itemsize):
    shape = (16, 20_000, SIZES["P3"])  # 5.4e9 elements
    plan = planned([shape], itemsize)
    (level,), (launch,) = plan.levels, plan.launches
    assert plan.fits
    channels = launch.cluster // level.ranks * level.teams
    covered = 0
    for rank in range(launch.cluster):
        last = shape[1] - 1
        rows = pearson_planner.rows(
            shape, level, launch, 16 // itemsize, last // channels, rank, last % channels % level.teams
        )
        for channel, start, length, *_ in rows:
            assert channel == last
            image, inside = divmod(level.chunk * (rank % level.ranks) + covered % level.chunk, shape[2])
            assert start == (image * shape[1] + channel) * shape[2] + inside
            covered += length
    assert covered == shape[0] * shape[2]


def test_a_channel_whose_positions_pass_an_int_does_not_fit():
    plan = planned([(2**20, 1, 2**20), (2**40, 1, 1), (1, 1, 2**40)], FP32)
    assert [level.launch for level in plan.levels] == [None, None, None]


@pytest.mark.parametrize(
    ("shapes", "itemsize", "max_cluster"), [([(1, 1, 1)], 8, 16), ([(1, 1, 1)], 2, 3), ([(1, 0, 4)], 2, 16)]
)
def test_nonsense_is_refused(shapes, itemsize, max_cluster):
    with pytest.raises(ValueError, match=r"pearson_plan: .* must be"):
        planned(shapes, itemsize, max_cluster=max_cluster)
