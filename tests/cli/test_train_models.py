"""`jdkd train --model`: detectors by name, family and backbone, function or folder."""

import json

import pytest
import torch
from torchvision.models import mobilenet_v3_small

import tests.detectors
from jdkd.detect import detector, load, save

TINY = ("--steps", 2, "--batch-size", 2, "--min-size", 64, "--max-size", 64, "--width", 0.125, "--fpn", 32)
MODELS = {
    "fcos": ("fcos_resnet50_fpn", "--backbone", "mobilenet_v3_small"),
    "retinanet": ("retinanet", "--backbone", "resnet18", "--pyramid", "P2-P6", "--norm", "frozen"),
    "ssdlite": ("ssdlite", "--backbone", "mobilenet_v3_small"),
    "fasterrcnn": ("fasterrcnn", "--backbone", "mobilenet_v3_small", "--box-head", 64),
}
MINE = """
from jdkd.detect import detector

def net(num_classes):
    model = detector("ssd", "mobilenet_v3_small", num_classes - 1, channels=32, min_size=64)
    del model.architecture
    return model
"""

NO_DETECTORS = """
from torch import nn

class NoTargets(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, images):
        return [self.conv(image) for image in images]

class NoLosses(NoTargets):
    def forward(self, images, targets=None):
        return super().forward(images)
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("torch.nn:ReLU", "ReLU has no parameter that can be trained"),
        ("nodetectors:NoTargets", "NoTargets does not train on a list of images [3, H, W] and one of targets"),
        ("nodetectors:NoLosses", "NoLosses returned a list while training"),
    ],
)
def test_what_does_not_train_is_refused_before_anything_is_written(jdkd, squares, tmp_path, monkeypatch, name, words):
    (tmp_path / "nodetectors.py").write_text(NO_DETECTORS)
    monkeypatch.syspath_prepend(tmp_path)
    answer = jdkd("train", "--model", name, "--steps", 1, "--data", squares, "--out", tmp_path / "out")
    assert answer.code == 2 and words in answer.err and "jdkd.detect.adopt" in answer.err
    assert "Traceback" not in answer.err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", MODELS)
def test_a_model_is_trained_scored_and_carried_on(jdkd, squares, tmp_path, family):
    arguments = ("train", "--model", *MODELS[family], *TINY, "--data", squares, "--out", tmp_path / "out")
    answer = jdkd(*arguments, "--max-detections", 7)
    assert answer.code == 0, answer.err
    known = json.loads((tmp_path / "out" / "architecture.json").read_text())
    assert known["builder"] == "jdkd.detect:detector" and known["classes"] == ["red", "blue"]
    assert known["arguments"]["family"] == family and known["arguments"]["backbone"] == MODELS[family][2]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["identity"]["architecture"] == known
    summary = json.loads((tmp_path / "out" / "train.json").read_text())
    assert summary["train_steps"] == 2 and all(torch.tensor([*summary["losses"].values()]).isfinite())
    scored = json.loads(jdkd("eval", tmp_path / "out", "--data", squares).out.splitlines()[-1])
    assert scored["stats"] == pytest.approx(summary["stats"]) and scored["max_detections"] == 7
    before = (tmp_path / "out" / "weights.safetensors").read_bytes()
    assert jdkd(*arguments, "--max-detections", 7, "--resume").code == 0
    assert (tmp_path / "out" / "weights.safetensors").read_bytes() == before
    other = jdkd(*arguments, "--resume")
    assert other.code == 2 and "architecture.arguments.max_detections was 7 and is 100" in other.err


def test_a_folder_is_trained_on_for_the_classes_of_other_data(jdkd, squares, tmp_path):
    tiny = ("--steps", 1, "--batch-size", 2, "--data", squares)
    assert jdkd("train", "--model", *MODELS["fcos"], *TINY, "--data", squares, "--out", tmp_path / "one").code == 0
    for split in ("train", "val"):
        file = squares / "annotations" / f"instances_{split}2017.json"
        content = json.loads(file.read_text())
        content["categories"].append({"id": 3, "name": "green"})
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    three = [
        *("--train-images", squares / "train2017", "--train-annotations", tmp_path / "train.json"),
        *("--val-images", squares / "val2017", "--val-annotations", tmp_path / "val.json"),
    ]
    answer = jdkd("train", "--model", tmp_path / "one", *tiny[:4], *three, "--out", tmp_path / "two", "--lr", 0)
    assert answer.code == 0, answer.err
    assert "cls_logits (3 outputs, now 4)" in answer.err and answer.err.count("made anew") == 1
    one, two = load(tmp_path / "one"), load(tmp_path / "two")
    changed = {n for n, p in two.named_parameters() if not torch.equal(p, dict(one.named_parameters())[n])}
    assert {name.rpartition(".")[0] for name in changed} == {"head.classification_head.cls_logits"}
    assert two.architecture.classes == ("red", "blue", "green")


def test_a_function_is_told_how_many_classes_there_are(jdkd, squares, tmp_path, monkeypatch):
    (tmp_path / "mine_to_train.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    flags = ("--steps", 1, "--batch-size", 2, "--data", squares, "--out", "out", "--max-detections", 5)
    answer = jdkd("train", "--model", "mine_to_train:net", *flags)
    assert answer.code == 0 and "made anew" not in answer.err, answer.err
    known = json.loads((tmp_path / "out" / "architecture.json").read_text())
    assert known["builder"] == "mine_to_train:net" and known["arguments"] == {"num_classes": 3}
    assert known["attributes"] == {"detections_per_img": 5}


def test_weights_of_torchvision_come_by_name_from_the_cache(jdkd, squares, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    run = ("train", "--model", "fcos", "--backbone", "mobilenet_v3_small", *TINY, "--data", squares)
    answer = jdkd(*run, "--out", tmp_path / "out", "--weights", "DEFAULT")
    assert answer.code == 2 and "cannot be fetched (no network)" in answer.err and not (tmp_path / "out").exists()
    (file,) = [word for word in answer.err.split() if word.endswith(".pth")][:1]
    torch.manual_seed(0)
    state = mobilenet_v3_small().state_dict()
    (tmp_path / "home" / "hub" / "checkpoints").mkdir(parents=True, exist_ok=True)
    torch.save(state, file)
    answer = jdkd(*run, "--out", tmp_path / "out", "--weights", "DEFAULT", "--lr", 0)
    assert answer.code == 0 and "DEFAULT: 234 tensors loaded" in answer.out, answer.err
    ours = load(tmp_path / "out").backbone.body.stage1[0][0].weight
    assert torch.equal(ours, state["features.0.0.weight"][: len(ours)])
    torch.save({name: t for name, t in state.items() if "num_batches" not in name}, tmp_path / "frozen.pth")
    for norm, builder in (((), "with_frozen_norms"), (("--norm", "batch"), "detector")):
        out = tmp_path / builder
        answer = jdkd(*run, "--out", out, "--weights", tmp_path / "frozen.pth", *norm)
        assert answer.code == 0 and ("counts no batches" in answer.err) == (not norm), answer.err
        assert json.loads((out / "architecture.json").read_text())["builder"] == f"jdkd.detect:{builder}"


def refuse(*arguments, **options):
    raise OSError("no network")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--model", "yolo"), "'yolo' is no folder with an architecture.json"),
        (("--model", "fcos"), "give a backbone too"),
        (("--model", "fcos", "--backbone", "resnet19"), "backbone 'resnet19' is none of"),
        (("--model", "fcos", "--backbone", "resnet18", "--norm", "layer"), "norm must be one of"),
        (("--model", "fcos", "--backbone", "swin_t", "--norm", "frozen"), "leave norm out"),
        (("--model", "ssd", "--backbone", "resnet18", "--pyramid", "P3-P7"), "ssd has no pyramid"),
        (("--model", "ssd", "--backbone", "mobilenet_v3_small", "--width", 2), "width is 2"),
        (("--model", "fcos", "--backbone", "resnet18", "--box-head", 64), "fcos has no box_head"),
        (("--model", "fcos", "--backbone", "resnet18", "--weights", "COCO_V1"), "has no weights COCO_V1 for this"),
        ((), "--model is missing"),
        (("--model", "nets/my.py:net"), "'nets/my.py:net' names a file; give its module, my:net"),
        (("--model", "ssdlite", "--backbone", "mobilenet_v3_small", "--train-sizes", 64), "leave the sizes to train"),
    ],
)
def test_what_does_not_go_together_is_said_before_anything_is_written(jdkd, squares, tmp_path, flags, words):
    answer = jdkd("train", *flags, "--data", squares, "--out", tmp_path / "out")
    assert answer.code == 2 and words in answer.err and "Traceback" not in answer.err, answer.err
    assert not (tmp_path / "out").exists()


def test_a_training_of_no_detector_is_refused_before_the_data_are_read(jdkd, tmp_path):
    answer = jdkd("train", "--data", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert answer.code == 2 and "--model is missing" in answer.err


def test_folders_keep_what_they_are(jdkd, squares, trained, tmp_path):
    run = ("train", "--model", trained, "--data", squares, "--steps", 1, "--batch-size", 2, "--out", tmp_path / "out")
    answer = jdkd(*run, "--backbone", "resnet18")
    assert answer.code == 2 and "is a folder, whose detector has its own backbone" in answer.err
    assert not (tmp_path / "out").exists()
    answer = jdkd(*run, "--min-size", 96)
    assert answer.code == 0, answer.err
    assert load(tmp_path / "out").transform.min_size == (96,)


def test_a_run_is_of_the_weights_that_it_begins_with(tmp_path):
    from jdkd.cli.detectors import DetectorFlags

    folder = tmp_path / "one"
    save(folder, tests.detectors.detector(tests.detectors.small_spec()))
    assert DetectorFlags().built(str(folder), tests.detectors.CLASSES, 0)[1] == folder / "weights.safetensors"
    given = folder / "weights.safetensors"
    assert DetectorFlags(weights=given).built(str(folder / "architecture.json"), tests.detectors.CLASSES, 0)[1] == given


def test_synchronised_norms_are_explained_where_nothing_synchronises(jdkd, squares, tmp_path):
    run = (
        "train",
        "--model",
        *MODELS["ssdlite"],
        *TINY,
        "--norm",
        "sync",
        "--data",
        squares,
        "--out",
        tmp_path / "out",
    )
    answer = jdkd(*run, "--device", "cpu")
    assert answer.code == 0 and "this is one process on cpu, where it does what batch does" in answer.err


def test_inspect_and_import_take_a_backbone(jdkd, tmp_path):
    name = ("retinanet_resnet50_fpn", "--backbone", "mobilenet_v3_small")
    answer = jdkd("inspect", *name, "--no-verify")
    assert answer.code == 0 and "backbone.body.stage4" in answer.out, answer.err
    answer = jdkd("import", *name, "--classes", "a", "b", "--out", tmp_path / "it")
    assert answer.code == 0 and load(tmp_path / "it").head.classification_head.num_classes == 3


def test_a_base_that_does_not_train_is_refused_before_a_search_begins(jdkd, squares, tmp_path, monkeypatch):
    (tmp_path / "nodetectors.py").write_text(NO_DETECTORS)
    monkeypatch.syspath_prepend(tmp_path)
    imported = jdkd("import", "nodetectors:NoTargets", "--classes", "red", "blue", "--out", tmp_path / "base")
    assert imported.code == 0, imported.err
    given = ("--data", squares, "--steps", 24, "--candidates", 2)
    answer = jdkd("search", "--base", tmp_path / "base", *given, "--out", tmp_path / "out")
    assert answer.code == 2 and "NoTargets does not train" in answer.err and "Traceback" not in answer.err
    assert not (tmp_path / "out").exists()


def test_scoring_on_classes_of_other_names_is_said(jdkd, squares, tmp_path):
    model = detector("fcos", "mobilenet_v3_small", ("left", "right"), channels=32, min_size=64)
    save(tmp_path / "named", model)
    answer = jdkd("eval", tmp_path / "named", "--data", squares)
    assert answer.code == 0 and "was made for left, right; its label k counts as the k-th of red, blue" in answer.err
