"""A torchvision detector small enough to time in a test."""

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d, MultiScaleRoIAlign


class Block(nn.Module):
    def __init__(self, width: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), norm(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Backbone(nn.Module):
    out_channels = 8

    def __init__(self, width: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 7, 4, 3, bias=False), norm(width), nn.ReLU())
        self.block = Block(width, norm)
        self.down = nn.Sequential(nn.Conv2d(width, width, 3, 2, 1, bias=False), norm(width))
        self.fpn = FeaturePyramidNetwork([width, width], self.out_channels)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        fine = self.block(self.stem(x))
        return self.fpn(OrderedDict([("0", fine), ("1", self.down(fine))]))


def detector(width: int = 16, norm: type[nn.Module] = nn.BatchNorm2d, seed: int = 0) -> FasterRCNN:
    """A two-level Faster R-CNN whose normalisations have statistics that matter."""
    torch.manual_seed(seed)
    model = FasterRCNN(
        Backbone(width, norm),
        num_classes=4,
        min_size=64,
        max_size=96,
        rpn_anchor_generator=AnchorGenerator(((16,), (32,)), ((0.5, 1.0, 2.0),) * 2),
        box_roi_pool=MultiScaleRoIAlign(["0", "1"], 7, 2),
        rpn_post_nms_top_n_test=20,
        box_score_thresh=0.0,
    )
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, FrozenBatchNorm2d)):
            with torch.no_grad():
                for tensor in (module.weight, module.running_var):
                    tensor.uniform_(0.5, 2.0)
                for tensor in (module.bias, module.running_mean):
                    tensor.normal_()
    return model.eval()


@pytest.fixture
def make_detector() -> Callable[..., FasterRCNN]:
    return detector


@pytest.fixture
def model() -> FasterRCNN:
    return detector()


@pytest.fixture
def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (3, 64, width), dtype=torch.uint8, generator=generator) for width in (64, 96, 80)]
