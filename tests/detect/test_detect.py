"""Specs, builders, groups, inheritance and checkpoints."""

import json

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel
from torchvision.models import resnet18
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

from jdkd.detect import (
    NEW,
    DetectorSpec,
    Stage,
    build,
    channel_groups,
    inherit,
    load,
    named_spec,
    save,
)
from jdkd.errors import InputError
from jdkd.latency import deployable
from tests.detectors import CLASSES, assert_same, detector, masked, outputs, small_spec


def shrunk(spec: DetectorSpec, group: str, size: int) -> tuple[DetectorSpec, list[str]]:
    """The spec after pruning ``group`` and the groups that share its size in the spec."""
    if group.startswith("layer") and "inner" in group:
        stage, block, number = int(group[5]) - 1, int(group.split(".")[1]), int(group[-1]) - 1
        blocks = [list(widths) for widths in spec.stages[stage].blocks]
        blocks[block][number] = size
        stages = list(spec.stages)
        stages[stage] = Stage(stages[stage].width, tuple(tuple(widths) for widths in blocks))
        return spec.replace(stages=tuple(stages)), [group]
    if group.startswith("box_head"):
        return spec.replace(box_head=size), ["box_head.fc6", "box_head.fc7"]
    if group in ("fpn", "fpn.top_down", "rpn"):
        return spec.replace(fpn=size), ["fpn", "fpn.top_down", "rpn"]
    if group == "stem":
        return spec.replace(stem=size), ["stem"]
    stages = list(spec.stages)
    stages[int(group[5]) - 1] = Stage(size, stages[int(group[5]) - 1].blocks)
    return spec.replace(stages=tuple(stages)), [group]


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_physical_pruning_equals_masking_in_every_group(block, norm):
    spec = small_spec(block, norm=norm)
    for group in channel_groups(spec):
        size = channel_groups(spec)[group].size - 3
        child_spec, coupled = shrunk(spec, group, size)
        kept = sorted(torch.randperm(size + 3, generator=torch.Generator().manual_seed(1))[:size].tolist())
        child = inherit(detector(spec), child_spec, channels=dict.fromkeys(coupled, kept))
        whole = detector(spec)
        for name in coupled:
            whole = masked(whole, name, kept)
        assert_same(outputs(child), outputs(whole))
        assert (
            sum(p.numel() for p in child.parameters()) < sum(p.numel() for p in whole.parameters()) or norm == "frozen"
        )


def test_a_wrong_reader_in_a_group_would_show():
    whole = detector(small_spec())
    pruned, _ = shrunk(whole.spec, "fpn", 12)
    kept = list(range(12))
    child = inherit(whole, pruned, channels={"fpn": kept, "fpn.top_down": kept, "rpn": kept})
    forgotten = masked(masked(detector(small_spec()), "fpn", kept), "rpn", kept)  # fpn.top_down not masked
    with pytest.raises(AssertionError):
        assert_same(outputs(child), outputs(forgotten))


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_growing_in_depth_and_width_changes_no_output(block):
    parent = detector(small_spec(block))
    inner = {"basic": (24,), "bottleneck": (24, 16)}[block]
    stages = tuple(Stage(stage.width, (inner,) * 3) for stage in parent.spec.stages)
    grown = parent.spec.replace(stages=stages, fpn=24, box_head=32)
    order = [[0, NEW, 1], [0, 1, NEW], [0, 1, NEW], [0, NEW, 1]]
    channels = {}
    for name, group in channel_groups(grown).items():
        before = channel_groups(parent.spec)
        number, _, rest = name[5:].partition(".") if name.startswith("layer") and "inner" in name else ("", "", "")
        if number:
            ancestor = order[int(number) - 1][int(rest.split(".")[0])]
            if ancestor == NEW:
                continue
            size = before[f"layer{number}.{ancestor}.{rest.split('.')[1]}"].size
        else:
            size = before[name].size
        channels[name] = [*range(size), *[NEW] * (group.size - size)]
    child = inherit(parent, grown, channels=channels, blocks=order)
    assert_same(outputs(child)[:2], outputs(parent)[:2])
    child.train()
    losses = child(
        [torch.rand(3, 64, 96)],
        [{"boxes": torch.tensor([[4.0, 4.0, 30.0, 40.0]]), "labels": torch.tensor([1])}],
    )
    sum(losses.values()).backward()
    last = {"basic": "bn2", "bottleneck": "bn3"}[block]
    gamma = getattr(child.backbone.body.layer2[2], last).weight
    assert gamma.eq(0).all() and gamma.grad.abs().sum() > 0, "an added block must be able to learn"


def test_inheriting_nothing_new_is_the_same_detector():
    parent = detector(small_spec())
    child = inherit(parent, parent.spec)
    assert all(torch.equal(child.state_dict()[name], tensor) for name, tensor in parent.state_dict().items())


@pytest.mark.parametrize(
    ("channels", "blocks", "says"),
    [
        ({"layer1.0.inner1": [0, 1]}, None, "indices below 8, got 2"),
        ({"layer1.0.inner1": list(range(1, 9))}, None, "got 8 from 1 to 8"),
        ({"layer9": [0]}, None, "layer9"),
        (None, [[1, 0], [0, 1], [0, 1], [0, 1]], r"begin with block 0, got \[1, 0\]"),
    ],
)
def test_an_inheritance_that_does_not_fit_is_refused(channels, blocks, says):
    parent = detector(small_spec())
    with pytest.raises(InputError, match=says):
        inherit(parent, parent.spec, channels=channels, blocks=blocks)


def test_a_residual_width_cannot_change_unnoticed():
    parent = detector(small_spec())
    stages = (Stage(24, parent.spec.stages[0].blocks), *parent.spec.stages[1:])
    with pytest.raises(InputError, match=r"layer1.*name the channels"):
        inherit(parent, parent.spec.replace(stages=stages))


def test_every_channel_of_every_tensor_is_in_a_group():
    for block in ("basic", "bottleneck"):
        model = build(small_spec(block))
        groups = channel_groups(model.spec).values()
        made = {tensor for group in groups for tensor, _ in group.producers}
        read = {tensor for group in groups for tensor, _, _ in group.consumers}
        state = model.state_dict()
        outs = {n for n in made | read if "predictor" not in n and "cls_logits" not in n and "bbox_pred" not in n}
        weights = {n for n, t in state.items() if t.dim() > 0}
        free = {n for n in weights if n.startswith(("rpn.head.cls", "rpn.head.bbox", "roi_heads.box_predictor"))}
        assert weights - free == outs
        assert {n for n in weights if state[n].dim() > 1} - {"backbone.body.conv1.weight"} == read
        for group in groups:
            assert all(state[n].shape[d] == group.size for n, d in group.producers)
            assert all(state[n].shape[d] == group.size * r for n, d, r in group.consumers)


def test_a_spec_survives_json_and_its_id_names_the_architecture():
    spec = small_spec("bottleneck")
    assert DetectorSpec.from_json(spec.to_json()) == spec
    assert DetectorSpec.from_json(spec.to_json()).id == spec.id
    assert spec.replace(fpn=17).id != spec.id


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
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["spec.json", "weights.safetensors"]
    again = load(tmp_path / "a")
    assert again.spec == model.spec
    assert_same(outputs(again), outputs(model))


def test_a_base_without_spec_or_with_foreign_weights_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no spec\.json"):
        load(tmp_path)
    save(tmp_path / "a", build(small_spec()))
    save(tmp_path / "b", build(small_spec(fpn=24)))
    (tmp_path / "b" / "spec.json").write_text((tmp_path / "a" / "spec.json").read_text())
    with pytest.raises(InputError, match=r"fpn.*\[24.*in it and \[16"):
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
    save(tmp_path, build(named_spec("faster_rcnn_r18_fpn", CLASSES, width=0.125, max_detections=300)))
    model = load(tmp_path)
    assert model.spec.max_detections == model.roi_heads.detections_per_img == 300
    before = {name: value for name, value in json.loads(model.spec.to_json()).items() if name != "max_detections"}
    assert DetectorSpec.from_json(json.dumps(before)) == model.spec.replace(max_detections=100)


@pytest.mark.parametrize("what", [build, channel_groups])
@pytest.mark.parametrize("given", ["faster_rcnn_r18_fpn", nn.Linear(1, 1)])
def test_what_takes_a_spec_says_so(what, given):
    with pytest.raises(InputError, match=f"{what.__name__} takes a DetectorSpec, got"):
        what(given)


@pytest.mark.parametrize("wrapper", [lambda model: model, nn.DataParallel, AveragedModel])
def test_a_model_without_a_spec_is_refused_before_anything_is_written(wrapper, tmp_path):
    plain = wrapper(resnet18())
    with pytest.raises(InputError, match=r"save takes a detector .* got a ResNet without one.*load_weights"):
        save(tmp_path / "a", plain)
    assert not (tmp_path / "a").exists()
    with pytest.raises(InputError, match="inherit takes a detector"):
        inherit(plain, small_spec())
    save(tmp_path / "b", wrapper(detector(small_spec())))
    assert load(tmp_path / "b").spec == small_spec()


def test_a_folded_detector_is_not_saved_under_a_spec_that_it_no_longer_fits(tmp_path):
    with pytest.raises(InputError, match=r"save takes .* where backbone\.body\.bn1\.weight .* it is gone.*deployable"):
        save(tmp_path / "a", deployable(detector(small_spec())))
    model = detector(small_spec())
    model.backbone.body.layer1[0].conv1 = nn.Conv2d(16, 9, 3)
    with pytest.raises(InputError, match=r"inherit takes .*layer1\.0\.conv1\.weight has 8 channels.*it has 9 channels"):
        inherit(model, model.spec)
    assert not (tmp_path / "a").exists()


def replaced(model):
    model.roi_heads.box_predictor = FastRCNNPredictor(model.spec.box_head, 9)


def masked_weight(model):
    prune.l1_unstructured(model.roi_heads.box_predictor.cls_score, "weight", 0.3)


def grown(model):
    model.extra = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (replaced, r"box_predictor\.bbox_pred\.bias is \[36\] in it and \[16\] in the spec"),
        (masked_weight, r"cls_score\.weight is nothing in it and \[4, 24\] in the spec"),
        (grown, r"extra\.bias is \[2\] in it and nothing in the spec"),
    ],
)
def test_what_could_not_be_loaded_again_is_not_saved(change, says, tmp_path):
    model = detector(small_spec())
    change(model)
    with pytest.raises(InputError, match=f"the detector to save does not fit.*{says}"):
        save(tmp_path / "a", model)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("place", ["file", "file/below", "link", "l" * 300])
def test_a_detector_is_not_saved_where_no_folder_can_be(place, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "x")
    with pytest.raises(InputError, match=r"the folder of the detector .* cannot be a folder to write to"):
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
