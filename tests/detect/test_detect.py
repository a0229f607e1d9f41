"""Specs, the detectors that are built from them, and their checkpoints."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel
from torchvision.models import resnet18
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

from jdkd.detect import DetectorSpec, build, load, named_spec, read, save
from jdkd.detect.contract import architecture_of, identity, require_learner
from jdkd.errors import InputError
from jdkd.latency import fuse_for_inference
from jdkd.notices import Notice
from jdkd.rewrite import Rewrite
from tests.detectors import CLASSES, assert_same, detector, outputs, small_spec


def test_a_spec_survives_json_and_its_detector_has_one_architecture():
    spec = small_spec("bottleneck")
    assert DetectorSpec.from_json(spec.to_json()) == spec
    ids = [identity(build(one)) for one in (spec, DetectorSpec.from_json(spec.to_json()), spec.replace(fpn=17))]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[]", "JSON object"),
        ('{"classes": ["a"], "stages": [], "colour": 1}', "colour|JSON object"),
        ('{"classes": ["a"], "stages": []}', "4 stages"),
        (json.dumps({"classes": ["a"], "stages": [{"width": 8, "blocks": [[0]]}] * 4}), "positive"),
        (json.dumps({"classes": ["a"], "stages": [{"blocks": [[8]]}] * 4}), "width"),
    ],
)
def test_a_spec_that_describes_no_detector_is_refused(text, says):
    with pytest.raises(InputError, match=says):
        DetectorSpec.from_json(text, source="my.json")


def test_named_specs_are_the_published_architectures():
    r50 = build(named_spec("faster_rcnn_r50_fpn", ["thing"] * 90))
    assert sum(p.numel() for p in r50.parameters()) == 41_755_286 + 2 * 26_560  # torchvision freezes its batch norms
    small = named_spec("faster_rcnn_r18_fpn", CLASSES, width=0.25, min_size=128)
    assert [stage.width for stage in small.stages] == [16, 32, 64, 128]
    assert small.anchors[0] == 8 and small.fpn == 64
    with pytest.raises(InputError, match="faster_rcnn_r18_fpn"):
        named_spec("yolo", CLASSES)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"width": float("nan")}, "must be positive, got nan"),
        ({"depth": float("inf")}, "must be positive, got 1.0 and inf"),
        ({"fpn": 0}, "got 0 for fpn"),
        ({"box_head": 0}, "got 0 for box_head"),
        ({"min_size": 64, "max_size": 48}, "max_size 48 is below min_size 64"),
        ({"max_size": 500}, "max_size 500 is below min_size 800"),
    ],
)
def test_no_option_of_a_named_spec_is_replaced_in_silence(options, says):
    with pytest.raises(InputError, match=says):
        named_spec("faster_rcnn_r18_fpn", CLASSES, **options)


def test_the_long_side_follows_a_large_short_side_that_is_given_alone():
    sizes = [named_spec("faster_rcnn_r18_fpn", CLASSES, **given).max_size for given in ({}, {"min_size": 1500})]
    assert sizes == [1333, 1500]


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"classes": "cat"}, "classes must be a list"), ({"classes": (1,)}, "list of names"), ({"positives": 7}, "0..1")],
)
def test_fields_of_another_kind_are_refused(changes, says):
    with pytest.raises(InputError, match=says):
        small_spec(**changes)


def test_a_checkpoint_rebuilds_the_detector(tmp_path):
    model = detector(small_spec())
    save(tmp_path / "a", model)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["architecture.json", "weights.safetensors"]
    again = load(tmp_path / "a")
    assert again.architecture == model.architecture and again.architecture.classes == CLASSES
    assert_same(outputs(again), outputs(model))


def test_a_folder_of_an_earlier_version_loads_and_is_saved_as_one_of_today(tmp_path):
    spec, model = small_spec(), detector(small_spec())
    (tmp_path / "spec.json").write_text(spec.to_json())
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "weights.safetensors"
    )
    again = load(tmp_path)
    assert_same(outputs(again), outputs(model))
    assert identity(again) == identity(model)
    save(tmp_path, again)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["architecture.json", "weights.safetensors"]


def test_a_file_of_somebody_that_is_called_as_one_of_ours_was_stays(tmp_path):
    (tmp_path / "spec.json").write_text("somebody's")
    for _ in range(2):
        save(tmp_path, detector(small_spec()))
    assert (tmp_path / "spec.json").read_text() == "somebody's" and load(tmp_path).architecture.classes == CLASSES


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


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("norm", ["batch", "frozen"])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:RCNN always returns")
def test_a_detector_can_be_scripted(block, norm):
    model = detector(small_spec(block, norm=norm))
    model.roi_heads.score_thresh = 0.0
    images = [torch.rand(3, 50, 80, generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        (ours,), (_, (theirs,)) = model(images), torch.jit.script(model)(images)
    assert len(ours["boxes"]) > 10 and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_backbone_can_be_traced():
    model = detector(small_spec())
    traced = torch.jit.trace(model.backbone, torch.rand(1, 3, 64, 64), strict=False)
    x = torch.rand(1, 3, 96, 64)
    ours, theirs = model.backbone(x), traced(x)
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_spec_says_how_many_detections_are_kept(tmp_path):
    spec = named_spec("faster_rcnn_r18_fpn", CLASSES, width=0.125, max_detections=300)
    save(tmp_path, build(spec))
    model = load(tmp_path)
    assert model.architecture.arguments["max_detections"] == model.roi_heads.detections_per_img == 300
    before = {name: value for name, value in json.loads(spec.to_json()).items() if name != "max_detections"}
    assert DetectorSpec.from_json(json.dumps(before)) == spec.replace(max_detections=100)


@pytest.mark.parametrize("given", ["faster_rcnn_r18_fpn", nn.Linear(1, 1)])
def test_what_takes_a_spec_says_so(given):
    with pytest.raises(InputError, match="build takes a DetectorSpec, got"):
        build(given)


@pytest.mark.parametrize("wrapper", [lambda model: model, nn.DataParallel, AveragedModel])
def test_a_model_without_an_architecture_is_refused_before_anything_is_written(wrapper, tmp_path):
    with pytest.raises(InputError, match=r"save takes a detector .* ResNet has none.*open_model"):
        save(tmp_path / "a", wrapper(resnet18()))
    assert not (tmp_path / "a").exists()
    save(tmp_path / "b", wrapper(detector(small_spec())))
    assert architecture_of(load(tmp_path / "b"), "this").builder == "jdkd.detect:faster_rcnn"


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


def test_a_spec_nested_without_end_is_no_json():
    with pytest.raises(InputError, match="spec is not JSON"):
        DetectorSpec.from_json("[" * 100_000)


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
