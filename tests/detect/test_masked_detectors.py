"""A masked detector equals the one that was physically pruned: every named spec, both norms, every group."""

import pytest
import torch

from jdkd.detect import DetectorSpec, Stage, channel_groups, inherit
from jdkd.detect.spec import NAMED_SPECS, named_spec
from jdkd.experimental import PrunedCandidate, masked, score_candidates
from jdkd.nn import Subnet, export, set_subnet
from jdkd.pool import Space, Supernet
from tests.detectors import CLASSES, assert_same, detector, outputs, small_spec

DROPPED = 3  # channels of every group


def tiny(name: str, norm: str = "batch") -> DetectorSpec:
    """The blocks and depths of a published detector, 8 channels wide at its narrowest."""
    spec = named_spec(name, CLASSES, width=0.125, fpn=8, box_head=8, min_size=64, max_size=96)
    return spec.replace(norm=norm)


def shrunk(spec: DetectorSpec) -> DetectorSpec:
    """Every group smaller."""
    stages = tuple(
        Stage(stage.width - DROPPED, tuple(tuple(w - DROPPED for w in block) for block in stage.blocks))
        for stage in spec.stages
    )
    sizes = {name: getattr(spec, name) - DROPPED for name in ("stem", "fpn", "box_head")}
    return spec.replace(stages=stages, **sizes)


def lists_of(spec: DetectorSpec, listed: bool) -> dict[str, list[int]]:
    """What stays of every group: the leading channels, or a list of its own."""
    generator = torch.Generator().manual_seed(1)
    order = {n: torch.randperm(g.size, generator=generator).tolist() for n, g in channel_groups(spec).items()}
    return {name: (all_of if listed else sorted(all_of))[:-DROPPED] for name, all_of in order.items()}


@torch.no_grad()
def everything(model: torch.nn.Module) -> list[torch.Tensor]:
    """The levels of backbone and pyramid, and what the heads make of them."""
    x = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(5))
    return [*model.backbone.body(x).values(), *model.backbone(x).values(), *outputs(model)]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    """Whether they agree but for rounding, which grows with what passes through the many layers of R101."""
    return all(
        a.shape == b.shape and (a - b).abs().max() <= 1e-4 * b.abs().max() for a, b in zip(ours, theirs, strict=True)
    )


@pytest.mark.parametrize(
    ("norm", "listed"), [("batch", True), ("frozen", False)], ids=["batch-listed", "frozen-leading"]
)
@pytest.mark.parametrize("name", NAMED_SPECS)
def test_with_a_mask_on_every_group_a_detector_equals_the_pruned_one(name, norm, listed):
    parent = detector(tiny(name, norm))
    masks = lists_of(parent.spec, listed)
    child = inherit(parent, shrunk(parent.spec), channels=masks).eval()
    with masked(parent, masks, channel_groups(parent.spec)):
        assert same(everything(parent), everything(child))
        slim = {name: tensor.shape for name, tensor in parent.state_dict().items()}
        assert slim == {name: tensor.shape for name, tensor in child.state_dict().items()}


@pytest.mark.parametrize("name", ["faster_rcnn_r18_fpn", "faster_rcnn_r50_fpn"])
def test_a_masked_detector_equals_the_exported_subnet(name):
    spec = tiny(name)
    plain = detector(spec)
    supernet = Supernet(Space.from_base(spec, extra_depth=0, width=1), plain).model.eval()
    masks = {name: kept for name, kept in lists_of(spec, listed=True).items() if ".inner" in name}
    depths = {f"layer{number}": stage.depth - 1 for number, stage in enumerate(spec.stages, start=1)}
    set_subnet(supernet, Subnet(masks, depths=depths))
    left = [f"backbone.body.{stage}.{depth}" for stage, depth in depths.items()]
    exported = export(supernet)
    with masked(plain, masks, channel_groups(spec), skip=left):
        assert same(everything(plain), everything(exported))


def test_a_channel_that_is_not_pruned_everywhere_shows():
    parent = detector(tiny(NAMED_SPECS[0]))
    masks = lists_of(parent.spec, listed=True)
    child = inherit(parent, shrunk(parent.spec), channels=masks).eval()
    expected = everything(child)
    for group in ("stem", "layer2", "layer3.1.inner1", "fpn.top_down", "fpn", "rpn", "box_head.fc6"):
        wrong = masks | {group: [*masks[group][1:], min(set(range(99)) - set(masks[group]))]}
        with masked(parent, wrong, channel_groups(parent.spec)):
            assert not same(everything(parent), expected), group


def test_candidates_of_a_detector_equal_masking_one_by_one():
    model = detector(small_spec(proposals=8))
    groups = channel_groups(model.spec)
    images = [torch.rand(3, 64, 64)]
    candidates = [PrunedCandidate({name: kept}) for name, kept in lists_of(model.spec, listed=True).items()]
    candidates += [PrunedCandidate({"fpn": 8}, skip=["backbone.body.layer3.1"]), PrunedCandidate()]
    calls = []
    for name in ("transform", "backbone.body.layer1.0", "backbone.body.conv1"):
        module = model.get_submodule(name)
        run = module.forward
        module.forward = lambda *args, name=name, run=run: calls.append(name) or run(*args)
    found = score_candidates(model, candidates, images, groups)
    assert (calls.count("transform"), calls.count("backbone.body.conv1")) == (1, 2), "the stem has one group"
    assert calls.count("backbone.body.layer1.0") == 4, "whole, and with the groups that come in, stay inside and go out"
    for candidate, ours in zip(candidates, found, strict=True):
        with masked(model, candidate.keep, groups, skip=candidate.skip), torch.no_grad():
            torch.testing.assert_close(ours, model(images), rtol=0, atol=0)
    assert_same(outputs(model), outputs(detector(small_spec())))
