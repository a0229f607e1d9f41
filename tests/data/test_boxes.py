"""Boxes and areas that cannot be are put right, and said."""

import math
import warnings

import pytest

from jdkd.data.boxes import ROUNDING
from jdkd.notices import Notice

from .annotation_files import HEIGHT, WIDTH, box, only, read_annotations, write_annotations


@pytest.mark.parametrize("value", [-1, 0, 1e11, 100, math.nan, math.inf, -math.inf, 10**400, "80", [80], True])
def test_an_area_that_cannot_be_is_the_boxs_and_said(repair, value):
    found, said = repair(only(box(1, 10, area=70), box(2, 20, area=value)))
    assert found.truth.areas.tolist() == [70, 80]
    assert "1 of 2 areas that cannot be, replaced by the area of the box: annotation 2 has area" in said
    assert f"{value!r}, its box 10 x 8 px" in said


@pytest.mark.parametrize("value", [0.5, 40, 80, 99])  # of a segmentation, of the box, of all pixels it touches
def test_an_area_that_can_be_is_kept(read, value):
    assert read(only(box(1, 10, area=value))).truth.areas.tolist() == [value]


@pytest.mark.parametrize(
    ("bbox", "kept", "says"),
    [
        ((1e308, 1e308, 1e308, 1e308), [], "1 of 2 boxes outside their image"),
        ((5, 0, 1.7e308, 1e308), [[5, 0, WIDTH, HEIGHT]], "1 of 2 boxes over the edge"),
    ],
)
def test_a_box_that_ends_at_infinity_is_put_right_without_a_warning_of_numpy(repair, bbox, kept, says):
    found, said = repair(only(box(1, 20, bbox=bbox), box(2, 10, bbox=(0, 0, 4, 4))))
    assert found.boxes.tolist() == [[0, 0, 4, 4], *kept] and says in said


def test_a_cut_box_has_no_larger_area_than_what_is_left(repair):
    found, said = repair(only(box(1, 10, bbox=(35, 0, 10, 10), area=100), box(2, 20, bbox=(35, 0, 10, 10), area=30)))
    assert found.truth.areas.tolist() == [50, 30] and "areas" not in said


@pytest.mark.parametrize("bbox", [(5, 6, 0, 8), (5, 6, 10, 0), (5, 6, -3, 8), (5, 6, 10, -0.5), (30.0, 6, 1e-7, 8)])
def test_a_box_without_area_is_left_out_and_said(repair, bbox):
    found, said = repair(only(*(box(i, 20, bbox=bbox) for i in range(2, 7)), box(1, 10)))
    assert found.offsets.tolist() == [0, 1, 1] and found.truth.ids.tolist() == [1]
    assert "5 of 6 boxes without area, left out, for example: annotation 2 [" in said
    assert said.count("annotation") == 3 and f"[{', '.join(f'{number:g}' for number in bbox)}] in 20.png" in said
    assert said.count(f"of {WIDTH} x {HEIGHT} px") == 3


@pytest.mark.parametrize("bbox", [(41, 6, 1, 8), (5, -1, 10, 1), (1000, 1000, 10, 10), (-10, 0, 10, 5), (40, 0, 9, 9)])
def test_a_box_outside_its_image_is_left_out_and_said(repair, bbox):
    found, said = repair(only(box(1, 10), box(2, 20, bbox=bbox)))
    assert found.offsets.tolist() == [0, 1, 1] and found.truth.ids.tolist() == [1]
    shown = ", ".join(f"{number:g}" for number in bbox)
    assert f"1 of 2 boxes outside their image, left out: annotation 2 [{shown}] in 20.png of 40 x 30 px" in said


@pytest.mark.parametrize(
    ("bbox", "left"),
    [
        ((-2.5, 6, 10, 8), [0, 6, 7.5, 14]),
        ((5, -3, 10, 8), [5, 0, 15, 5]),
        ((31, 6, 10, 8), [31, 6, 40, 14]),
        ((5, 25, 10, 1e9), [5, 25, 15, 30]),
        ((-500, -500, 1000, 1000), [0, 0, 40, 30]),
    ],
)
def test_a_box_over_the_edge_is_cut_and_said(repair, bbox, left):
    found, said = repair(only(box(1, 10), box(2, 20, bbox=bbox)))
    assert found.boxes[1].tolist() == left
    assert found.truth.boxes[1].tolist() == [*left[:2], left[2] - left[0], left[3] - left[1]]
    assert "1 of 2 boxes over the edge of their image, clipped: annotation 2 [" in said and "20.png" in said


def test_boxes_that_look_like_two_corners_are_cut_with_a_word_on_it(repair):
    corners = [box(i, 10, bbox=(20 + i, 15, 39, 29)) for i in (1, 2)]
    assert "though all of them fit as [left, top, right, bottom]" in repair(only(*corners))[1]


def test_boxes_given_as_fractions_are_refused(refusal, read):
    said = refusal(only(box(1, 10, bbox=(0.25, 0.5, 0.5, 0.25)), box(2, 20, bbox=(0, 0, 1, 1))))
    assert "annotation 1 and all others lie within 1 px: [0.25, 0.5, 0.5, 0.25] (and 1 more" in said
    assert "times the image's width" in said
    found = read(only(box(1, 10, bbox=(0.25, 0.5, 0.5, 0.25), area=None), box(2, 20)))  # one that is small
    assert found.offsets.tolist() == [0, 1, 2]


def test_each_kind_of_repair_is_said_for_itself(tmp_path):
    kinds = [(5, 6, 0, 8), (50, 6, 3, 8), (35, 6, 10, 8)]
    file = write_annotations(tmp_path / "a.json", only(box(9, 10), *(box(i, 10, bbox=b) for i, b in enumerate(kinds))))
    with pytest.warns(Notice) as said:
        read_annotations(file)
    assert len(said) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_annotations(file)  # once a file


@pytest.mark.parametrize("over", [0, 0.01, ROUNDING])
def test_an_overhang_of_rounding_is_cut_without_a_word(read, over):
    found = read(only(box(1, 10, bbox=(-over, -over, WIDTH + 2 * over, HEIGHT + 2 * over))))
    assert found.boxes.tolist() == [[0, 0, WIDTH, HEIGHT]]


def test_a_box_inside_is_not_touched(read):
    found = read(only(box(1, 10, bbox=(0.25, 0.5, 39.75, 29.5)), box(2, 20, bbox=(39.5, 29.5, 0.5, 0.5))))
    assert found.boxes.tolist() == [[0.25, 0.5, 40, 30], [39.5, 29.5, 40, 30]]


def test_crowd_regions_are_no_targets_and_may_lie_anywhere(read):
    crowd = box(3, 10, bbox=(-50, 0, 500, 0), iscrowd=1)
    found = read(only(box(1, 20), crowd, box(2, 10, iscrowd=0)))
    assert found.offsets.tolist() == [0, 1, 2]
    assert found.truth.ids.tolist() == [1, 3, 2] and found.truth.crowd.tolist() == [False, True, False]
    assert found.truth.boxes[1].tolist() == [-50, 0, 500, 0]


def test_a_file_of_left_out_boxes_alone_is_an_empty_split(refusal):
    assert "0 crowd regions and 2 boxes without area or outside" in refusal(
        only(*(box(i, 10, bbox=(5, 6, 0, 8)) for i in (1, 2)))
    )
