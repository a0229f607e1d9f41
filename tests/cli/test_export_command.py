"""`jdkd export` and `jdkd predict`."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from jdkd.cli.latency import _shipped
from jdkd.data import Split
from jdkd.detect import save
from jdkd.export.runtimes import known_runtimes
from jdkd.export.writing import exported
from jdkd.files import sha256_of
from tests.export.tiny import made, pictures

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_TORCH = """
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision"):
            raise ImportError(name)

sys.meta_path.insert(0, Missing())
from jdkd.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector") / "tiny"
    save(folder, made("fcos"))
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    for number, picture in enumerate(pictures((60, 90), (80, 64))):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    return folder


def test_what_is_exported_is_checked_and_drawn_without_torch(jdkd, checkpoint, photographs, squares, tmp_path):
    file = tmp_path / "tiny.onnx"
    answer = jdkd("export", checkpoint, "--data", squares, "--out", file)
    assert answer.code == 0, answer.err
    assert "% of " in answer.out and "detections on 4 image(s) agree" in answer.out and "mAP of boxes" in answer.out
    eager = jdkd("predict", checkpoint, photographs, "--out", tmp_path / "eager", "--threshold", "0.4")
    assert eager.code == 0, eager.err
    command = [sys.executable, "-c", WITHOUT_TORCH, "predict", str(file), str(photographs), "--threshold", "0.4"]
    seen = tmp_path / "seen"
    done = subprocess.run([*command, "--out", str(seen)], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == eager.out.splitlines()[0]
    lists = [json.loads((folder / "detections.json").read_text())["images"] for folder in (tmp_path / "eager", seen)]
    for one, other in zip(*lists, strict=True):
        assert one["picture"] == other["picture"] and len(one["detections"]) == len(other["detections"]) > 0
        for ours, theirs in zip(one["detections"], other["detections"], strict=True):
            assert ours["class"] == theirs["class"] in ("red", "blue")
            assert np.allclose([*ours["box"], ours["score"]], [*theirs["box"], theirs["score"]], atol=0.01)
        with Image.open(seen / one["picture"]) as drawn, Image.open(one["file"]) as plain:
            assert drawn.size == plain.size
            assert np.abs(np.asarray(drawn, dtype=float) - np.asarray(plain, dtype=float)).max() > 60


def test_what_is_timed_in_onnxruntime_is_the_file_that_ships(jdkd, checkpoint, squares, tmp_path):
    file = tmp_path / "tiny.onnx"
    assert jdkd("export", checkpoint, "--data", squares, "--out", file).code == 0
    model = _shipped({"tiny": checkpoint})["tiny"]
    timed = known_runtimes()["onnxruntime"].prepare(model, [pictures((96, 128))], torch.device("cpu"), "float32")
    assert timed.facts["sha256_of_file"] == sha256_of(file)


def test_a_file_that_differs_is_not_written_and_the_stage_is_named(jdkd, checkpoint, squares, tmp_path, monkeypatch):
    from jdkd.export import writing

    others = writing.exported(made("fcos", seed=1), "onnx", stages=True)
    monkeypatch.setattr(writing, "exported", lambda *given, **named: others)
    file = tmp_path / "tiny.onnx"
    answer = jdkd("export", checkpoint, "--data", squares, "--out", file)
    assert answer.code == 2 and list(tmp_path.iterdir()) == []
    assert "the exported FCOS was not written: only" in answer.err
    assert "they part at level 0: values up to" in answer.err


class LowerInOpenVino:
    """In the place of OpenVINO: onnxruntime, with scores that are lower by 0.1."""

    def compile_model(self, file, device, hints):
        import onnxruntime

        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        self.session, self.outputs = session, [SimpleNamespace(any_name=each.name) for each in session.get_outputs()]
        self.inputs = [
            SimpleNamespace(
                any_name=each.name,
                partial_shape=SimpleNamespace(rank=SimpleNamespace(get_length=lambda each=each: len(each.shape))),
                element_type=SimpleNamespace(to_dtype=lambda: np.dtype(np.float32)),
            )
            for each in session.get_inputs()
        ]
        return self

    def __call__(self, feeds):
        boxes, labels, scores, *stages = self.session.run(None, feeds)
        return dict(enumerate((boxes, labels, (scores - 0.1).clip(0), *stages)))


def test_a_file_that_differs_in_openvino_alone_is_not_written(jdkd, checkpoint, squares, tmp_path, monkeypatch):
    package = ModuleType("openvino")
    package.Core, package.__spec__ = LowerInOpenVino, ModuleSpec("openvino", None)
    monkeypatch.setitem(sys.modules, "openvino", package)
    answer = jdkd("export", checkpoint, "--data", squares, "--out", tmp_path / "tiny.onnx")
    assert answer.code == 2 and list(tmp_path.iterdir()) == []
    assert "compared in openvino, the exported FCOS was not written: only" in answer.err, answer.err
    assert "they part behind it, where boxes are made and suppressed." in answer.err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--format", "pt2", "--out", "here.onnx"], "give a file that ends with .pt2"),
        (["--images", "0"], "--images is 0; compare on at least 1 image"),
        (["--out", "nowhere/model.onnx"], "--out nowhere/model.onnx cannot be written"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_export_refuses(jdkd, checkpoint, words, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(checkpoint.iterdir())
    answer = jdkd("export", checkpoint, *words)
    assert answer.code == 2 and sentence in answer.err and answer.err.count("\n") == 1
    assert sorted(checkpoint.iterdir()) == before and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_export_writes_over_its_own_files_and_no_others(jdkd, checkpoint, tmp_path, form):
    file = tmp_path / f"theirs.{form}"
    file.write_bytes(b"a network of somebody else")
    answer = jdkd("export", checkpoint, "--format", form, "--out", file, "--data", "nowhere")
    assert answer.code == 2 and "cannot be written: it holds something else, which would be lost" in answer.err
    assert file.read_bytes() == b"a network of somebody else"
    file.write_bytes(exported(made("fcos"), form))
    answer = jdkd("export", checkpoint, "--format", form, "--out", file, "--data", "nowhere")
    assert answer.code == 2 and "--data nowhere" in answer.err, "it may be written, and the next mistake is named"


def test_export_refuses_what_is_no_folder(jdkd, tmp_path):
    answer = jdkd("export", tmp_path / "none", "--out", tmp_path / "a.onnx")
    assert answer.code == 2 and "none is no folder of a detector" in answer.err


def foreign_onnx(file):
    import onnx

    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    sides = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "other", sides[:1], sides[1:])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9), file)


def test_predict_refuses(jdkd, checkpoint, photographs, tmp_path):
    out = ["--out", tmp_path / "out"]
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    (tmp_path / "broken.pt2").write_bytes(b"no model")
    (tmp_path / "empty").mkdir()
    (tmp_path / "0.png").write_bytes((photographs / "0.png").read_bytes())
    (tmp_path / "torn.png").write_bytes((photographs / "0.png").read_bytes()[:200])
    foreign_onnx(tmp_path / "foreign.onnx")
    cases = [
        ([checkpoint, photographs], "--out is missing"),
        ([checkpoint, photographs, *out, "--threshold", "2"], "--threshold is 2"),
        ([checkpoint, tmp_path / "none.png", *out], "none.png does not exist"),
        ([checkpoint, tmp_path / "empty", *out], "empty holds no image"),
        ([checkpoint, tmp_path / "torn.png", *out], "torn.png cannot be read"),
        ([tmp_path / "broken.onnx", photographs, *out], "broken.onnx: onnxruntime cannot open the file ("),
        ([tmp_path / "broken.pt2", photographs, *out], "broken.pt2: the file is damaged"),
        ([tmp_path / "missing.onnx", photographs, *out], "missing.onnx cannot be read (No such file or directory)"),
        ([tmp_path / "foreign.onnx", photographs, *out], "the file does not say how its images are resized"),
        ([tmp_path / "weights.pth", photographs, *out], "weights.pth does not exist: it must be a folder or a file of"),
        ([photographs / "0.png", checkpoint, *out], "0.png is neither a folder of a detector nor a file of"),
        ([checkpoint, photographs / "0.png", tmp_path / "0.png", *out], "would both be drawn as"),
    ]
    for words, sentence in cases:
        answer = jdkd("predict", *words)
        assert (answer.code, sentence in answer.err, answer.err.count("\n")) == (2, True, 1), (words, answer.err)
        assert not (tmp_path / "out").exists()


def test_a_folder_of_detectors_is_taken_for_none_and_one_for_a_file_must_be_there(jdkd, checkpoint, tmp_path):
    answer = jdkd("export", checkpoint.parent, "--out", tmp_path / "a.onnx")
    assert answer.code == 2 and f"it has no architecture.json (there is one in {checkpoint}); give" in answer.err
    answer = jdkd("export", checkpoint, "--out", tmp_path / "none" / "a.onnx")
    assert answer.code == 2 and f"the folder {tmp_path / 'none'} does not exist; make it, or give" in answer.err


def test_predict_says_why_nothing_is_drawn(jdkd, checkpoint, photographs, tmp_path):
    answer = jdkd("predict", checkpoint, photographs, "--out", tmp_path / "seen", "--threshold", "1")
    listed = json.loads((tmp_path / "seen" / "detections.json").read_text())["images"]
    highest = max(found["score"] for image in listed for found in image["detections"])
    said = f"on 2 image(s); the highest is {highest:.3f}: give a lower --threshold to have some drawn"
    assert answer.out.startswith(f"0 detections with a score of at least 1 {said}\n")


def test_an_interrupted_predict_does_not_deny_what_it_drew(jdkd, checkpoint, photographs, tmp_path, monkeypatch):
    from jdkd.export import drawing

    pictures = [b"drawn by jdkd predict"]

    def drawn(*given):
        if not pictures:
            raise KeyboardInterrupt
        return pictures.pop()

    monkeypatch.setattr(drawing, "drawn", drawn)
    answer = jdkd("predict", checkpoint, photographs, "--out", tmp_path / "seen")
    assert answer.code == 2 and answer.err == "jdkd: interrupted; what was not finished was not written.\n"
    assert [file.name for file in (tmp_path / "seen").iterdir()] == ["0.jpg"]


def test_predict_puts_no_picture_in_the_place_of_an_image(jdkd, checkpoint, photographs, tmp_path):
    photograph = tmp_path / "a.jpg"
    Image.open(photographs / "0.png").save(photograph)
    before = photograph.read_bytes()
    answer = jdkd("predict", checkpoint, tmp_path, "--out", tmp_path)
    assert answer.code == 2 and f"would write over {photograph}, which is one of the images" in answer.err
    assert photograph.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["a.jpg"]


def test_predict_knows_its_own_pictures_one_by_one(jdkd, checkpoint, photographs, tmp_path):
    """What a user put beside them is theirs, and they are no images to look at again."""
    folder, seen = tmp_path / "photographs", tmp_path / "photographs" / "seen"
    shutil.copytree(photographs, folder)
    assert jdkd("predict", checkpoint, folder / "0.png", "--out", seen).code == 0
    drawn = (seen / "0.jpg").read_bytes()
    (seen / "1.jpg").write_bytes((photographs / "1.png").read_bytes())
    answer = jdkd("predict", checkpoint, photographs, "--out", seen)
    assert answer.code == 2 and f"would write over {seen / '1.jpg'}, which no `jdkd predict` wrote" in answer.err
    assert (seen / "0.jpg").read_bytes() == drawn and len(list(seen.iterdir())) == 3
    (seen / "1.jpg").unlink()
    (seen / "detections.json").unlink()  # as a run leaves it that was interrupted
    answer = jdkd("predict", checkpoint, folder, "--out", seen)
    assert answer.code == 0 and "on 2 image(s)" in answer.out, answer.err
    assert f"1 picture(s) in {folder} that `jdkd predict` drew are left out" in answer.err
    assert sorted(file.name for file in seen.iterdir()) == ["0.jpg", "1.jpg", "detections.json"]


@pytest.mark.parametrize("name", ["0.jpg", "detections.json"])
def test_predict_writes_over_its_own_files_and_no_others(jdkd, checkpoint, photographs, tmp_path, name):
    theirs = tmp_path / "theirs" / name
    theirs.parent.mkdir()
    theirs.write_bytes(b"[]")
    answer = jdkd("predict", checkpoint, photographs / "0.png", "--out", theirs.parent)
    assert answer.code == 2 and f"would write over {theirs}" in answer.err and theirs.read_bytes() == b"[]"
    for _ in range(2):
        assert jdkd("predict", checkpoint, photographs / "0.png", "--out", tmp_path / "ours").code == 0


def test_strict_holds_of_the_data_that_the_detector_was_trained_on(jdkd, checkpoint, squares, tmp_path, monkeypatch):
    file = squares / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"][0] -= 1000
    (tmp_path / "over.json").write_text(json.dumps(content))
    split = Split(squares / "val2017", tmp_path / "over.json", "val")
    monkeypatch.setattr("jdkd.cli.export.recorded_split", lambda folder, name, strict: replace(split, strict=strict))
    answer = jdkd("export", checkpoint, "--strict", "--out", tmp_path / "tiny.onnx")
    assert answer.code == 2 and "--strict refuses that" in answer.err, answer.err
    assert not (tmp_path / "tiny.onnx").exists()


def test_an_image_of_which_no_pixel_would_be_left_is_named(jdkd, checkpoint, squares, tmp_path):
    Image.new("RGB", (900, 1)).save(tmp_path / "thin.png")
    answer = jdkd("predict", checkpoint, tmp_path / "thin.png", "--out", tmp_path / "seen")
    assert answer.code == 2 and "thin.png is 1x900 (height x width), of which FCOS leaves no pixel" in answer.err
    image = {"id": 1, "file_name": "thin.png", "width": 900, "height": 1}
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 1]}
    classes = json.loads((squares / "annotations" / "instances_val2017.json").read_text())["categories"]
    content = {"images": [image], "annotations": [box], "categories": classes}
    (tmp_path / "thin.json").write_text(json.dumps(content))
    data = ("--val-images", tmp_path, "--val-annotations", tmp_path / "thin.json")
    answer = jdkd("export", checkpoint, *data, "--out", tmp_path / "tiny.onnx")
    assert answer.code == 2 and "thin.png is 1x900" in answer.err, answer.err
    assert not (tmp_path / "seen").exists() and not (tmp_path / "tiny.onnx").exists()
