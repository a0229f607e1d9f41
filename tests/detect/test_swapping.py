"""One detector's heads on another's backbone and neck."""

import pytest
import torch
from torch import nn

from jdkd.detect import adopt, load, narrowed, open_model, save, swap_features
from jdkd.detect import detector as family
from jdkd.errors import InputError
from jdkd.notices import Notice
from jdkd.train import TrainConfig, fit
from jdkd.train.freezing import frozen
from tests.detectors import CLASSES, detector, small_spec
from tests.train.scenes import write_scenes

SMALL = {"channels": 32, "min_size": 64, "max_size": 96}


@pytest.fixture(scope="module")
def retinanet():
    torch.manual_seed(0)
    return family("retinanet", "mobilenet_v3_small", CLASSES, **SMALL).eval()


@pytest.fixture(scope="module")
def two_stages():
    return detector(small_spec(fpn=32))


@pytest.fixture(scope="module")
def other():
    return detector(small_spec(fpn=32, box_head=16), seed=1)


def _state(model, prefix):
    return {name: tensor for name, tensor in model.state_dict().items() if name.startswith(prefix)}


def _equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def _detections(model, seed=0):
    images = [torch.rand(3, 64, 80, generator=torch.Generator().manual_seed(seed))]
    with torch.no_grad():
        return model.eval()(images)[0]


def _same(one, other):
    return all(torch.equal(one[name], other[name]) for name in ("boxes", "labels", "scores"))


def test_the_features_are_the_ones_and_the_heads_the_others_and_both_stay_as_they_were(two_stages, other, tmp_path):
    before = [_detections(model) for model in (two_stages, other)]
    made = swap_features(two_stages, other)
    assert type(made) is type(other) and made.architecture.classes == CLASSES
    assert _equal(_state(made, "backbone."), _state(two_stages, "backbone."))
    assert _equal(_state(made, "roi_heads."), _state(other, "roi_heads."))
    assert _equal(_state(made, "rpn."), _state(other, "rpn."))
    assert not {id(p) for p in made.parameters()} & {id(p) for p in (*two_stages.parameters(), *other.parameters())}
    for model, seen in zip((two_stages, other), before, strict=True):
        assert _same(_detections(model), seen)
    images, _ = other.transform([torch.rand(3, 64, 80)])
    expected = other.rpn.head(list(two_stages.backbone(images.tensors).values()))
    found = made.rpn.head(list(made.backbone(images.tensors).values()))
    assert all(torch.equal(*pair) for pair in zip(found[0], expected[0], strict=True))
    save(tmp_path / "made", made)
    assert _same(_detections(load(tmp_path / "made")), _detections(made))
    assert load(tmp_path / "made").architecture == made.architecture


def test_swapped_with_itself_it_is_what_it_was(two_stages):
    made = swap_features(two_stages, two_stages)
    assert _same(_detections(made), _detections(two_stages)) and len(_detections(made)["boxes"])
    assert made.architecture.arguments["levels"] is None


@pytest.mark.parametrize(
    ("pair", "stand_in"), [(("two_stages", "retinanet"), "128"), (("retinanet", "two_stages"), "4")]
)
def test_levels_are_matched_by_stride_and_the_nearest_stands_in(pair, stand_in, request, tmp_path):
    features, head = map(request.getfixturevalue, pair)
    with pytest.warns(Notice, match=f"no level of stride {stand_in}, which the head reads"):
        made = swap_features(features, head)
    batch = torch.rand(1, 3, 128, 256)
    own, theirs, made_of = (model.backbone(batch) for model in (head, features, made))
    assert [*made_of] == [*own] and [level.shape for level in made_of.values()] == [
        level.shape for level in own.values()
    ]
    by_stride = {128 // level.shape[2]: level for level in theirs.values()}
    for level in made_of.values():
        stride = 128 // level.shape[2]
        if stride in by_stride:
            assert torch.equal(level, by_stride[stride])
        elif stride == 4:
            assert torch.equal(level, by_stride[8].repeat_interleave(2, 2).repeat_interleave(2, 3))
        else:
            assert torch.equal(level, by_stride[64][:, :, ::2, ::2])
    save(tmp_path / "made", made)
    assert _same(_detections(load(tmp_path / "made")), _detections(made))


def test_images_come_as_the_features_learned_from_them(two_stages):
    larger = detector(small_spec(fpn=32, min_size=96, max_size=128))
    larger.transform.image_mean = [0.1, 0.2, 0.3]
    with pytest.warns(Notice, match=r"trained on images resized to 96 .* gets them as the features do, resized to 64"):
        made = swap_features(two_stages, larger)
    assert made.transform.min_size == (64,) and made.transform.image_mean == two_stages.transform.image_mean


def test_what_was_pruned_is_swapped_as_it_is(two_stages, other, tmp_path):
    features, head = narrowed(two_stages, 0.5), narrowed(other, 0.5)
    made = swap_features(features, head)
    assert _equal(_state(made, "backbone."), _state(features, "backbone."))
    save(tmp_path / "made", made)
    assert _same(_detections(load(tmp_path / "made")), _detections(made))
    with pytest.raises(InputError, match="the head reads 32 channels at stride 4, and the features have 16"):
        swap_features(features, two_stages)


def test_a_detector_that_was_swapped_can_be_swapped_on_and_opened_by_its_folder(retinanet, two_stages, other, tmp_path):
    with pytest.warns(Notice):
        again = swap_features(swap_features(retinanet, two_stages), other)
    save(tmp_path / "again", again)
    opened = open_model(str(tmp_path / "again"))
    assert _same(_detections(opened), _detections(again))


def test_what_has_no_features_of_its_own_is_refused(retinanet):
    inside = adopt(retinanet, pyramid="backbone")
    inside.architecture = retinanet.architecture
    for pair, who in (((inside, retinanet), "features"), ((retinanet, inside), "head")):
        with pytest.raises(InputError, match=rf"gives the {who} \(Adopted\) has no backbone and no transform"):
            swap_features(*pair)
    flat = detector(small_spec())
    flat.backbone = nn.Conv2d(3, 16, 1)
    with pytest.raises(InputError, match="returns no pyramid of levels"):
        swap_features(flat, retinanet)
    del flat.architecture
    with pytest.raises(InputError, match="carries its architecture"):
        swap_features(retinanet, flat)


def test_what_is_frozen_neither_learns_nor_counts_while_the_rest_is_trained(tmp_path):
    made = swap_features(detector(small_spec()), detector(small_spec(), seed=1)).train()
    before = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    wanted = {name: parameter.requires_grad for name, parameter in made.named_parameters()}
    scenes, config = write_scenes(tmp_path, images=4), TrainConfig(steps=2, batch_size=2, lr=0.01)
    with frozen(made.backbone):
        fit(made, scenes, config, device="cpu")
    after = made.state_dict()
    changed = {name.partition(".")[0] for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {"rpn", "roi_heads"}
    assert {name: parameter.requires_grad for name, parameter in made.named_parameters()} == wanted
    fit(made, scenes, config, device="cpu")  # and then it learns again
    assert not torch.equal(
        made.state_dict()["backbone.fpn.inner_blocks.0.0.weight"], before["backbone.fpn.inner_blocks.0.0.weight"]
    )
    assert not torch.equal(made.backbone.body.bn1.running_mean, before["backbone.body.bn1.running_mean"])
