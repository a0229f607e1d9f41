"""An accelerated detector finds the same, keeps its state dict, refuses training, and can be given back."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from jdkd import patch
from jdkd.detect import detector as build
from jdkd.detect import read
from jdkd.errors import InputError
from jdkd.latency import fuse_for_inference, profile_cost
from jdkd.patch import INGREDIENTS, accelerate, convolutions, restore
from tests.detect.elsewhere import make as make_adopted
from tests.latency.conftest import detector

ON_CPU = tuple(name for name in INGREDIENTS if name != "graphs")
TWO_STAGE = {"box_head": 16}


def found(model: nn.Module, images: list[Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        return model(images)[0]


def assert_alike(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert len(ours["boxes"]) == len(theirs["boxes"]) > 5
    torch.testing.assert_close(ours["labels"], theirs["labels"])
    torch.testing.assert_close(ours["boxes"], theirs["boxes"], rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(ours["scores"], theirs["scores"], rtol=1e-3, atol=1e-4)


def everything(model: nn.Module) -> list[tuple[str, dict, list[tuple]]]:
    """What a module holds, and where its tensors lie."""
    seen = []
    for name, module in model.named_modules():
        own = {k: repr(v) for k, v in vars(module).items() if k not in ("_modules", "_parameters", "_buffers")}
        tensors = [*module._parameters.items(), *module._buffers.items()]
        places = [(k, None if v is None else (id(v), v.data_ptr(), v.stride(), v._version)) for k, v in tensors]
        seen.append((name, own, places))
    return seen


@pytest.mark.parametrize("ingredients", [*((name,) for name in ON_CPU), ON_CPU], ids=" ".join)
def test_detections_are_those_of_the_plain_model(model, images, ingredients):
    before = found(model, images)
    one = accelerate(model, images, ingredients=ingredients, timed=False)
    assert one.kept == ingredients
    assert one.difference.detections > 10 and one.difference.stage < 1e-5
    assert_alike(model(images)[0], before)
    small = [image[:, :48, :80] for image in images]  # another size than it was checked on
    after = found(model, small)
    restore(model)
    assert_alike(after, found(model, small))


def test_code_that_cannot_be_followed_is_named_with_what_it_raised(model, images):
    one = accelerate(model, images, ingredients=("fused",), timed=False)
    assert all(model.get_submodule(path) for path in one.unfollowed) and "rpn.head" in one.unfollowed
    assert f"rpn.head is not fused: {one.unfollowed['rpn.head']}" in str(one)


def test_every_ingredient_changes_what_runs(model, images, monkeypatch):
    ran: list[str] = []
    for kind in (convolutions.Onednn, convolutions.Aten):
        run = kind.run

        def heard(self, x, weights, conv, residual, relu, run=run):
            packed = "packed" if weights[0].is_mkldnn else "dense"
            ran.append(f"{self.name} {packed}{' relu' if relu else ''}{'' if residual is None else ' residual'}")
            return run(self, x, weights, conv, residual, relu)

        monkeypatch.setattr(kind, "run", heard)
    seen = {}
    for ingredients in (("fused",), ("packed",), ON_CPU):
        with accelerate(model, images, ingredients=ingredients, timed=False):
            ran.clear()
            model(images)
            seen[ingredients] = set(ran), len(ran)
    assert {"ATen dense", "oneDNN dense relu", "oneDNN dense relu residual"} <= seen["fused",][0]
    assert seen["packed",][0] == {"oneDNN packed"}
    assert {"oneDNN packed relu", "oneDNN packed relu residual"} <= seen[ON_CPU][0]
    assert seen[ON_CPU][1] == seen["packed",][1] - 3, "the head's three convolutions run once over two levels"


def test_restore_gives_all_back_bit_for_bit(model, images):
    untouched = everything(model)
    accelerate(model, [images[0][:, :20]], timed=False).restore()
    assert everything(model) == untouched, "pools infer their scales from the first image that the model itself sees"
    first, before = found(model, images), everything(model)
    state = copy.deepcopy(model.state_dict())
    with accelerate(model, images, timed=False) as one:
        assert everything(model) != before
        model(images)
    one.restore()  # again changes nothing
    assert everything(model) == before
    again = found(model, images)
    assert all(torch.equal(again[key], first[key]) for key in first)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_the_state_dict_is_the_plain_models_and_loads_both_ways(model, images):
    plain, state = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    accelerate(model, images, timed=False)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    plain.load_state_dict(model.state_dict())
    other = detector(seed=3)
    assert not torch.allclose(found(model, images)["scores"][:5], found(other, images)["scores"][:5], atol=1e-3)
    model.load_state_dict(other.state_dict())
    assert_alike(found(model, images), found(other, images))


@pytest.mark.parametrize("how", ["in place", "assigned", "a part"])
def test_weights_that_change_are_folded_anew(model, images, how):
    accelerate(model, images, timed=False)
    found(model, images)
    other = detector(seed=3)
    if how == "in place":
        with torch.no_grad():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                tensor.copy_(other.state_dict()[name])
    elif how == "assigned":
        model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    else:
        for name, child in model.named_children():
            child.load_state_dict(getattr(other, name).state_dict())
    assert_alike(found(model, images), found(other, images))


def test_what_trains_is_refused(model, images):
    with pytest.raises(InputError, match="the model is in training mode, and accelerate is for inference"):
        accelerate(model.train(), images)
    model.eval().roi_heads.train()
    with pytest.raises(InputError, match="roi_heads is in training mode"):
        accelerate(model, images)
    one = accelerate(model.eval(), images, ingredients=("folded",), timed=False)
    for part in (model, model.backbone.fpn):
        part.train()
        with pytest.raises(InputError, match=r"for inference, and it is in training mode; call restore\(\) first"):
            model(images)
        model.eval()
    stem = next(module for module in model.modules() if type(module) is nn.Conv2d).train()
    with pytest.raises(InputError, match="a Conv2d of it is in training mode"):
        stem(torch.zeros(1, 3, 8, 8))
    model.eval()
    assert torch.is_grad_enabled(), "as it was before the refusals"
    one.restore()
    target = {"boxes": torch.tensor([[4.0, 4.0, 30.0, 30.0]]), "labels": torch.tensor([1])}
    sum(model.train()(images, [target]).values()).backward()
    assert stem.weight.grad.abs().sum() > 0


def test_gradients_are_refused_and_not_silently_cut(model, images):
    accelerate(model, images, ingredients=("folded",), timed=False)
    with pytest.raises(InputError, match="a gradient is asked of it"):
        model([images[0].clone().requires_grad_()])
    with pytest.raises(InputError, match="a gradient is asked of it"):
        model(images=[images[0].clone().requires_grad_()])
    assert not model(images)[0]["scores"].requires_grad and torch.is_grad_enabled()
    with pytest.raises(InputError, match="a gradient is asked of it"):
        model.backbone(torch.rand(1, 3, 64, 64, requires_grad=True))


def test_a_model_that_was_moved_is_refused(model, images):
    accelerate(model, images, timed=False)
    model.double()
    with pytest.raises(InputError, match="accelerated on cpu in float32 and is now on cpu in float64"):
        found(model, [image.double() for image in images])


def test_a_copy_and_a_pickle_are_plain(model, images):
    before = found(model, images)
    accelerate(model, images, timed=False)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False), AveragedModel(model).module):
        now = found(other, images)
        assert all(torch.equal(now[key], before[key]) for key in before)
        target = {"boxes": torch.tensor([[4.0, 4.0, 30.0, 30.0]]), "labels": torch.tensor([1])}
        assert all(loss.requires_grad for loss in other.train()(images, [target]).values())
        assert accelerate(other.eval(), images, ingredients=("folded",), timed=False).difference.stage > 0
    assert_alike(found(fuse_for_inference(model), images), before)


def test_a_shallow_copy_runs_its_own_children(model, images):
    before = found(model, images)
    accelerate(model, images, timed=False)
    other = copy.copy(model)
    changed = detector(seed=3).backbone
    other._modules = {**model._modules, "backbone": changed}
    assert not torch.equal(found(other, images)["boxes"], before["boxes"])
    assert_alike(found(model, images), before)


def test_who_looks_into_it_sees_the_plain_model(model, images):
    topology, cost = read(model), profile_cost(model, (64, 96))
    accelerate(model, images, ingredients=("folded", "packed", "fused"), timed=False)
    assert profile_cost(model, (64, 96)) == cost and cost.gmacs > 0
    assert read(model).to_json() == topology.to_json() and topology.prunable_share() > 0.5


@pytest.mark.parametrize("first", ["hooked", "accelerated"])
def test_a_hook_hears_what_it_would_without(model, images, first):
    """Before or after: normalisations, a convolution before one, the neck, layers of a head over levels."""
    block, head = model.backbone.block, model.rpn.head
    hooked = (block.bn2, block.conv1, model.backbone.stem[1], model.backbone.fpn, head.conv[0][0], head.cls_logits)
    heard: list[Tensor] = []

    def hook() -> list:
        hear = lambda module, args, out: heard.append(out if isinstance(out, Tensor) else out["0"])  # noqa: E731
        return [module.register_forward_hook(hear) for module in hooked]

    handles = hook()
    found(model, images)
    before = [out.clone() for out in heard]
    if first == "accelerated":
        for handle in handles:
            handle.remove()
        accelerate(model, images, timed=False)
        handles = hook()
    else:
        accelerate(model, images, timed=False)
    heard.clear()
    found(model, images)
    assert len(heard) == len(before) == 8
    for now, then in zip(heard, before, strict=True):
        torch.testing.assert_close(now, then, rtol=1e-4, atol=1e-5)


def test_a_layer_that_was_exchanged_is_refused(model, images):
    one = accelerate(model, images, ingredients=("folded",), timed=False)
    model.backbone.block.bn1 = nn.BatchNorm2d(16).eval()
    with pytest.raises(InputError, match="its bn1 is another module than then; call restore"):
        found(model, images)
    one.restore()
    found(model, images)


def test_twice_is_refused_and_a_wrapped_model_is_accelerated_inside(model, images):
    accelerate(AveragedModel(model).eval().module, images, ingredients=("folded",), timed=False)
    wrapped = AveragedModel(model).eval()
    one = accelerate(wrapped, images, ingredients=("folded",), timed=False)
    with pytest.raises(InputError, match="is accelerated already; call restore"):
        accelerate(wrapped, images)
    assert everything(wrapped.module) != everything(model)
    restore(wrapped)
    one.restore()
    accelerate(wrapped, images, ingredients=("folded",), timed=False)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_cannot_be_accelerated_is_refused_in_a_sentence(images):
    refused = {
        "takes a torch.nn.Module, got a str": "resnet",
        "accelerate cannot look into the model, a scripted": torch.jit.script(nn.Conv2d(3, 4, 1)).eval(),
        "has no parameters, and nothing to accelerate": nn.Identity().eval(),
    }
    for sentence, what in refused.items():
        with pytest.raises(InputError, match=sentence):
            accelerate(what, images)
    with pytest.raises(InputError, match="does not run on a list of images"):
        accelerate(nn.Conv2d(3, 4, 1).eval(), images)
    with pytest.raises(InputError, match="does not say what size of images it is for; give accelerate some"):
        accelerate(nn.Conv2d(3, 4, 1).eval())
    with pytest.raises(InputError, match="ingredients has spices; known are folded, channels_last"):
        accelerate(nn.Conv2d(3, 4, 1).eval(), images, ingredients=("spices",))
    with pytest.raises(InputError, match="images holds a str; give tensors"):
        accelerate(detector(), ["one.jpg"])
    with pytest.raises(InputError, match=r"images\[0\] has shape"):
        accelerate(detector(), [torch.rand(64, 96)])


def test_an_image_is_drawn_at_the_models_size(model):
    one = accelerate(model, ingredients=("folded",), timed=False)
    assert one.kept == ("folded",) and one.difference.detections > 0


def test_an_adopted_detector_is_accelerated():
    model = make_adopted().eval()
    images = [torch.rand(3, 40, 50, generator=torch.Generator().manual_seed(1))]
    one = accelerate(model, images, timed=False)
    assert {"folded", "fused", "packed"} <= set(one.kept) and 0 < one.difference.stage < 1e-5


def small(family: str) -> nn.Module:
    torch.manual_seed(0)
    own = TWO_STAGE if "rcnn" in family else {}
    model = build(family, "resnet18", 3, channels=32, min_size=64, max_size=96, **own).eval()
    for name, tensor in model.state_dict().items():
        if tensor.dtype.is_floating_point and tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5) if name.endswith(("weight", "running_var")) else tensor.uniform_(-0.2, 0.2)
    return model


@pytest.mark.slow
@pytest.mark.usefixtures("when_asked")
@pytest.mark.parametrize(
    "family", ["retinanet", "fasterrcnn", "maskrcnn", "keypointrcnn", "fcos", "atss", "gfl", "reppoints"]
)
def test_every_family_is_accelerated(family, images):
    model = small(family)
    before = found(model, images)
    one = accelerate(model, images, timed=False)
    assert set(one.kept) == set(ON_CPU), str(one)
    assert one.difference.stage < 1e-4 and one.difference.reason is None
    assert found(model, images).keys() == before.keys()


def test_patch_imports_no_torchvision_until_it_is_asked_to_accelerate():
    assert set(patch.__all__) >= {"accelerate", "openmmlab"} and patch.accelerate is accelerate
    with pytest.raises(AttributeError, match="has no attribute 'accelerator'"):
        _ = patch.accelerator
