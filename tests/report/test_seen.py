"""The page of what detectors see, and of what their channels respond to."""

import base64
import dataclasses
import io
import re

import pytest
import torch
from PIL import Image

from jdkd.distill.responses import LevelResponses
from jdkd.report.responses import responses_section
from jdkd.report.seen import Sight, seen_page
from jdkd.train.image_scores import IGNORED, WRONG, judge
from tests.report.made_up import levels_of


@pytest.fixture
def sights(digits):
    """One that finds the first box of every image and something wrong, and one that finds nothing."""
    _, val = digits
    first, second = [], []
    for _, target in val:
        boxes = torch.cat((target["boxes"][:1], torch.tensor([[0.0, 0.0, 3.0, 3.0]])))
        labels = torch.cat((target["labels"][:1], torch.tensor([1])))
        scores = torch.tensor([0.9, 0.4])[: len(boxes)] if len(boxes) == 2 else torch.tensor([0.4])
        first.append(judge(boxes, labels, scores, target))
        second.append(judge(torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0), target))
    return val, [Sight("one & only", first, 0.3), Sight("blind", second, 0.5)]


def test_the_worst_images_come_first_with_every_view_of_them(sights):
    val, both = sights
    text = seen_page(val, both, 3, command=["jdkd", "show", "a b"])
    counts = [len(target["labels"]) for _, target in val]
    names = re.findall(r"<h3>([^<]*)</h3>", text)
    expected = sorted(range(4), key=lambda place: (both[0].images[place].f1(0.3), -counts[place], place))[:3]
    assert names == [val.sizes[place][0] for place in expected]
    assert text.count("data:image/jpeg;base64,") == 3 and text.count("<use ") == 6  # each picture once, three views
    shown = [counts[place] for place in expected]
    assert text.count('class="box truth"') == sum(shown)
    assert text.count('class="box found"') == sum(count > 0 for count in shown) and text.count('class="box wrong"') == 3
    assert text.count('class="box missed"') == sum(max(count - 1, 0) for count in shown) + sum(shown)
    assert "1 more image is not shown" in text and "jdkd show &#x27;a b&#x27;" in text
    assert "What one &amp; only and blind see" in text and "the lowest of one &amp; only first" in text
    total = sum(counts)
    assert f"blind finds 0 of {total} boxes on 4 images, and 0 detections are wrong: F1 0.000" in text
    assert 'href="#responses"' not in text  # without a teacher


def test_what_is_below_the_threshold_or_does_not_count_is_told_apart(sights):
    val, both = sights
    high = seen_page(val, [Sight("one", both[0].images, 0.5)], 4, command=[])
    assert 'class="box wrong"' not in high and 'class="box found"' in high
    ignored = [
        dataclasses.replace(one, hits=tuple(IGNORED if hit == WRONG else hit for hit in one.hits))
        for one in both[0].images
    ]
    text = seen_page(val, [Sight("one", ignored, 0.3)], 4, command=[])
    assert text.count('class="box ignored"') == 4 and ", 0 wrong" in text


@pytest.fixture(scope="module")
def levels() -> list[LevelResponses]:
    return levels_of(channels=12)


def _atlases(text):
    """The pictures of maps, as arrays of palette indices [2 h, (1 + K) w]."""
    found = re.findall(r"data:image/png;base64,([^\"]+)", text)
    pictures = [Image.open(io.BytesIO(base64.b64decode(each))) for each in found]
    assert all(picture.mode == "P" for picture in pictures)
    return [
        torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(*picture.size[::-1])
        for picture in pictures
    ]


def test_channels_are_drawn_from_the_lowest_r_to_the_highest_with_their_r(levels):
    text = responses_section(levels, torch.zeros(3, 40, 60, dtype=torch.uint8), 4, 5, ("small", "large"))
    assert re.findall(r"<h3>stride (\d+)</h3>", text) == ["8", "16"]
    told = re.findall(r"<figcaption>channel (\d+): r (-?[\d.]+)</figcaption>", text)
    assert len(told) == 10
    for level, own in zip(levels, (told[:5], told[5:]), strict=True):
        ranked = level.r.argsort().tolist()
        assert [int(channel) for channel, _ in own] == [ranked[k] for k in (0, 3, 6, 8, 11)]
        assert all(float(r) == pytest.approx(level.r[int(channel)].item(), abs=0.005) for channel, r in own)
        every = " ".join(f"{r:.2f}" for r in level.r.tolist())
        assert f"<code>{every}</code>" in text
    assert "large on the left and small on the right" in text and "over 4 images" in text and "flatters" not in text


def test_a_map_shows_deviations_in_the_same_colours_for_both(levels):
    text = responses_section(levels, torch.zeros(3, 40, 60, dtype=torch.uint8), 1, 12, ("small", "large"))
    atlas = _atlases(text)[1]  # of stride 16, which is drawn cell by cell
    level = levels[1]
    height, width = level.teacher.shape[1:]
    assert atlas.shape == (2 * height, 13 * width)
    ranked = level.r.argsort().tolist()
    for side, maps in enumerate((level.teacher, level.student)):
        for place, channel in enumerate(ranked, start=1):
            tile = atlas[side * height : (side + 1) * height, place * width : (place + 1) * width]
            expected = ((maps[channel].clamp(-3, 3) + 3) / 6 * 255).round()
            assert (tile.float() - expected).abs().max() <= 1
        strongest = atlas[side * height : (side + 1) * height, :width]
        assert strongest.argmax() == maps.amax(0).argmax() and (strongest.min(), strongest.max()) == (0, 255)
    views = re.findall(r'viewBox="(\d+) (\d+) (\d+) (\d+)" preserveAspectRatio="none"><use href="#maps-1"', text)
    assert [tuple(map(int, view)) for view in views] == [
        (place * width, side * height, width, height) for place in range(13) for side in (0, 1)
    ]


def test_large_maps_are_averaged_and_more_channels_than_there_are_are_all(levels):
    fine = levels[0]
    assert max(fine.teacher.shape[1:]) > 48
    text = responses_section([fine], torch.zeros(3, 40, 60, dtype=torch.uint8), 1, 99, ("a", "b"))
    (atlas,) = _atlases(text)
    assert atlas.shape[1] == 13 * 48 and text.count("<figcaption>channel ") == 12


def test_widths_that_differ_are_said(levels):
    mapped = [levels[0]._replace(mapped=7), levels[1]]
    text = responses_section(mapped, torch.zeros(3, 4, 4, dtype=torch.uint8), 1, 2, ("a <b>", "t"))
    assert "(7 and 12 at stride 8)" in text and "flatters r" in text and "a &lt;b&gt;" in text and "a <b>" not in text
