import base64
import io

import pytest
import torch
from PIL import Image

from jdkd.report import read_outcome
from jdkd.report.pictures import Box, box_mark
from jdkd.report.responses import responses_section
from jdkd.report.search_page import page
from jdkd.report.seen import Sight, seen_page
from jdkd.train.image_scores import judge
from tests.report.browser import Browser, found
from tests.report.made_up import levels_of, make_search

pytestmark = pytest.mark.skipif(found() is None, reason="no Chromium is installed")
SEEN = "[...document.querySelectorAll('{}')].filter(one => !one.hasAttribute('hidden')).length"


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages of a finished search, of one under way, and of a large one."""
    folder = tmp_path_factory.mktemp("pages")
    kinds = {"finished": {}, "running": {"finished": False}, "large": {"count": 60, "seed": 3}}
    for name, how in kinds.items():
        (folder / f"{name}.html").write_text(page(read_outcome(make_search(folder / name, **how))))
    return {name: folder / f"{name}.html" for name in kinds}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.mark.parametrize("name", ["finished", "running", "large"])
@pytest.mark.parametrize("width", [1280, 390])
def test_pages_open_without_complaint_and_ask_for_nothing(browser, pages, name, width):
    browser.open(pages[name], width)
    assert browser.complaints == []
    assert [each for each in browser.requests if not each.startswith("data:")] == [pages[name].as_uri()]
    assert browser.run("document.querySelectorAll('section h2').length") >= 6
    assert browser.run("document.documentElement.scrollWidth") <= width  # wide things scroll by themselves


@pytest.fixture(scope="module")
def seen(tmp_path_factory, digits):
    """A page of what two detectors see, and of what the channels of one and of its teacher respond to."""
    _, val = digits
    images = [judge(target["boxes"][1:], target["labels"][1:], torch.ones(len(target["labels"]))[1:], target)
              for _, target in val]  # fmt: skip
    sights = [Sight("a_name_that_is_one_word_" * 5, images, 0.5), Sight("base", images[::-1], 0.5)]
    responses = responses_section(levels_of(), val[0][0], 4, 4, ("student", "teacher"))
    page = tmp_path_factory.mktemp("seen") / "seen.html"
    page.write_text(seen_page(val, sights, 3, responses=responses, command=["jdkd", "show", "x" * 200]))
    return page


def _halves(browser, element):
    """The left and the right half of an element, as they are seen."""
    place = f"(({{x, y, width, height}}) => ({{x, y: y + scrollY, width, height}}))({element}.getBoundingClientRect())"
    clip = browser.run(place) | {"scale": 1}
    shot = browser.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
    picture = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
    width, height = picture.size
    return picture.crop((2, 2, width // 2 - 3, height - 2)), picture.crop((width // 2 + 4, 2, width - 2, height - 2))


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_what_is_seen_opens_without_complaint_and_fits(browser, seen, width, dark):
    browser.open(seen, width, dark=dark)
    assert browser.complaints == []
    assert [each for each in browser.requests if not each.startswith("data:")] == [seen.as_uri()]
    assert browser.run("[...document.querySelectorAll('section h2')].map(one => one.textContent)") == [
        *("The worst images", "What the channels respond to", "How it was made")
    ]
    assert browser.run("document.documentElement.scrollWidth") <= width
    for number in (0, 7):  # pairs of the first and of the second level
        for half in _halves(browser, f"document.querySelectorAll('.maps figure > svg')[{number}]"):
            assert len(half.getcolors(1 << 16)) > 30  # a map is there, not an empty frame
    ink, ground = (browser.run(f"getComputedStyle(document.body).{what}") for what in ("color", "backgroundColor"))
    assert (ground == "rgb(20, 22, 26)") == dark and ink != ground


@pytest.mark.parametrize(
    "planted", ["console.error('no')", "nowhere()", "fetch('file:///nowhere')", "new Image().src='x'"]
)
def test_a_planted_error_is_seen(browser, tmp_path, planted):
    page = tmp_path / "planted.html"
    page.write_text(f"<!doctype html><body><script>{planted}</script>")
    browser.open(page)
    assert browser.complaints or len(browser.requests) > 1


def test_the_slider_takes_the_search_back_in_time(browser, pages):
    browser.open(pages["finished"])
    points, fronts = SEEN.format("#front [data-g]"), SEEN.format("#front [data-at]")
    assert (browser.run(points), browser.run(fronts), browser.run(SEEN.format("#front .chosen"))) == (21, 1, 2)
    move = "slider.value = 1; slider.dispatchEvent(new Event('input'))"
    browser.run(move)
    early = browser.run("[...document.querySelectorAll('#front [data-g]')].filter(one => one.dataset.g <= 1).length")
    assert (browser.run(points), browser.run(fronts), browser.run(SEEN.format("#front .chosen"))) == (early, 1, 0)
    assert browser.run("document.querySelector('.slider output').textContent").startswith("generation 1 of 6, 4 cand")
    assert 1 < early < 21 and browser.complaints == []
    browser.run("dispatchEvent(new Event('beforeprint'))")
    assert browser.run(points) == 21 and browser.run("document.querySelector('details').open")


def test_dark_pages_are_dark_and_paper_is_white(browser, pages):
    ground = "getComputedStyle(document.body).backgroundColor"
    browser.open(pages["finished"], dark=True)
    assert browser.run(ground) == "rgb(20, 22, 26)"
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.run(ground) == "rgb(255, 255, 255)"
    browser.open(pages["finished"])
    assert browser.run(ground) == "rgb(255, 255, 255)"


def test_words_on_a_picture_are_as_small_as_they_are_meant(browser, tmp_path, pages):
    box = box_mark(Box((8.0, 8.0, 20.0, 20.0), "cat", "found"), 48)
    text = pages["finished"].read_text().replace("</body>", f'<svg viewBox="0 0 48 48">{box}</svg></body>')
    (tmp_path / "page.html").write_text(text)
    browser.open(tmp_path / "page.html")
    assert browser.run("getComputedStyle(document.querySelector('.box text')).fontSize") == "2px"


def test_tables_fit_on_paper(browser, pages):
    browser.open(pages["large"], 718)  # A4 between its margins
    browser.run("dispatchEvent(new Event('beforeprint'))")
    browser.call("Emulation.setEmulatedMedia", media="print")
    wide = "[...document.querySelectorAll('table')].filter(one => one.getBoundingClientRect().right > 718).length"
    assert browser.run("document.querySelectorAll('table').length") >= 4 and browser.run(wide) == 0


def test_every_mark_lies_inside_its_drawing(browser, pages):
    browser.open(pages["large"])
    outside = """[...document.querySelectorAll('svg.chart [data-g], svg.chart circle, svg.chart rect')].filter(one => {
        const own = one.getBoundingClientRect(), all = one.ownerSVGElement.getBoundingClientRect();
        return own.left < all.left - 1 || own.right > all.right + 1 || own.top < all.top - 1
            || own.bottom > all.bottom + 1;
    }).length"""
    assert browser.run("document.querySelectorAll('svg.chart [data-g]').length") > 50
    assert browser.run(outside) == 0
