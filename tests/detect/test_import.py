"""Detectors from elsewhere: with their own weights, for other classes, as checkpoint folders."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchvision.models import get_model
from torchvision.models._api import WeightsEnum
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from jdkd.detect import adapt_classes, frozen_like, import_detector, load, open_model, remake_predictors, save
from jdkd.detect.architecture import architecture_of, identity
from jdkd.errors import InputError
from jdkd.graph import trace
from jdkd.notices import Notice
from jdkd.rewrite import Architecture, build, describe, prune
from tests.detectors import detector, small_spec

FAMILIES = (
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "maskrcnn_resnet50_fpn",
    "keypointrcnn_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "fcos_resnet50_fpn",
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
)
IMAGE = torch.rand(3, 64, 80, generator=torch.Generator().manual_seed(3))
NO_WEIGHTS = {"weights": None, "weights_backbone": None}


class Body(nn.Module):
    out_channels = 16

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 4, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(*(Residual() for _ in range(3)))

    def forward(self, x):
        return OrderedDict([("0", self.blocks(self.stem(x)))])


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.outer = nn.Conv2d(16, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 1)

    def forward(self, x):
        return x + self.outer(torch.relu(self.norm(self.inner(x))))


def mine(classes=3):
    """A detector whose builder has another name for the number of classes than torchvision's."""
    anchors, pool = AnchorGenerator(((8, 16),), ((1.0,),)), MultiScaleRoIAlign(["0"], 3, 1)
    small = {"min_size": 64, "max_size": 96, "box_detections_per_img": 10, "rpn_post_nms_top_n_test": 20}
    head = nn.Sequential(nn.Flatten(), nn.Linear(16 * 9, 24), nn.ReLU())
    head_out = {"box_head": head, "box_predictor": predictor(24, classes + 1)}
    return FasterRCNN(Body(), rpn_anchor_generator=anchors, box_roi_pool=pool, **head_out, **small)


def predictor(width, outputs):
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

    return FastRCNNPredictor(width, outputs)


MINE = "tests.detect.test_import:mine"


def found(model, image=IMAGE):
    with torch.no_grad():
        return model.eval()([image])[0]


def assert_equal(one, other):
    assert one.keys() == other.keys() and len(one["boxes"])
    for key in one:
        assert torch.equal(one[key], other[key]), key


def quiet(model):
    """Weights of a trained kind: activations stay small, and every norm has statistics of its own."""
    generator = torch.Generator().manual_seed(4)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        elif name.endswith("running_mean"):
            tensor.copy_(0.1 * torch.rand(tensor.shape, generator=generator))
        elif name.endswith(("bn3.weight", "cls_score.weight", "cls_logits.weight")):
            tensor.copy_(0.3 * torch.rand(tensor.shape, generator=generator))
    return model


@pytest.mark.parametrize("name", ["fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn"])
def test_torchvisions_own_weights_give_torchvisions_own_outputs(name, monkeypatch, tmp_path):
    """The norms that its state dicts are of are frozen, and those of some have no eps."""
    state = {k: v for k, v in quiet(get_model(name, **NO_WEIGHTS)).state_dict().items() if "num_batches" not in k}
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda self, **how: state)
    theirs = get_model(name, weights="COCO_V1", min_size=64)
    torch.save({"model": theirs.state_dict(), "epoch": 3}, tmp_path / "theirs.pth")
    with pytest.warns(Notice, match="of frozen batch norms"):
        ours = import_detector(name, tmp_path / "theirs.pth")
    ours.transform.min_size = (64,)
    for model in (ours, theirs):
        for head in model.modules():
            if hasattr(head, "score_thresh"):
                head.score_thresh = 0.0
    assert_equal(found(ours), found(theirs))
    save(tmp_path / "ours", ours)
    assert_equal(found(load(tmp_path / "ours")), found(theirs))


@pytest.mark.parametrize("name", FAMILIES)
def test_exactly_the_predictors_are_made_anew(name):
    """As torchvision would have built it for so many classes."""
    builder = f"torchvision.models.detection:{name}"
    model = build(Architecture(builder, NO_WEIGHTS), "meta")
    before = dict(model.named_parameters())
    remade = remake_predictors(model, 4)
    assert {k.rpartition(".")[0] for k, p in model.named_parameters() if p is not before[k]} == remade.keys()
    told = describe(model, builder, {**NO_WEIGHTS, "num_classes": 4})
    assert (told.shapes, told.attributes, told.blocks) == ({}, {}, {})
    assert remake_predictors(model, 4) == {}


def test_a_class_count_survives_the_checkpoint(tmp_path):
    torch.manual_seed(0)
    save(tmp_path / "three", import_detector(MINE, classes=("a", "b", "c")))
    with pytest.warns(Notice, match=r"made anew for 5 classes.*cls_score \(4 outputs, now 6\)"):
        model = import_detector(str(tmp_path / "three"), classes=tuple("abcde"))
    save(tmp_path / "five", model)
    loaded = load(tmp_path / "five")
    assert loaded.architecture.classes == tuple("abcde") and loaded.roi_heads.box_predictor.cls_score.out_features == 6
    loaded.roi_heads.score_thresh = model.roi_heads.score_thresh = 0.0
    assert_equal(found(loaded), found(model))
    assert torch.equal(loaded.backbone.stem[0].weight, load(tmp_path / "three").backbone.stem[0].weight)
    assert identity(loaded) == loaded.architecture.id != identity(load(tmp_path / "three"))


def test_weights_for_other_classes_keep_their_predictors(tmp_path):
    theirs = mine(classes=7)
    torch.save(theirs.state_dict(), tmp_path / "seven.pth")
    ours = import_detector(MINE, tmp_path / "seven.pth", classes=tuple("abcdefg"))
    assert torch.equal(ours.roi_heads.box_predictor.bbox_pred.weight, theirs.roi_heads.box_predictor.bbox_pred.weight)
    for classes in ((), ("a", "b")):
        with pytest.raises(InputError, match=r"cls_score\.weight is \[8, 24\] in the file and .*--classes"):
            import_detector(MINE, tmp_path / "seven.pth", classes=classes)


def test_what_was_asked_of_a_detector_holds_of_it_with_frozen_norms_too(tmp_path):
    state = {name: tensor for name, tensor in mine().state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "frozen.pth")
    with pytest.warns(Notice, match="of frozen batch norms"):
        ours = import_detector(MINE, tmp_path / "frozen.pth", min_size=80, max_size=120)
    assert (ours.transform.min_size, ours.transform.max_size) == ((80,), 120)
    model = open_model(MINE)
    with pytest.warns(Notice, match="made anew for 5 classes"):
        adapt_classes(model, 5)
    model.backbone.stem[1].momentum = 0.3  # a frozen norm has none
    model.architecture = describe(model, MINE, classes=tuple("abcde"))
    with pytest.warns(Notice, match="of frozen batch norms"):
        frozen = frozen_like(model, tmp_path / "frozen.pth", 1e-3)
    assert any(isinstance(module, FrozenBatchNorm2d) for module in frozen.modules())
    predictors = [each.roi_heads.box_predictor.cls_score.weight for each in (frozen, model)]
    assert predictors[0].shape == (6, 24) and torch.equal(*predictors)
    save(tmp_path / "five", frozen)
    assert_equal(found(load(tmp_path / "five")), found(frozen))


def test_what_was_rewritten_is_saved_without_a_word_about_how(tmp_path):
    model = open_model(MINE)
    topology = trace(model, [IMAGE])
    cut = prune(model, topology, {g.name: range(0, g.units, 2) for g in topology.groups}).eval()
    cut.roi_heads.score_thresh = 0.0
    save(tmp_path / "cut", cut)
    loaded = open_model(str(tmp_path / "cut"))
    assert_equal(found(loaded), found(cut))
    assert loaded.backbone.blocks[1].inner.out_channels == 4


def named():
    made = mine()
    made.architecture = "resnet-like"  # as other libraries call what they were asked for
    return made


def test_an_architecture_of_another_kind_is_none():
    model = open_model("tests.detect.test_import:named")
    assert architecture_of(model, "x") == Architecture("tests.detect.test_import:named")


def test_incomplete_weights_and_bad_names_are_refused(tmp_path):
    state = mine().state_dict()
    del state["roi_heads.box_head.1.weight"]
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(InputError, match=r"box_head\.1\.weight is not in the file"):
        import_detector(MINE, tmp_path / "part.pth")
    for classes in (("a", "a"), ("a", " ")):
        with pytest.raises(InputError, match="each once"):
            import_detector(MINE, classes=classes)
    with pytest.raises(InputError, match="norm_eps 0 is for"):
        import_detector(MINE, norm_eps=0.0)
    save(tmp_path / "own", detector(small_spec()))
    assert identity(import_detector(str(tmp_path / "own"))) == identity(detector(small_spec()))


def test_a_folder_holds_one_detector(tmp_path):
    save(tmp_path, detector(small_spec()))
    save(tmp_path, open_model(MINE))
    assert {file.name for file in tmp_path.iterdir()} == {"architecture.json", "weights.safetensors"}
    save(tmp_path, detector(small_spec()))
    assert identity(load(tmp_path)) == identity(detector(small_spec()))


def test_a_detector_carries_the_builder_it_is_from():
    assert architecture_of(open_model(MINE), "search").builder == MINE


def test_classes_are_never_the_letters_of_a_word():
    with pytest.raises(InputError, match=r"classes must be names, each once, .* got 'cat'"):
        import_detector("fcos_resnet50_fpn", classes="cat")


@pytest.mark.parametrize("classes", [0, -1, 2.0])
def test_a_number_of_classes_that_is_none_is_refused_whoever_builds(classes):
    with pytest.raises(InputError, match="classes must be a whole number of at least 1"):
        open_model("fcos_resnet50_fpn", classes=classes)
    with pytest.raises(InputError, match="is opened by its name"):
        open_model(None)
