"""A COCO-format folder of coloured squares, and commands run in this process."""

import json
from collections import namedtuple
from dataclasses import replace

import pytest
from PIL import Image, ImageDraw

from tests.detectors import tiny_spec

Answer = namedtuple("Answer", "code out err")


def _split(folder, name, count, first, size=(64, 64)):
    images, annotations = [], []
    (folder / f"{name}2017").mkdir(parents=True)
    for number in range(first, first + count):
        left, top, side = 4 + 3 * (number % 8), 6 + 2 * (number % 5), 20
        picture = Image.new("RGB", size, (90, 90, 90))
        label = number % 2 + 1
        square = (left, top, left + side - 1, top + side - 1)
        ImageDraw.Draw(picture).rectangle(square, fill=((250, 40, 40), (40, 40, 250))[label - 1])
        picture.save(folder / f"{name}2017" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": size[0], "height": size[1]})
        box = {"bbox": [left, top, side, side], "area": side * side, "iscrowd": 0}
        annotations.append({"id": number, "image_id": number, "category_id": label, **box})
    categories = [{"id": 1, "name": "red"}, {"id": 2, "name": "blue"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / f"instances_{name}2017.json").write_text(json.dumps(content))


@pytest.fixture(scope="session")
def squares(tmp_path_factory):
    folder = tmp_path_factory.mktemp("squares")
    _split(folder, "train", 12, 1)
    _split(folder, "val", 4, 101)
    return folder


@pytest.fixture
def oblong_squares(tmp_path):
    """The same on images 192 wide and 60 high."""
    _split(tmp_path / "oblong", "train", 12, 1, size=(192, 60))
    _split(tmp_path / "oblong", "val", 6, 101, size=(192, 60))
    return tmp_path / "oblong"


@pytest.fixture
def jdkd(capfd, monkeypatch):
    """Run a command: exit code, stdout, stderr. What it times is not warmed up for seconds before."""
    from jdkd.cli import main
    from jdkd.latency import QUICK, REPORTED

    monkeypatch.setattr("jdkd.latency.REPORTED", replace(REPORTED, warmup_seconds=0, warmup_limit=0))
    monkeypatch.setattr("jdkd.latency.protocol.QUICK", replace(QUICK, warmup_limit=0))

    def run(*argv):
        argv = [str(word) for word in argv]
        monkeypatch.setattr("sys.argv", ["jdkd", *argv])
        capfd.readouterr()
        try:
            code = main(argv)
        except SystemExit as end:
            code = end.code
        return Answer(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory):
    """The architecture of a tiny detector of the squares."""
    file = tmp_path_factory.mktemp("tiny") / "tiny.json"
    file.write_text(tiny_spec(("red", "blue")).to_json())
    return file


@pytest.fixture(scope="session")
def train_arguments(squares, tiny_file):
    """`jdkd train` of it for three steps, all but --out."""
    sizes = ["--min-size", "64", "--max-size", "64"]
    return ["train", "--model", str(tiny_file), *sizes, "--data", str(squares), "--steps", "3", "--batch-size", "2"]


@pytest.fixture(scope="session")
def trained(train_arguments, tmp_path_factory):
    """A folder that `jdkd train` wrote."""
    from jdkd.cli import main

    folder = tmp_path_factory.mktemp("trained") / "base"
    assert main([*train_arguments, "--out", str(folder)]) == 0
    return folder
