import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models import resnet18

from jdkd.errors import InputError
from jdkd.latency import profile_cost
from tests.graph.networks import pan_detector


@pytest.mark.parametrize("width", [8, 16])
def test_counts_what_pencil_and_paper_count(make_detector, width):
    fpn, model = 8, make_detector(width)
    cost = profile_cost(model, (64, 64))  # stem at 16x16, level "1" at 8x8; 3 anchors a place, 20 proposals, 4 classes
    fine, coarse = 16 * 16, 8 * 8
    backbone = fine * (3 * 49 * width + 2 * 9 * width**2) + coarse * 9 * width**2
    neck = (fine + coarse) * (width * fpn + 9 * fpn**2)
    rpn = (fine + coarse) * (9 * fpn**2 + fpn * 3 * (1 + 4))
    heads = 20 * (49 * fpn * 1024 + 1024 * 1024 + 1024 * 4 * (1 + 4))
    assert cost.gmacs == (backbone + neck + rpn + heads) / 1e9
    assert cost.params == sum(parameter.numel() for parameter in model.parameters())


def test_does_not_depend_on_the_weights(make_detector):
    assert profile_cost(make_detector(seed=0)) == profile_cost(make_detector(seed=1))


def test_takes_the_detectors_own_input_size_and_leaves_it_as_it_was(model):
    model.train()
    model.backbone.eval()
    assert profile_cost(model).size == profile_cost(model, otherwise=(32, 32)).size == (64, 96)
    assert model.training and not model.backbone.training and model.rpn.training
    assert type(model.rpn).__name__ == "RegionProposalNetwork"
    assert torch.is_grad_enabled()


class Wrapper(nn.Module):
    """Somebody's own, which hands the images on."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        return self.inner(images)


@pytest.mark.parametrize(
    "wrapper", [AveragedModel, nn.DataParallel, Wrapper, lambda model: Wrapper(AveragedModel(model))]
)
def test_a_wrapped_detector_costs_what_it_does_without(wrapper, model):
    wrapped = wrapper(model)
    plain = profile_cost(model)
    for size in (None, (64, 96)):
        assert profile_cost(wrapped, size) == profile_cost(model, size)
    assert profile_cost(wrapped).gmacs == plain.gmacs
    assert not any("FullProposals" in type(module).__name__ for module in wrapped.modules())


@pytest.mark.parametrize(
    ("given", "size", "says"),
    [
        (resnet18, None, r"input size of a ResNet.*give size=\(height, width\)"),
        (resnet18, (64, 64), "ResNet does not run on a list of images"),
        (lambda: nn.Sequential(nn.Identity()), (64, 64), r"Sequential returned a Tensor for an image"),
    ],
)
def test_what_is_no_detector_is_told_what_to_do(given, size, says):
    with pytest.raises(InputError, match=says):
        profile_cost(given(), size)


def test_a_size_of_which_no_pixel_would_be_left_is_named(model):
    with pytest.raises(InputError, match=r"size is 1x5000 .*raise max_size to 5000"):
        profile_cost(model, (1, 5000))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_model_with_a_traced_part_is_refused(model):
    model.backbone = torch.jit.trace(model.backbone, torch.zeros(1, 3, 64, 64), strict=False)
    with pytest.raises(InputError, match="profile_cost cannot look into backbone, a scripted or traced module"):
        profile_cost(model)


def test_a_detector_without_an_input_size_is_charged_for_an_image_as_it_is():
    model = pan_detector()
    assert profile_cost(model, otherwise=(64, 96)) == profile_cost(model, (64, 96))
    with pytest.raises(InputError, match="does not know the input size of a PANDetector"):
        profile_cost(model)
