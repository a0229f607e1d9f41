import copy
from types import MethodType

import pytest
import torch
from torch import nn
from torch.nn.utils import prune, spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel
from torchvision.ops import FrozenBatchNorm2d

from jdkd.errors import InputError
from jdkd.latency import fuse_for_inference, measure, profile_cost
from jdkd.latency.folding import batch_norms


def _floats(images):
    return [image.float() / 255 for image in images]


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d])
def test_folds_every_normalisation_without_changing_the_detections(norm, images, make_detector):
    model = make_detector(norm=norm)
    copy_ = fuse_for_inference(model)
    assert batch_norms(model) == 4 and batch_norms(copy_) == 0
    with torch.no_grad():
        for before, after in zip(model(_floats(images)), copy_(_floats(images)), strict=True):
            assert len(before["boxes"]) > 0
            torch.testing.assert_close(after["labels"], before["labels"])
            torch.testing.assert_close(after["scores"], before["scores"], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(after["boxes"], before["boxes"], rtol=1e-4, atol=1e-3)


def test_leaves_the_original_as_it_was(model):
    model.train()
    before = copy.deepcopy(model.state_dict())
    fuse_for_inference(model)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_is_eval_frozen_and_channels_last(model):
    copy_ = fuse_for_inference(model.train())
    assert not any(module.training for module in copy_.modules())
    assert not any(parameter.requires_grad for parameter in copy_.parameters())
    weight = copy_.backbone.block.conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


class _Shared(nn.Module):
    """The convolution's output is normalised and also used raw, so folding would change the result."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return y + self.norm(y)


class _Twice(nn.Module):
    """One normalisation after two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.a(x)) + self.norm(self.b(x))


class _Reused(nn.Module):
    """A convolution that runs once more, and not into the normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)) + self.conv(2 * x)


class _Held(nn.Module):
    """The same, where no trace shows it: the convolution is held under two names, and control flow depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.normed = nn.Sequential(self.conv, nn.BatchNorm2d(4))

    @property
    def norm(self):
        return self.normed[1]

    def forward(self, x):
        return self.normed(x) + self.conv(x) if x.sum() < 1e9 else x


class _Before(nn.Module):
    """Normalisation first, but declared in the order that would mislead a reader of names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.conv(self.norm(x))


class _Rectified(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class _Halved(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight / 2, self.bias)


class _Stack(nn.Sequential):
    def __init__(self, norm, conv=nn.Conv2d) -> None:
        super().__init__()
        self.conv, self.norm = conv(3, 4, 1), norm


def _hooked() -> nn.Module:
    model = _Stack(nn.BatchNorm2d(4))
    model.norm.register_forward_hook(lambda norm, inputs, output: 2 * output)
    return model


def _patched() -> nn.Module:
    model = _Stack(nn.BatchNorm2d(4))
    model.conv.forward = MethodType(lambda conv, x: 2 * nn.Conv2d.forward(conv, x), model.conv)
    return model


@torch.no_grad()
def _pruned() -> nn.Module:
    model = _Stack(nn.BatchNorm2d(4))
    prune.l1_unstructured(model.conv, "weight", 0.5)  # a hook computes its weight at every call
    return model


@pytest.mark.parametrize(
    "make",
    [
        _Shared,
        _Twice,
        _Reused,
        _Held,
        _Before,
        lambda: _Stack(_Rectified(4)),
        lambda: _Stack(nn.BatchNorm2d(4), _Halved),
        lambda: _Stack(nn.BatchNorm2d(4, track_running_stats=False)),
        _hooked,
        _patched,
        _pruned,
    ],
    ids=[
        *("shared", "twice", "reused", "held twice", "before", "rectified", "halved", "without statistics"),
        *("hooked", "patched", "pruned"),
    ],
)
def test_keeps_a_normalisation_that_cannot_be_folded(make):
    model = make()
    if model.norm.track_running_stats:
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
    model.eval()
    x = torch.randn(2, 3, 5, 5)
    folded = fuse_for_inference(model)
    assert batch_norms(folded) == 1
    torch.testing.assert_close(folded(x), model(x))


def test_a_normalisation_is_folded_with_its_own_epsilon():
    model, x = _Stack(nn.BatchNorm2d(4, eps=0.5)).eval(), torch.randn(2, 3, 5, 5)
    folded = fuse_for_inference(model)
    assert batch_norms(folded) == 0
    torch.testing.assert_close(folded(x), model(x))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("has_run", [False, True], ids=["with a gradient", "without"])
@pytest.mark.parametrize("hook", [weight_norm, spectral_norm, lambda conv: prune.l1_unstructured(conv, "weight", 0.5)])
def test_a_weight_that_a_hook_computes_is_left_to_it(hook, has_run):
    model, x = _Stack(nn.BatchNorm2d(4)), torch.randn(2, 3, 5, 5)
    hook(model.conv)
    model(x)  # statistics
    model.eval()
    with torch.set_grad_enabled(not has_run):
        model(x)
    folded = fuse_for_inference(model)
    assert batch_norms(folded) == 1 and not any(parameter.requires_grad for parameter in folded.parameters())
    torch.testing.assert_close(folded(x), model(x))


SCALES, OBLONG = [1 / 4, 1 / 8], torch.zeros(3, 60, 192)


@pytest.mark.parametrize(
    "seen",
    [
        fuse_for_inference,
        lambda model: profile_cost(model, (60, 192)) and model,
        lambda model: measure({"a": model}, [OBLONG], rounds=1, min_seconds=0, warmup_limit=0) and model,
    ],
    ids=["fuse_for_inference", "profile_cost", "measure"],
)
def test_oblong_images_do_not_set_the_scales_of_a_foreign_detector(model, seen):
    model.transform.min_size, model.transform.max_size = (128,), 128
    model = seen(model)
    model([OBLONG])
    assert model.roi_heads.box_roi_pool.scales == SCALES


def test_the_detector_inside_a_wrapper_is_folded(model):
    copy_ = fuse_for_inference(AveragedModel(model))
    assert type(copy_) is type(model) and batch_norms(copy_) == 0


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_model_is_refused():
    with pytest.raises(InputError, match="fuse_for_inference cannot look into the model, a scripted"):
        fuse_for_inference(torch.jit.script(nn.Conv2d(3, 4, 1)))
