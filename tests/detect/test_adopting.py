"""A detector of another interface behind torchvision's: everything here takes it as any other."""

import functools

import pytest
import torch
from torch import Tensor, nn

from jdkd.detect import adopt, load, load_weights, open_model, read, save
from jdkd.distill import Distiller, FeatureDistiller, attach, correlations, pyramids
from jdkd.errors import InputError
from jdkd.latency import fuse_for_inference, measure, profile_cost
from jdkd.rewrite import Rewrite
from jdkd.train import TrainConfig, calibrate_bn, evaluate, fit
from tests.detect.elsewhere import Elsewhere, losses, make, predict
from tests.detectors import detector, small_spec
from tests.train.scenes import write_scenes

NAME = "tests.detect.elsewhere:make"


@pytest.fixture
def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, 40, 50, generator=generator), torch.rand(3, 72, 64, generator=generator)]


@pytest.fixture
def targets() -> list[dict[str, Tensor]]:
    box = torch.tensor([[4.0, 4.0, 30.0, 30.0]])
    return [{"boxes": box, "labels": torch.tensor([label])} for label in (1, 3)]


@pytest.fixture(scope="module")
def pruned() -> nn.Module:
    model = open_model(NAME)
    topology = read(model, check=True)
    return Rewrite(keep={group.name: range(0, group.units, 2) for group in topology.groups}).apply(model, topology)


def test_it_has_torchvisions_interface(images, targets):
    model, inner = make().eval(), Elsewhere()
    found = model(images)
    assert [entry.keys() for entry in found] == [{"boxes", "labels", "scores"}] * 2
    model.model.load_state_dict(inner.state_dict())
    terms = model.train()(images, targets)
    torch.testing.assert_close(terms["loss_class"], losses(inner, images, targets)["loss_class"])
    assert terms["loss_class"].shape == ()


def test_it_is_read_with_the_levels_of_its_pyramid():
    topology = read(open_model(NAME))
    assert [len(level) for level in topology.followed] == [8, 8]
    assert topology.followed[0][0] == ("model.encoder.stem.0.0", 0)
    assert topology.prunable_share() > 0.95 and len(topology.block_lists) == 1


def test_it_is_cut_saved_and_built_again_by_its_users_function(pruned, images, tmp_path):
    save(tmp_path, pruned)
    again = load(tmp_path)
    assert again.architecture.builder == NAME and again.architecture == pruned.architecture
    assert again.model.classify.in_channels == 4 and again.pyramid == "model.encoder"
    for ours, theirs in zip(pruned.eval()(images), again(images), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_its_own_weights_are_loaded_by_their_own_names(tmp_path):
    inner, model = Elsewhere(), make()
    torch.save(inner.state_dict(), tmp_path / "weights.pth")
    report = load_weights(model, tmp_path / "weights.pth")
    assert not report.missing and not report.unexpected
    assert torch.equal(model.model.classify.weight, inner.classify.weight)


def test_it_is_trained_calibrated_scored_and_timed(pruned, tmp_path):
    scenes = write_scenes(tmp_path)
    before = pruned.model.classify.weight.clone()
    fit(pruned, scenes, TrainConfig(steps=2, batch_size=4), device="cpu")
    assert not torch.equal(pruned.model.classify.weight, before)
    batch = [scenes[k][0].float() / 255 for k in range(4)]
    variance = pruned.model.encoder.stem[0][1].running_var.clone()
    calibrate_bn(pruned, [batch])
    assert not torch.equal(pruned.model.encoder.stem[0][1].running_var, variance)
    assert 0 <= evaluate(pruned, scenes, device="cpu").map <= 1
    base = make()
    assert profile_cost(pruned, (64, 64)).gmacs < profile_cost(base, (64, 64)).gmacs
    once = {"rounds": 1, "min_seconds": 0, "warmup_seconds": 0, "warmup_limit": 0}
    report = measure({"base": fuse_for_inference(base), "cut": fuse_for_inference(pruned)}, [scenes[0][0]], **once)
    assert report.models["cut"].modes().keys() == {"end_to_end"}
    assert report.models["cut"].facts["batch_norms"] == 0


def test_it_is_distilled_by_its_pyramid(pruned, images, targets):
    student, teacher = pruned.train(), make()
    every_other = tuple(range(0, 8, 2))
    with attach(student, teacher, channels=every_other) as handle:
        terms = student(images, targets)
    assert terms.keys() == {"loss_class", "loss_pkd"} and list(handle.losses) == [4, 8]
    with FeatureDistiller(student, teacher, channels=[every_other, every_other]) as distiller:
        student(images, targets)
        assert distiller.loss().item() == pytest.approx(terms["loss_pkd"].item(), rel=1e-4)
    with pytest.raises(InputError, match=r"student \(Adopted\) has no head .* distil the features only"):
        Distiller(student, teacher, head_weight=1.0)


def test_its_correlations_are_those_of_its_pyramid(images):
    ours, theirs = make(), make()
    assert correlations(ours, theirs, [images]) == pytest.approx({4: 0, 8: 0}, abs=1e-6)
    other = make(width=12)
    found = correlations(ours, other, [images], channels=range(8))
    assert list(found) == [4, 8] and all(0 < distance < 2 for distance in found.values())
    snapshots = pyramids(other, [images])
    assert snapshots[0].size == (64, 64), "what the detector itself makes of the images"
    assert correlations(ours, snapshots, [images], channels=range(8)) == pytest.approx(found, rel=1e-5)


def test_a_detector_that_has_the_interface_already_may_name_its_pyramid_alone(images):
    plain = detector(small_spec())
    model = adopt(plain, pyramid="backbone.fpn").eval()
    assert torch.equal(model(images)[0]["boxes"], plain(images)[0]["boxes"])
    assert [len(level) for level in read(model).followed] == [16] * 5
    assert list(correlations(model, detector(small_spec(), seed=3), [images])) == [4, 8, 16, 32]


REFUSED = {
    "no module": (lambda m: adopt("detr"), "adopt takes a torch.nn.Module, got a str"),
    "no path": (lambda m: adopt(m, pyramid="neck"), "pyramid is 'neck', and the Elsewhere has no submodule.*encoder"),
    "itself": (lambda m: adopt(m, pyramid=""), "pyramid is ''"),
    "no function": (lambda m: adopt(m, losses="loss"), "losses is a str; give a function"),
    "few arguments": (lambda m: adopt(m, predict=lambda images: []), r"predict cannot be called as predict\(model, im"),
    "many arguments": (lambda m: adopt(m, losses=lambda a, b, c, d: {}), "losses cannot be called .*'d'"),
    "closure": (lambda m: adopt(m, predict=lambda model, images: m(images)), "predict holds on to the Elsewhere"),
    "part": (lambda m: adopt(m, losses=functools.partial(losses, m.encoder)), "losses cannot be called|holds on"),
    "method": (lambda m: adopt(m, predict=m.predict), "predict holds on to the Elsewhere"),
    "default": (lambda m: adopt(m, predict=lambda a, b, model=m: model(b)), "predict holds on to the Elsewhere"),
    "keyword": (
        lambda m: adopt(m, predict=functools.partial(lambda a, b, head: head(b), head=m.classify)),
        "predict holds on to the Elsewhere that is adopted, or to a part",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_adopted_is_refused(name):
    class Own(Elsewhere):
        def predict(self, model: nn.Module, images: list[Tensor]) -> list[dict[str, Tensor]]:
            return predict(self, images)

    Own.__name__ = "Elsewhere"
    attempt, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        attempt(Own())


def test_a_function_may_hold_other_modules():
    criterion = nn.Linear(3, 1)
    adopt(Elsewhere(), losses=lambda model, images, targets: {"loss": criterion(images[0].mean((1, 2)))})


BAD_LOSSES = {
    "a Tensor": lambda loss: loss,
    "no loss": lambda loss: {},
    "a list as loss_box": lambda loss: {"loss_class": loss, "loss_box": [loss]},
    "a float as loss": lambda loss: {"loss": 0.5},
    r"a tensor \[2\] of torch.float32 as loss": lambda loss: {"loss": loss.expand(2)},
    "loss, of which none depends on a parameter": lambda loss: {"loss": loss.detach()},
}


@pytest.mark.parametrize("message", BAD_LOSSES)
def test_losses_that_are_none_are_named(message, images, targets):
    spoil = BAD_LOSSES[message]
    model = adopt(Elsewhere(), losses=lambda m, i, t: spoil(losses(m, i, t)["loss_class"]))
    with pytest.raises(InputError, match=f"losses of the adopted Elsewhere returned {message}"):
        model.train()(images, targets)


BAD_DETECTIONS = {
    "a list of 1 for 2 image": lambda found: found[:1],
    "a Output": lambda found: Elsewhere()(torch.rand(1, 3, 64, 64)),
    "no tensor of labels": lambda found: [{"boxes": each["boxes"], "scores": each["scores"]} for each in found],
    "labels of torch.float32": lambda found: [each | {"labels": each["labels"].float()} for each in found],
    r"boxes \[5, 2\]": lambda found: [each | {"boxes": each["boxes"][:, :2]} for each in found],
}


@pytest.mark.parametrize("message", BAD_DETECTIONS)
def test_detections_that_are_none_are_named(message, images):
    model = adopt(Elsewhere(), predict=lambda m, i: BAD_DETECTIONS[message](predict(m, i))).eval()
    with pytest.raises(InputError, match=f"predict of the adopted Elsewhere returned .*{message}"):
        model(images)


def test_training_without_targets_is_named(images):
    with pytest.raises(InputError, match=r"in training mode and was given no targets; give some, or eval\(\) it"):
        make().train()(images)
