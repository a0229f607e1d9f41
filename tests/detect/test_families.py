"""torchvision's families over its backbones: built of JSON, traced, trained, with torchvision's own weights."""

import math
import sys
import types
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import get_model, mobilenet_v2, regnet_y_400mf, resnet18, swin_t
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from jdkd.detect import FAMILIES, detector, load, load_weights, narrowed, open_model, read, resized, save
from jdkd.detect.backbones import PYRAMIDS, CoarsestLevels, backbone_names, maps_of, steady_coarsest
from jdkd.errors import InputError
from jdkd.rewrite import Architecture, build

BACKBONES = ("resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "regnet_x_400mf", "swin_t")
IMAGE = torch.rand(3, 64, 80, generator=torch.Generator().manual_seed(3))
NO_WEIGHTS = {"weights": None, "weights_backbone": None}
SMALL = {"channels": 32, "min_size": 64}


def small(family="retinanet", backbone="resnet18", classes=("cat", "dog"), **changes):
    torch.manual_seed(0)
    head = {"box_head": 32} if "rcnn" in family else {}
    return detector(family, backbone, classes, **{**SMALL, **head, **changes}).eval()


def strides_of(model):
    side = max(model.backbone.strides.values())
    with torch.no_grad():
        return {name: side / level.shape[-1] for name, level in model.backbone(torch.rand(1, 3, side, side)).items()}


def found(model):
    for head in model.modules():
        if hasattr(head, "score_thresh"):
            head.score_thresh = 0.0
    with torch.no_grad():
        return model.eval()([IMAGE])[0]


@pytest.mark.parametrize("place", range(len(FAMILIES)))
def test_every_family_is_built_of_json_and_traced(place):
    """With every backbone and pyramid over two families or more."""
    family, backbone = list(FAMILIES)[place], BACKBONES[place % len(BACKBONES)]
    pyramid = {} if FAMILIES[family].pyramid is None else {"pyramid": list(PYRAMIDS)[place % 2]}
    model = small(family, backbone, **pyramid)
    again = build(Architecture.from_json(model.architecture.to_json()), "meta")
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert {name: tensor.shape for name, tensor in again.state_dict().items()} == shapes
    topology = read(model)
    assert not topology.unknown and topology.prunable_share() > (0.3 if backbone == "swin_t" else 0.98)
    assert len(topology.followed) == len(model.backbone.strides)
    assert strides_of(model) == model.backbone.strides


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_all_its_parameters(family):
    model = small(family).train()
    targets = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 44.0]]), "labels": torch.tensor([1])}
    targets["masks"] = torch.ones(1, 64, 80, dtype=torch.uint8)
    targets["keypoints"] = torch.tensor([[[20.0, 20.0, 1.0]] * 17])
    losses = model([IMAGE, IMAGE], [targets, targets])
    sum(losses.values()).backward()
    assert all(map(torch.isfinite, losses.values()))
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_backbones_have_the_maps_they_say():
    """On the meta device, where no weight and no map takes memory; those that are not here are traced above."""
    names = {*backbone_names()}
    assert (
        len(names) > 40 and {"resnet152", "swin_s", "efficientnet_b7", "regnet_y_400mf", "mobilenet_v3_small"} <= names
    )
    for name in ("resnet50", "resnext50_32x4d", "mobilenet_v3_large", "efficientnet_b4", "efficientnet_v2_s"):
        with torch.device("meta"):
            maps = maps_of(name)
            found = maps.body.eval()(torch.empty(1, 3, 64, 64))
        assert tuple(found[key].shape[1] for key in maps.taken) == maps.channels, name
        assert [64 // found[key].shape[2] for key in maps.taken] == [4, 8, 16, 32], name


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("fasterrcnn_resnet50_fpn", "fasterrcnn"),
        ("maskrcnn_resnet50_fpn_v2", "maskrcnn_v2"),
        ("keypointrcnn_resnet50_fpn", "keypointrcnn"),
        ("retinanet_resnet50_fpn", "retinanet"),
        ("retinanet_resnet50_fpn_v2", "retinanet_v2"),
        ("fcos_resnet50_fpn", "fcos"),
    ],
)
def test_over_torchvisions_backbone_it_takes_torchvisions_weights_and_gives_its_outputs(name, family):
    torch.manual_seed(0)
    theirs = get_model(name, **NO_WEIGHTS, num_classes=3)
    ours = detector(family, "resnet50", 2)
    ours.load_state_dict(theirs.state_dict())
    for model in (ours, theirs):
        model.transform.min_size = (64,)
        for module in model.modules():
            if hasattr(module, "detections_per_img"):
                module.detections_per_img = 5
        if hasattr(model, "rpn"):
            model.rpn._post_nms_top_n["testing"] = 20
    one, other = found(ours), found(theirs)
    assert len(one["boxes"]) and one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


@pytest.mark.parametrize(
    "name", ["fcos_resnet50_fpn", "ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_fpn"]
)
def test_torchvisions_names_are_built_as_torchvision_does(name):
    torch.manual_seed(0)
    theirs = get_model(name, **NO_WEIGHTS, num_classes=4)
    ours = open_model(name, classes=3)
    ours.load_state_dict(theirs.state_dict())
    for model in (ours, theirs):
        if model.transform.fixed_size is None:
            model.transform.min_size = (64,)
    one, other = found(ours), found(theirs)
    assert len(one["boxes"]) and all(torch.equal(one[key], other[key]) for key in one)


def anchors_of(model):
    return next(m.sizes for m in model.modules() if isinstance(m, AnchorGenerator))


def test_anchors_and_regions_suit_small_images():
    model = small("fasterrcnn", min_size=128)
    assert anchors_of(model) == ((8,), (16,), (32,), (64,), (128,))
    assert model.roi_heads.fg_bg_sampler.batch_size_per_image == 64 and model.rpn._post_nms_top_n["testing"] == 300
    assert anchors_of(small("fasterrcnn", min_size=800))[0] == (32,)
    assert anchors_of(small("retinanet", min_size=128))[0] == (8, 10, 12)
    for pyramid, strides in PYRAMIDS.items():
        for family in ("fcos", "reppoints"):
            assert anchors_of(small(family, pyramid=pyramid)) == tuple((stride,) for stride in strides)
    for family in ("atss", "gfl"):  # of 8 strides where images have the paper's size
        assert anchors_of(small(family, min_size=800)) == ((64,), (128,), (256,), (512,), (1024,))
        assert anchors_of(small(family, min_size=128))[0] == (16,)
    coarse = small("maskrcnn", pyramid="P3-P7")
    pools = [module for module in coarse.modules() if isinstance(module, MultiScaleRoIAlign)]
    assert [pool.scales for pool in pools] == [[1 / 8, 1 / 16, 1 / 32]] * 2
    theirs = open_model("retinanet_resnet50_fpn", classes=2, min_size=128)
    assert anchors_of(theirs)[0] == (8, 10, 12) and theirs.transform.min_size == (128,)
    theirs = open_model("fasterrcnn_mobilenet_v3_large_fpn", classes=2, min_size=128, max_detections=7)
    assert anchors_of(theirs)[0] == (8, 16, 32, 64, 128) and theirs.roi_heads.detections_per_img == 7
    assert theirs.roi_heads.fg_bg_sampler.positive_fraction == 0.5
    assert open_model("ssdlite320_mobilenet_v3_large", min_size=128).transform.fixed_size == (128, 128)


@pytest.mark.parametrize("kind", [CoarsestLevels, LastLevelP6P7])
def test_the_coarsest_levels_of_small_images_have_the_gradient_that_they_have_in_single_precision(kind):
    """In bfloat16 oneDNN would leave a part of it as it lay in memory, where P6 is one position wide."""
    coarsest = kind(64, 64)
    p5 = torch.randn(4, 64, 4, 2)

    def gradient(amp: bool) -> Tensor:
        coarsest.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp), steady_coarsest(coarsest):
            levels, names = coarsest([p5.bfloat16() if amp else p5], [p5], ["2"])
        assert names == ["2", "p6", "p7"] and {level.dtype for level in levels} == {levels[0].dtype}
        sum(level.float().square().sum() for level in levels).backward()
        return coarsest.p7.weight.grad.clone()

    expected = gradient(amp=False)
    for _ in range(3):
        lain = [torch.full((64 * 64 * 9 * size,), math.nan) for size in (1, 1, 2)]
        del lain
        torch.testing.assert_close(gradient(amp=True), expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


def test_the_further_maps_of_an_ssd_have_the_gradient_that_they_have_in_single_precision(monkeypatch):
    """As above: they are one position wide before the last filter has run."""
    backbone = small("ssd", "mobilenet_v3_small", min_size=64).backbone
    last = torch.randn(4, backbone.extra[0][0][0].in_channels, 2, 2)

    def gradients(amp: bool) -> list[Tensor]:
        backbone.zero_grad()
        monkeypatch.setattr(backbone, "maps", lambda x: OrderedDict({"0": x}))
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            levels = [*backbone(last.bfloat16() if amp else last).values()]
        assert {level.dtype for level in levels} == {torch.bfloat16 if amp else torch.float32}
        sum(level.float().square().sum() for level in levels).backward()
        return [block[1][0].weight.grad.clone() for block in backbone.extra]

    expected = gradients(amp=False)
    for _ in range(3):
        lain = [torch.full((64 * 64 * 9 * size,), math.nan) for size in (1, 1, 2)]
        del lain
        for own, single in zip(gradients(amp=True), expected, strict=True):
            torch.testing.assert_close(own, single, rtol=0.05, atol=0.05 * single.abs().max().item())


@pytest.mark.parametrize(
    ("norm", "kind"), [("frozen", FrozenBatchNorm2d), ("sync", nn.SyncBatchNorm), ("group", nn.GroupNorm)]
)
def test_norms_are_of_the_kind_that_was_asked_for(norm, kind):
    model = small("ssdlite", "mobilenet_v2", norm=norm)
    assert {type(m) for m in model.backbone.body.modules() if hasattr(m, "eps")} == {kind}
    kept = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert bool(kept) == (norm == "frozen"), "what is not of the backbone is not frozen, as it has nothing to keep"
    named = open_model("fcos_resnet50_fpn", classes=2, norm=norm)
    assert {type(m) for m in named.backbone.body.modules() if hasattr(m, "eps")} == {kind}
    assert read(model).prunable_share() > 0.98


@pytest.mark.parametrize(
    ("network", "backbone", "left"),
    [
        (mobilenet_v2, "mobilenet_v2", "features.18"),
        (regnet_y_400mf, "regnet_y_400mf", "fc"),
        (swin_t, "swin_t", "norm"),
        (resnet18, "resnet18", "fc"),
    ],
)
def test_weights_of_a_classifier_find_their_places(network, backbone, left, tmp_path):
    torch.manual_seed(1)
    theirs = network().eval()
    torch.save(theirs.state_dict(), tmp_path / "imagenet.pth")
    for family in ("ssdlite",) if backbone == "swin_t" else ("fcos", "ssdlite"):
        ours = small(family, backbone)
        report = load_weights(ours, tmp_path / "imagenet.pth")
        assert not [name for name in report.missing if name.startswith("backbone.body.")] and not report.misshapen
        assert report.unexpected[0].startswith(left)
        x = torch.rand(1, 3, 64, 64)
        body = theirs.features[:18] if backbone == "mobilenet_v2" else theirs.features if backbone == "swin_t" else None
        if body is not None:
            with torch.no_grad():
                assert torch.equal(body(x), list(ours.backbone.body(x).values())[-1])


def test_a_narrowed_detector_keeps_the_first_channels_and_its_variance(tmp_path):
    whole = small(channels=64)
    thin = narrowed(whole, 0.25)
    one, other = (model.backbone.body.layer2[1].conv1.weight for model in (whole, thin))
    assert other.shape == (32, 32, 3, 3) and torch.allclose(other, 2 * one[:32, :32])
    first = thin.backbone.body.conv1.weight
    assert torch.equal(first, whole.backbone.body.conv1.weight[:16]), "the image has as many channels as before"
    head = thin.head.classification_head.conv[0][0]
    assert head.weight.shape[:2] == (16, 16)
    save(tmp_path, thin)
    assert torch.equal(found(load(tmp_path))["boxes"], found(thin)["boxes"])
    assert narrowed(whole, 1.0).architecture == whole.architecture


class OfTimm(nn.Module):
    """What timm's features_only models are: maps in a list, and what is known of them."""

    def __init__(self, strides=(2, 4, 8, 16, 32)):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 if k == 0 else 8, 8, 3, 2, 1) for k in range(len(strides)))
        known = {"reduction": lambda: list(strides), "channels": lambda: [8] * len(strides)}
        self.feature_info = types.SimpleNamespace(**known)

    def forward(self, x):
        found = []
        for layer in self.layers:
            found.append(x := layer(x))
        return found


def test_a_model_of_timm_is_a_backbone(monkeypatch, tmp_path):
    module = types.ModuleType("timm")

    def create_model(name, features_only, pretrained):
        assert features_only and not pretrained
        if name == "unknown":
            raise RuntimeError("Unknown model (unknown)")
        return OfTimm((16, 16, 16)) if name.startswith("vit") else OfTimm()

    module.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", module)
    for family in ("fasterrcnn", "ssd", "fcos"):
        model = small(family, "timm:tiny")
        assert strides_of(model) == model.backbone.strides
        assert read(model).prunable_share() > 0.95
    save(tmp_path, model)
    assert torch.equal(found(load(tmp_path))["boxes"], found(model)["boxes"])
    with pytest.raises(InputError, match="strides 16, 16, 16, and a pyramid takes 4, 8, 16, 32"):
        small(backbone="timm:vit_tiny")
    with pytest.raises(InputError, match=r"no features_only model 'unknown' \(RuntimeError: Unknown model"):
        small(backbone="timm:unknown")


def test_timm_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"needs the package timm; install it with: pip install 'jdkd\[timm\]'"):
        small(backbone="timm:resnet18")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"family": "yolo"}, "'yolo' is none of fasterrcnn"),
        ({"backbone": "resnet19"}, "'resnet19' is none of convnext_base.* nor timm:NAME; give resnet1"),
        ({"backbone": "vgg16"}, "'vgg16' is none of"),
        ({"pyramid": "P1-P5"}, "P2-P6 or P3-P7, got 'P1-P5'"),
        ({"family": "ssd", "pyramid": "P3-P7"}, "ssd has no pyramid"),
        ({"norm": "layer"}, "one of batch, frozen, sync, group, got 'layer'"),
        ({"backbone": "swin_t", "norm": "frozen"}, "has none; leave norm out"),
        ({"channels": 100}, "multiple of 8, got 100"),
        ({"family": "fcos", "channels": 40}, "multiple of 32, got 40"),
        ({"min_size": 200, "max_size": 100}, "max_size 100 is below min_size 200"),
        ({"min_size": 0}, "min_size must be a whole number of at least 1, got 0"),
        ({"family": "ssd", "max_size": 100}, "ssd resizes images to 64x64; leave max_size 100 out"),
        ({"anchors": (8, 16)}, r"5 whole numbers of pixels, one per level, got \[8, 16\]"),
        ({"family": "fcos", "anchors": (8, 16, 32, 64, 100)}, "are the strides of its levels"),
        ({"family": "reppoints", "anchors": (8, 16, 32, 64, 100)}, "are the strides of its levels"),
        ({"family": "gfl", "channels": 20}, "multiple of 8, got 20"),
        ({"family": "ssdlite", "anchors": (8,)}, "are shares of the image"),
        ({"box_head": 64}, "retinanet has no box_head"),
        ({"family": "fasterrcnn", "keypoints": 5}, "fasterrcnn has no keypoints"),
        ({"classes": 0}, "classes must be a whole number"),
        ({"classes": 2.0}, "classes must be a whole number"),
        ({"classes": "cat"}, "classes must be names, each once, .* got 'cat'"),
        ({"classes": ("cat", "cat")}, "classes must be names, each once"),
        ({"classes": []}, "classes must be names, each once"),
        ({"backbone": None}, "backbone must be a name"),
        ({"pyramid": ["P2-P6"]}, "pyramid must be P2-P6 or P3-P7"),
        ({"anchors": 3}, "anchors must be 5 whole numbers"),
        ({"max_detections": 1.5}, "max_detections must be a whole number"),
    ],
)
def test_what_does_not_exist_or_go_together_is_refused(changes, words):
    with pytest.raises(InputError, match=words):
        small(**changes)


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("fcos", {}, "has a backbone only in the names fcos_resnet50_fpn; give a backbone too"),
        ("gfl", {}, "gfl is a family of detectors, and has no backbone of its own; give a backbone too"),
        ("gfl_resnet50_fpn", {}, "none of the families .*gfl, reppoints"),
        ("yolo", {}, "none of torchvision's detectors"),
        ("ssd300_vgg16", {"min_size": 128}, "made for images of 300x300, and 128 was asked for"),
        ("ssd300_vgg16", {"pyramid": "P2-P6"}, "ssd has no pyramid"),
        (
            "tests.detect.elsewhere:none",
            {"backbone": "resnet18"},
            "builds its own backbone; leave backbone 'resnet18' out",
        ),
        ("fcos_resnet50_fpn", {"norm": "layer"}, "one of batch, frozen, sync, group"),
        ("retinanet_resnet50_fpn", {"min_size": 900, "max_size": 800}, "max_size 800 is below min_size 900"),
        ("retinanet_resnet50_fpn", {"max_detections": 0}, "max_detections must be a whole number"),
    ],
)
def test_models_by_name_refuse_what_is_not_for_them(source, options, words):
    with pytest.raises(InputError, match=words):
        open_model(source, classes=2, **options)


def test_a_model_without_torchvisions_transform_has_no_input_size():
    with pytest.raises(InputError, match="Identity has no torchvision transform"):
        resized("torch.nn:Identity", {}, min_size=64)
    with pytest.raises(InputError, match="Identity does not say how many detections it keeps"):
        resized("torch.nn:Identity", {}, max_detections=5)
    with pytest.raises(InputError, match=r"width is 1\.5"):
        narrowed(small(), 1.5)
