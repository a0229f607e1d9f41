"""The scales of the RoI pools are those of the strides, whatever image comes first."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models.detection import FasterRCNN, KeypointRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from jdkd.detect import fix_roi_scales
from jdkd.detect.roi_scales import set_roi_scales
from jdkd.notices import Notice
from jdkd.rewrite import build as build_again
from tests.detectors import build, small_spec

STRIDES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
OBLONG = [torch.rand(3, 60, 192, generator=torch.Generator().manual_seed(0))]


class Levels(nn.Module):
    """A backbone of three levels under names of its own, at strides 8, 16 and 32."""

    out_channels = 8

    def __init__(self, side: int | None = None):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(i, 8, 3, s, 1) for i, s in ((3, 8), (8, 2), (8, 2))])
        self.norm = nn.BatchNorm2d(8)
        self.side = side

    def forward(self, x):
        if self.side not in (None, x.shape[-1]):
            raise ValueError("another size")
        levels = {}
        for name, conv in zip(("c3", "c4", "c5"), self.convs, strict=True):
            levels[name] = x = conv(x)
        return levels | {"c5": self.norm(x)}


def foreign(kind=FasterRCNN, side: int | None = None, names=("c3", "c4", "c5")) -> nn.Module:
    """A torchvision detector on a backbone that is not ours."""
    pools = {"box_roi_pool": MultiScaleRoIAlign(names, 7, 1)}
    if kind is not FasterRCNN:
        pools |= {f"{kind.__name__.removesuffix('RCNN').lower()}_roi_pool": MultiScaleRoIAlign(names[1:], 14, 1)}
    anchors = AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3)
    how = {"num_classes": 2, "min_size": side or 128, "max_size": 128, "rpn_anchor_generator": anchors}
    return kind(Levels(side), **how, **pools).eval()


def scales(model: nn.Module) -> list[list[float]]:
    return [pool.scales for pool in model.modules() if isinstance(pool, MultiScaleRoIAlign)]


def copied(model):
    return copy.deepcopy(model)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def reloaded(model):
    again = build_again(model.architecture)
    again.load_state_dict(model.state_dict())
    return again.eval()


@pytest.mark.parametrize("treated", [copied, pickled, reloaded])
def test_an_oblong_image_that_comes_first_does_not_set_the_scales(treated):
    torch.manual_seed(0)
    model = build(small_spec(min_size=128, max_size=128)).eval()
    model(OBLONG)
    for each in (model, treated(model)):
        each(OBLONG)
        pool = each.roi_heads.box_roi_pool
        assert (pool.scales, pool.map_levels.k_min, pool.map_levels.k_max) == (STRIDES, 2, 5)


@pytest.mark.parametrize("kind", [MaskRCNN, KeypointRCNN])
def test_every_pool_of_a_foreign_detector_reads_its_own_levels(kind):
    model = foreign(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.backbone.train()
    assert fix_roi_scales(model) == []
    assert scales(model) == [[1 / 8, 1 / 16, 1 / 32], [1 / 16, 1 / 32]]
    assert model.backbone.norm.training and not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("wrapper", [lambda model: model, AveragedModel, lambda model: nn.Sequential(model)])
def test_scales_that_were_inferred_wrongly_are_corrected_and_said(wrapper, monkeypatch):
    monkeypatch.setattr("jdkd.notices._said", set())
    model = foreign()
    right = copy.deepcopy(model)
    fix_roi_scales(right)
    model(OBLONG)
    assert scales(model) == [[1 / 4, 1 / 8, 1 / 16]], "torchvision no longer guesses wrongly: this file may go"
    with pytest.warns(
        Notice, match=r"FasterRCNN: .*box_roi_pool had inferred .*1/4, 1/8, 1/16.*set to 1/8, 1/16, 1/32"
    ):
        (name,) = fix_roi_scales(wrapped := wrapper(model))
    assert wrapped.get_submodule(name).scales == [1 / 8, 1 / 16, 1 / 32]
    model = wrapped.module if isinstance(wrapped, AveragedModel) else model
    assert torch.equal(model(OBLONG)[0]["boxes"], right(OBLONG)[0]["boxes"])
    assert fix_roi_scales(wrapped) == []


def test_scales_that_someone_set_by_hand_stay():
    model = foreign(names=("c3",))
    pool = model.roi_heads.box_roi_pool
    fix_roi_scales(model)
    pool.scales = [1 / 7]  # nearer to 1/8 than to any other power of two
    assert fix_roi_scales(model) == [] and pool.scales == [1 / 7]


def test_a_backbone_of_one_image_size_is_asked_with_its_own():
    model = foreign(side=64)
    fix_roi_scales(model)
    assert scales(model) == [[1 / 8, 1 / 16, 1 / 32]]


def test_a_backbone_that_cannot_be_asked_is_named():
    model = foreign(side=31)
    model.transform.min_size = (64,)
    with pytest.warns(Notice, match=r"FasterRCNN: the scales of roi_heads\.box_roi_pool cannot be checked"):
        fix_roi_scales(model)
    with pytest.warns(Notice, match=r"RoIHeads: the scales of box_roi_pool cannot be checked"):
        fix_roi_scales(model.roi_heads)
    assert scales(model) == [None]


def test_a_pool_of_its_own_canonical_scale_keeps_its_rule():
    boxes = [torch.tensor([[0.0, 0.0, 112.0, 112.0]])]
    for scale, level in ((224, 0), (56, 2)):  # of levels 3, 4 and 5: 3 is one below that of 224 pixels, 5 one above
        pool = MultiScaleRoIAlign(["0", "1", "2"], 7, 2, canonical_scale=scale, canonical_level=4)
        set_roi_scales(pool, [8, 16, 32])
        assert pool.map_levels(boxes).tolist() == [level]
