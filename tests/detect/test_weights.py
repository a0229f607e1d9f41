"""Weights that others have saved find their place, or are refused with what is wrong with them."""

import argparse
import collections
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel
from torchvision.models import resnet18

from jdkd.detect import detector as families
from jdkd.detect import load_weights
from jdkd.detect.weights import weights_hash
from jdkd.errors import InputError
from tests.detectors import CLASSES, build, detector, small_spec

OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}


@pytest.fixture(scope="module")
def state():
    return detector(small_spec()).state_dict()


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def averaged(state):
    model = build(small_spec())
    model.load_state_dict(state)
    return AveragedModel(model).state_dict()


CHECKPOINTS = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "optimizer": OPTIMIZER},
    "model_state_dict": lambda state: {"epoch": torch.tensor(3), "model_state_dict": state, "loss": 0.3},
    "model": lambda state: {"model": state},
    "ema": lambda state: {"ema": {"module": state, "updates": 7}, "optimizer": OPTIMIZER},
    "a name of its own": lambda state: {"detector": state, "optimizer": OPTIMIZER},
    "nested": lambda state: {"state_dict": {"model": {"state_dict": state}}},
    "torchvision reference": lambda state: {
        "model": state,
        "optimizer": OPTIMIZER,
        "lr_scheduler": {"milestones": collections.Counter([16, 22]), "_last_lr": [np.float64(0.1)]},
        "args": argparse.Namespace(lr=0.1, data_path="coco"),
        "epoch": 25,
    },
    "prefixes": lambda state: prefixed("module._orig_mod.module.", state),
    "lightning": lambda state: {"state_dict": prefixed("model._orig_mod.", state), "pytorch-lightning_version": "2"},
    "a compiled part": lambda state: {
        name.replace("backbone.", "backbone._orig_mod."): tensor for name, tensor in state.items()
    },
    "averaged": averaged,
    "half": lambda state: {name: t.half() if t.is_floating_point() else t for name, t in state.items()},
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_state_dict_is_found_wherever_it_lies(state, kind, tmp_path):
    torch.save(CHECKPOINTS[kind](state), tmp_path / "x.pth")
    model = build(small_spec())
    report = load_weights(model, tmp_path / "x.pth")
    assert not report.missing and not report.misshapen and set(report.unexpected) <= {"n_averaged"}
    rounding = 1e-3 if kind == "half" else 0.0
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=rounding, atol=rounding, msg=name)


def test_safetensors_with_prefixes_load_too(state, tmp_path):
    save_file(prefixed("module.", state), tmp_path / "x.safetensors")
    assert not load_weights(torch.nn.DataParallel(build(small_spec())), tmp_path / "x.safetensors").missing


def test_of_two_state_dicts_the_one_that_was_read_is_named(state, tmp_path):
    other = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    torch.save({"ema": other, "model": state}, tmp_path / "x.pth")
    model = build(small_spec())
    report = load_weights(model, tmp_path / "x.pth")
    assert (report.key, report.others) == ("model", ("ema",)) and "of 'model' (the file has 'ema' too)" in str(report)
    assert torch.equal(model.backbone.body.conv1.weight, state["backbone.body.conv1.weight"])


def test_a_head_of_91_classes_keeps_the_rest_and_says_what_was_left_out(tmp_path):
    theirs = detector(small_spec(classes=tuple(f"class {k}" for k in range(90))))
    torch.save({"model": theirs.state_dict()}, tmp_path / "coco.pth")
    model = build(small_spec())
    report = load_weights(model, tmp_path / "coco.pth")
    assert sorted(report.misshapen) == [
        f"roi_heads.box_predictor.{layer}.{part}" for layer in ("bbox_pred", "cls_score") for part in ("bias", "weight")
    ]
    assert "cls_score.weight ([91, 24] in the file, [4, 24] here)" in str(report)
    for part in ("backbone", "rpn", "roi_heads.box_head"):
        ours, wanted = model.get_submodule(part).state_dict(), theirs.get_submodule(part).state_dict()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in ours.items() if "num_batches" not in name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(state, value, tmp_path):
    name = "backbone.fpn.inner_blocks.1.0.bias"
    bad = {**state, name: torch.full_like(state[name], value)}
    torch.save({"model": prefixed("module.", bad)}, tmp_path / "x.pth")
    model = build(small_spec())
    before = model.backbone.body.conv1.weight.clone()
    with pytest.raises(InputError, match=rf"module\.{name} holds 16 of 16 numbers that are not finite"):
        load_weights(model, tmp_path / "x.pth")
    assert torch.equal(model.backbone.body.conv1.weight, before)


@pytest.mark.filterwarnings("ignore")  # of torch, on sparse and quantised tensors
@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (lambda t: (t * 100).to(torch.int8), r"values that are no real numbers \(torch\.int8\)"),
        (lambda t: t.to(torch.complex64), r"values that are no real numbers \(torch\.complex64\)"),
        (lambda t: t.to("meta"), "no values, only a shape"),
        (lambda t: t.to_sparse(), "a sparse matrix"),
        (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "quantised values"),
    ],
    ids=["int8", "complex", "meta", "sparse", "quantised"],
)
def test_numbers_of_another_kind_are_refused_by_name(state, changed, says, tmp_path):
    name = "roi_heads.box_head.fc6.weight"
    torch.save({**state, name: changed(state[name])}, tmp_path / "x.pth")
    with pytest.raises(InputError, match=rf"{name} holds {says}.*torch\.float32; save it as plain float tensors"):
        load_weights(build(small_spec()), tmp_path / "x.pth")


def test_weights_of_eight_bits_are_read_as_floats(state, tmp_path):
    small = {name: t.to(torch.float8_e4m3fn) if t.is_floating_point() else t for name, t in state.items()}
    torch.save(small, tmp_path / "x.pth")
    model = build(small_spec())
    load_weights(model, tmp_path / "x.pth")
    name = "backbone.body.conv1.weight"
    assert torch.equal(model.state_dict()[name], small[name].float())


def test_one_place_is_not_filled_twice(state, tmp_path):
    torch.save({**state, **prefixed("module.", state)}, tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"two tensors for backbone\.body\.conv1\.weight.*and module\.backbone"):
        load_weights(build(small_spec()), tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([1, 2], "no state dict but a list"),
        (torch.zeros(3), "no state dict but a Tensor"),
        ({}, "no state dict but nothing"),
        ({"model": None, "epoch": 3}, "no state dict but the keys model, epoch"),
        ({"optimizer": OPTIMIZER}, "no state dict but the keys optimizer"),
        ({"model": torch.nn.Linear(2, 2)}, r"pickled object \(torch\.nn\.modules\.linear\.Linear\).*state_dict\(\)"),
    ],
)
def test_a_file_without_a_state_dict_says_what_it_holds(content, says, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(InputError, match=says):
        load_weights(build(small_spec()), tmp_path / "x.pth")


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
@pytest.mark.parametrize(
    "content",
    [b"", b"version https", b"<html></html>", b"PK\x03\x04 and no more", pickle.dumps({"a": 1})],
    ids=["empty", "pointer", "page", "cut", "pickle"],
)
def test_a_file_that_is_no_checkpoint_is_named(content, name, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"weights .*{name} cannot be read \(.+\); give") as caught:
        load_weights(build(small_spec()), tmp_path / name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_archives_and_folders_are_told_from_state_dicts(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "x.pt")
    with pytest.raises(InputError, match="it is a TorchScript archive"):
        load_weights(build(small_spec()), tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"is a folder \(x\.pt\)"):
        load_weights(build(small_spec()), tmp_path)


def test_torchvision_backbone_weights_find_their_place(tmp_path):
    backbone = resnet18()
    torch.save(backbone.state_dict(), tmp_path / "resnet18.pth")
    model = families("fasterrcnn", "resnet18", CLASSES)
    report = load_weights(model, tmp_path / "resnet18.pth")
    assert torch.equal(model.backbone.body.layer3[1].conv2.weight, backbone.layer3[1].conv2.weight)
    assert report.unexpected == ("fc.weight", "fc.bias") and not report.misshapen
    assert all(not name.startswith("backbone.body") for name in report.missing)
    assert "2 unexpected: fc.weight, fc.bias" in str(report)


def test_torchvision_detector_weights_load_with_a_report_of_the_other_head(tmp_path):
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    theirs = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=7)
    torch.save({"model": theirs.state_dict()}, tmp_path / "detector.pth")
    model = families("fasterrcnn", "resnet50", CLASSES)
    report = load_weights(model, tmp_path / "detector.pth")
    assert report.misshapen and all("box_predictor" in name for name in report.misshapen)
    assert torch.equal(model.rpn.head.conv[0][0].weight, theirs.rpn.head.conv[0][0].weight)


def test_weights_of_another_architecture_are_refused(tmp_path):
    torch.save({"x": torch.zeros(3)}, tmp_path / "x.pth")
    with pytest.raises(InputError, match="nothing in"):
        load_weights(build(small_spec()), tmp_path / "x.pth")
    with pytest.raises(InputError, match="does not exist"):
        load_weights(build(small_spec()), tmp_path / "y.pth")


def test_the_hash_of_weights_knows_names_shapes_and_dtypes_and_no_wrapper():
    def made(*layers):
        model = torch.nn.Sequential(collections.OrderedDict(layers))
        for parameter in model.parameters():
            torch.nn.init.zeros_(parameter)
        return model

    plain = made(("a", torch.nn.Linear(2, 4, bias=False)))
    others = (
        made(("b", torch.nn.Linear(2, 4, bias=False))),
        made(("a", torch.nn.Linear(4, 2, bias=False))),
        made(("a", torch.nn.Linear(4, 4, bias=False))).half(),  # of as many bytes
    )
    assert weights_hash(torch.nn.DataParallel(plain)) == weights_hash(plain) and len(weights_hash(plain)) == 64
    assert len({weights_hash(model) for model in (plain, *others)}) == 4
    torch.nn.init.constant_(plain.a.weight[1], 1.0)
    assert weights_hash(plain) != weights_hash(made(("a", torch.nn.Linear(2, 4, bias=False))))
