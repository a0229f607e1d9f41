import json

import pytest

SMALL = """
from tests.detectors import build, tiny_spec

def net(classes=2):
    model = build(tiny_spec(("x",) * classes))
    del model.architecture
    return model
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    (tmp_path / "small_nets.py").write_text(SMALL)
    monkeypatch.chdir(tmp_path)
    return "small_nets:net"


def test_what_is_imported_is_inspected_scored_and_timed(jdkd, small, trained, squares, tmp_path):
    (tmp_path / "names.txt").write_text("red\nblue\n\n")
    weights = trained / "weights.safetensors"
    answer = jdkd("import", small, "--weights", weights, "--classes", tmp_path / "names.txt", "--out", tmp_path / "it")
    assert answer.code == 0, answer.err
    content = json.loads((tmp_path / "it" / "architecture.json").read_text())
    assert content["classes"] == ["red", "blue"] and content["builder"] == small
    inspected = jdkd("inspect", tmp_path / "it", "--height", 64, "--width", 64)
    assert inspected.code == 0 and "can be cut" in inspected.out, inspected.err
    scores = {}
    for folder in (trained, tmp_path / "it"):
        answer = jdkd("eval", folder, "--data", squares, "--device", "cpu")
        assert answer.code == 0, answer.err
        scores[folder] = json.loads(answer.out.splitlines()[-1])
    ours, theirs = scores.values()
    assert (
        len(theirs["architecture"]) == 64 and ours.pop("architecture") != theirs.pop("architecture") and ours == theirs
    )
    quick = ("--rounds", 1, "--seconds", 0, "--data", squares, "--device", "cpu")
    assert jdkd("latency", trained, tmp_path / "it", *quick).code == 0


def test_what_is_said_of_predictors_that_are_made_anew(jdkd, small, tmp_path):
    answer = jdkd("import", small, "--classes", "cat", "dog", "bird", "--out", tmp_path / "it")
    assert answer.code == 0 and "cls_score (3 outputs, now 4)" in answer.err
    content = json.loads((tmp_path / "it" / "architecture.json").read_text())
    assert content["classes"] == ["cat", "dog", "bird"]
    assert content["shapes"]["roi_heads.box_predictor.bbox_pred.weight"] == [16, 16]


def test_a_file_without_names_is_no_classes(jdkd, small, tmp_path):
    (tmp_path / "names.txt").write_text("\n \n")
    answer = jdkd("import", small, "--classes", tmp_path / "names.txt", "--out", tmp_path / "it")
    assert answer.code == 2 and "names.txt holds no name" in answer.err and not (tmp_path / "it").exists()


def test_a_one_stage_detector_is_scored_for_its_classes_alone(jdkd, squares, tmp_path):
    name = "ssdlite320_mobilenet_v3_large"
    assert jdkd("import", name, "--classes", "red", "blue", "--out", tmp_path / "two").code == 0
    answer = jdkd("eval", tmp_path / "two", "--data", squares, "--device", "cpu", "--max-detections", 5)
    content = json.loads(answer.out.splitlines()[-1])
    assert answer.code == 0 and content["gmacs"] > 0.1 and len(content["architecture"]) == 64
    file = tmp_path / "two" / "architecture.json"
    text = json.loads(file.read_text())
    for classes, words in ((["red", "blue", "green"], "knows 3 classes"), (["blue", "red"], "in the order blue, red")):
        file.write_text(json.dumps({**text, "classes": classes}))
        answer = jdkd("eval", tmp_path / "two", "--data", squares, "--device", "cpu")
        assert answer.code == 2 and words in answer.err, answer.err


def test_what_is_imported_is_trained(jdkd, small, squares, tmp_path):
    assert jdkd("import", small, "--classes", "red", "blue", "--out", tmp_path / "it").code == 0
    run = ("--data", squares, "--steps", 1, "--batch-size", 2, "--out", tmp_path / "train")
    assert jdkd("train", "--model", tmp_path / "it", *run).code == 0
    content = json.loads((tmp_path / "train" / "architecture.json").read_text())
    assert content == json.loads((tmp_path / "it" / "architecture.json").read_text())


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("--out is missing", ["small_nets:net"]),
        ("none of torchvision's detectors", ["yolo", "--out", "it"]),
        ("does not exist", ["small_nets:net", "--weights", "gone.pth", "--out", "it"]),
        ("each once", ["small_nets:net", "--classes", "a", "a", "--out", "it"]),
        ("full already holds weights.safetensors", ["small_nets:net", "--out", "full"]),
        ("--out small_nets.py cannot be a folder", ["small_nets:net", "--out", "small_nets.py"]),
        ("not UTF-8", ["small_nets:net", "--classes", "full/weights.safetensors", "--out", "it"]),
    ],
)
def test_bad_imports_are_refused_before_anything_is_written(jdkd, small, tmp_path, words, arguments):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "weights.safetensors").write_bytes(b"\xff\xff")
    answer = jdkd("import", *arguments)
    assert answer.code == 2 and words in answer.err, answer.err
    assert not (tmp_path / "it").exists()
