"""Detectors by FAMILY:BACKBONE and by a JSON file."""

import json

import pytest
import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator

from jdkd.detect import detector, load, open_model, save
from jdkd.detect.sources import has_own_weights
from jdkd.errors import InputError
from tests.detectors import CLASSES, small_spec


def test_a_family_and_a_backbone_in_one_word_are_what_both_are():
    one = open_model("fcos:mobilenet_v3_small", classes=2, channels=32, min_size=64)
    assert one.architecture == detector("fcos", "mobilenet_v3_small", 2, channels=32, min_size=64).architecture


def test_a_file_of_an_architecture_is_built_with_fresh_weights(tmp_path):
    (tmp_path / "mine.json").write_text(small_spec().to_json())
    first = open_model(str(tmp_path / "mine.json"), min_size=48)
    assert first.architecture.classes == CLASSES and first.transform.min_size == (48,)
    save(tmp_path / "folder", first)
    second = open_model(str(tmp_path / "folder" / "architecture.json"))
    assert second.architecture == first.architecture
    assert not (second.rpn.head.cls_logits.weight == first.rpn.head.cls_logits.weight).all()


def ours(num_classes=3):
    return detector("retinanet", "mobilenet_v3_small", [*"abcdef"][: num_classes - 1], channels=32, min_size=64)


def larger_anchors(num_classes=3):
    made = ours(num_classes)
    sizes = tuple(tuple(2 * size for size in level) for level in made.anchor_generator.sizes)
    made.anchor_generator = AnchorGenerator(sizes, made.anchor_generator.aspect_ratios)
    return made


def test_what_a_function_makes_of_a_detector_of_ours_is_in_its_folder(tmp_path):
    assert open_model(f"{__name__}:ours", classes=4).architecture == ours(5).architecture, "it says all"
    made = open_model(f"{__name__}:larger_anchors", classes=4)
    known = made.architecture
    assert (known.builder, known.arguments) == (f"{__name__}:larger_anchors", {"num_classes": 5})
    assert known.classes == (*"abcd",)
    save(tmp_path, made)
    again = load(tmp_path)
    pairs = zip(again.anchor_generator.cell_anchors, made.anchor_generator.cell_anchors, strict=True)
    assert all(torch.equal(*pair) for pair in pairs) and again.anchor_generator.sizes == made.anchor_generator.sizes


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("fcos:resnet18", {"backbone": "resnet34"}, "fcos:resnet18 names its backbone; leave backbone 'resnet34' out"),
        ("fcos:", {}, "backbone '' is none of"),
        ("fcoss", {}, "give fcos, if that was meant, or another of these"),
        ("yolo", {}, "(with a backbone, as FAMILY:BACKBONE); give one of these"),
        ("fcos:timm:nothing", {}, "timm"),
        ("mine.json", {"norm": "frozen"}, "is a file, whose detector has its own norm"),
        ("none.json", {}, "none.json"),
        ("list.json", {}, "must be a JSON object"),
        ("weights.pth", {}, "make a folder of it with `jdkd import MODEL --weights weights.pth --out FOLDER`"),
    ],
)
def test_what_is_not_for_them_is_refused(source, options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.json").write_text(small_spec().to_json())
    (tmp_path / "list.json").write_text(json.dumps([1]))
    (tmp_path / "weights.pth").touch()
    with pytest.raises(InputError) as caught:
        open_model(source, **options)
    assert words in str(caught.value)


def test_folders_and_functions_may_come_with_weights(tmp_path):
    assert has_own_weights(str(tmp_path)) and has_own_weights("mine:net")
    assert not any(map(has_own_weights, ("fcos:resnet18", "fcos_resnet50_fpn", "mine.json")))
