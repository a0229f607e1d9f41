"""`jdkd show`."""

import json
import re
import shutil

import pytest

from jdkd.detect import load, save
from jdkd.report.layout import GENERATOR
from tests.cli.test_refusals import _refused
from tests.detectors import detector, small_spec


def _rows(page):
    """File names and F1 of the first detector, in order."""
    return re.findall(r"<h3>([^<]+\.png)</h3>.*?: F1 ([\d.]+);", page)


def test_detectors_stand_side_by_side_with_the_worst_images_of_the_first_on_top(jdkd, trained, squares, tmp_path):
    twin = tmp_path / "elsewhere" / trained.name  # of the same name, in another folder
    shutil.copytree(trained, twin)
    out = tmp_path / "seen.html"
    answer = jdkd("show", trained, twin, "--data", squares, "--out", out, "--images", 3, "--threshold", 0.0)
    assert answer.code == 0, answer.err
    page = out.read_text()
    scores = [float(score) for _, score in _rows(page)]
    assert len(scores) == 3 and scores == sorted(scores)
    assert f"{trained}: F1" in page and f"{twin}: F1" in page and "1 more image is not shown" in page
    first, second, last = answer.out.splitlines()
    assert re.fullmatch(rf"{trained} finds \d of 4 boxes on 4 images, and \d+ detections are wrong: F1 .* on\.", first)
    assert second.startswith(str(twin)) and last == str(out)
    for forbidden in ("http", "<link", "src=", "url("):
        assert forbidden not in page


def test_classes_of_other_names_are_told_apart(jdkd, squares, tmp_path):
    save(tmp_path / "other", detector(small_spec(classes=("left", "right"))))
    answer = jdkd("show", tmp_path / "other", "--data", squares, "--out", tmp_path / "seen.html", "--images", 1)
    assert (
        answer.code == 0 and "other was made for left, right; its label k counts as the k-th of red, blue" in answer.err
    )


def test_with_a_teacher_the_channels_of_both_are_shown(jdkd, trained, squares, tmp_path):
    model = load(trained)
    teacher = detector(small_spec(classes=("red", "blue")), seed=2)
    assert teacher.backbone.fpn.layer_blocks[0][0].out_channels == model.backbone.fpn.layer_blocks[0][0].out_channels
    save(tmp_path / "teacher", teacher)
    out = tmp_path / "seen.html"
    arguments = ("show", trained, "--data", squares, "--out", out, "--teacher", tmp_path / "teacher", "--channels", 3)
    answer = jdkd(*arguments, "--split", "train", "--images", 2)
    assert answer.code == 0, answer.err
    page = out.read_text()
    assert "teacher teacher on the left and base on the right" in page and "over 2 images" in page
    assert re.findall(r"<h3>stride (\d+)</h3>", page) == ["4", "8", "16", "32"]
    assert page.count("<figcaption>channel ") == 12 and "on 12 images" in answer.out


def test_a_detector_that_a_function_makes_is_shown(jdkd, squares, tmp_path, monkeypatch):
    (tmp_path / "of_mine.py").write_text(
        "from tests.detectors import detector, small_spec\n"
        "def net(num_classes):\n    return detector(small_spec(classes=('red', 'blue')))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    answer = jdkd("show", "of_mine:net", "--data", squares, "--out", tmp_path / "seen.html")
    assert answer.code == 0 and "of_mine:net finds" in answer.out, answer.err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--out", None), ("--out is missing",)),
        (("--out", "seen.png"), ("--out is", "ends with .html")),
        (("--out", "no/where/seen.html"), ("--out", "cannot be written")),
        (("--threshold", 1.5), ("--threshold is 1.5", "from 0 to 1")),
        (("--images", 0), ("--images", "0")),
        (("--channels", -1), ("--channels", "-1")),
        (("--batch-size", 0), ("--batch-size", "0")),
        (("--teacher", "none"), ("none is no folder of a detector", "jdkd import")),
        (("--device", "gpu"), ("--device", "'gpu'")),
        (("--data", "nowhere"), ("--data nowhere", "COCO layout")),
    ],
)
def test_bad_flags_leave_no_file(jdkd, trained, squares, tmp_path, monkeypatch, change, words):
    monkeypatch.chdir(tmp_path)
    flags = {"--data": squares, "--out": "seen.html"} | dict([change])
    given = [word for flag, value in flags.items() if value is not None for word in (flag, value)]
    _refused(jdkd("show", trained, *given), *words)
    assert not [*tmp_path.iterdir()]


def test_detectors_that_cannot_be_shown_are_refused_and_an_older_page_stays(jdkd, trained, squares, tmp_path):
    out = tmp_path / "seen.html"
    out.write_text("<html>somebody's page</html>")
    arguments = ("--data", squares, "--out", out)
    _refused(jdkd("show", trained, *arguments), "cannot be written: it holds something else")
    out.write_text(f"{GENERATOR} an older page")
    _refused(jdkd("show", *arguments), "no detector is given")
    for name in ("fcos_resnet50_fpn", "fcos:resnet18"):
        _refused(jdkd("show", name, *arguments), f"{name} is no folder of a detector", "fresh weights")
    save(tmp_path / "three", detector(small_spec()))
    _refused(jdkd("show", tmp_path / "three", *arguments), "the detector knows 3 classes and the dataset has 2")
    _refused(jdkd("show", trained, tmp_path, *arguments), tmp_path, "architecture.json")
    lone = tmp_path / "lone"
    shutil.copytree(trained, lone)
    known = json.loads((lone / "architecture.json").read_text())
    known["arguments"]["min_size"] = known["arguments"]["max_size"] = 64
    (lone / "architecture.json").write_text(json.dumps(known))
    (lone / "weights.safetensors").write_bytes(b"none")
    _refused(jdkd("show", trained, "--teacher", lone, *arguments), "weights.safetensors")
    assert out.read_text() == f"{GENERATOR} an older page"
