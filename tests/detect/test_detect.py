"""Detectors, their architectures and their checkpoints."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel
from torchvision.models import resnet18
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

from jdkd.detect import load, read, save
from jdkd.detect.architecture import architecture_of, identity
from jdkd.detect.contract import require_learner
from jdkd.errors import InputError
from jdkd.latency import fuse_for_inference
from jdkd.notices import Notice
from jdkd.rewrite import Architecture, Rewrite
from tests.detectors import BUILDER, CLASSES, assert_same, build, detector, outputs, small_spec


def test_a_checkpoint_rebuilds_the_detector(tmp_path):
    model = detector(small_spec())
    save(tmp_path / "a", model)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["architecture.json", "weights.safetensors"]
    again = load(tmp_path / "a")
    assert again.architecture == model.architecture and again.architecture.classes == CLASSES
    assert_same(outputs(again), outputs(model))


def test_a_rewritten_detector_is_saved_and_loaded(tmp_path):
    model = detector(small_spec())
    topology = read(model)
    child = Rewrite(keep={group.name: range(group.units - 2) for group in topology.groups}).apply(model, topology)
    assert identity(child) != identity(model)
    save(tmp_path, child)
    again = load(tmp_path)
    assert identity(again) == identity(child)
    assert_same(outputs(again), outputs(child))


def test_a_folder_without_a_detector_or_with_foreign_weights_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no architecture\.json"):
        load(tmp_path)
    save(tmp_path / "a", build(small_spec()))
    save(tmp_path / "b", build(small_spec(fpn=24)))
    (tmp_path / "b" / "architecture.json").write_text((tmp_path / "a" / "architecture.json").read_text())
    with pytest.raises(InputError, match=r"fpn.* is \[24.*in the first and \[16"):
        load(tmp_path / "b")
    (tmp_path / "a" / "weights.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match="cannot be read"):
        load(tmp_path / "a")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_backbone_can_be_traced():
    model = detector(small_spec())
    traced = torch.jit.trace(model.backbone, torch.rand(1, 3, 64, 64), strict=False)
    x = torch.rand(1, 3, 96, 64)
    ours, theirs = model.backbone(x), traced(x)
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("wrapper", [lambda model: model, nn.DataParallel, AveragedModel])
def test_a_model_without_an_architecture_is_refused_before_anything_is_written(wrapper, tmp_path):
    with pytest.raises(InputError, match=r"save takes a detector .* ResNet has none.*open_model"):
        save(tmp_path / "a", wrapper(resnet18()))
    assert not (tmp_path / "a").exists()
    save(tmp_path / "b", wrapper(detector(small_spec())))
    assert architecture_of(load(tmp_path / "b"), "this").builder == BUILDER


def replaced(model):
    model.roi_heads.box_predictor = nn.Sequential(FastRCNNPredictor(24, 9))


def masked_weight(model):
    prune.l1_unstructured(model.roi_heads.box_predictor.cls_score, "weight", 0.3)


def grown(model):
    model.extra = nn.Linear(2, 2)


def folded(model):
    return fuse_for_inference(model)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (replaced, r"box_predictor is a .*Sequential, and the builder makes a .*FastRCNNPredictor there"),
        (masked_weight, r"cls_score\.weight"),
        (grown, r"the model has the children .*extra|extra"),
        (folded, "Identity, and the builder makes a .*BatchNorm2d there"),
    ],
)
def test_what_could_not_be_loaded_again_is_not_saved(change, says, tmp_path):
    model = detector(small_spec())
    model = change(model) or model
    with pytest.raises(InputError, match=says):
        save(tmp_path / "a", model)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("place", ["file", "file/below", "link", "l" * 300])
def test_a_detector_is_not_saved_where_no_folder_can_be(place, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "x")
    with pytest.raises(InputError, match=r"the folder of the model .* cannot be a folder to write to"):
        save(tmp_path / place, detector(small_spec()))


def test_weights_that_are_not_finite_are_not_loaded_as_a_detector_that_finds_nothing(tmp_path):
    model = detector(small_spec())
    with torch.no_grad():
        model.backbone.fpn.inner_blocks[1][0].bias[3] = float("nan")
    save(tmp_path, model)
    with pytest.raises(InputError, match=r"fpn\.inner_blocks\.1\.0\.bias holds 1 of 16 numbers that are not finite"):
        load(tmp_path)


def test_an_architecture_nested_without_end_is_no_json():
    with pytest.raises(InputError, match="architecture is not JSON"):
        Architecture.from_json("[" * 100_000)


@pytest.mark.parametrize("size", [64, (0, 32), (-1, 32), (32.0, 32), (3, 32, 32)])
def test_an_example_of_no_size_is_refused(size):
    with pytest.raises(InputError, match="size must be height and width in whole pixels"):
        read(detector(small_spec()), size=size)


def test_what_is_no_module_cannot_be_read():
    with pytest.raises(InputError, match=r"read takes a torch\.nn\.Module, got a str"):
        read("retinanet_resnet50_fpn")


class Exhausted(nn.Linear):
    def forward(self, images, targets=None):
        raise RuntimeError("no memory left\nwhere it ran")


def test_a_first_trial_that_fails_for_another_reason_is_said():
    with pytest.warns(Notice, match=r"Exhausted raised RuntimeError: no memory left on a first trial of 1 image\(s\)"):
        require_learner(Exhausted(1, 1), [torch.rand(3, 8, 8)], [{}])
