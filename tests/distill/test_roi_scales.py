"""The RoI pools of both detectors have the scales of the strides, whatever images came first."""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from jdkd.distill import HeadDistiller, attach
from jdkd.notices import Notice

RIGHT = [1 / 4, 1 / 8, 1 / 16, 1 / 32]


class FourLevels(nn.Module):
    out_channels = 4

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 4, 4)
        self.down = nn.ModuleList(nn.Conv2d(4, 4, 2, 2) for _ in range(3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        levels = [self.stem(x)]
        for convolution in self.down:
            levels.append(convolution(levels[-1]))
        return OrderedDict((str(index), level) for index, level in enumerate(levels))


def torchvisions(seed: int) -> FasterRCNN:
    """One that was built by torchvision alone, with images of 60x192 padded to 64x192."""
    torch.manual_seed(seed)
    sizes = {"min_size": 60, "max_size": 192, "rpn_post_nms_top_n_train": 20, "box_batch_size_per_image": 8}
    anchors = AnchorGenerator(((16,),) * 4, ((1.0,),) * 4)
    return FasterRCNN(FourLevels(), num_classes=3, rpn_anchor_generator=anchors, **sizes)


def batch() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    boxes = torch.tensor([[4.0, 4.0, 50.0, 40.0], [100.0, 10.0, 180.0, 58.0]])
    return [torch.rand(3, 40, 192)], [
        {"boxes": boxes.clamp(max=torch.tensor([192.0, 40, 192, 40])), "labels": torch.tensor([1, 2])}
    ]


def test_attach_sets_them_in_both_and_says_what_was_wrong():
    student, teacher = torchvisions(0).train(), torchvisions(1)
    teacher.roi_heads.box_roi_pool.scales = [0.5, 0.25, 0.125, 0.0625]  # inferred from an oblong batch
    teacher.roi_heads.box_roi_pool.map_levels = object()
    with pytest.warns(Notice, match=r"roi_heads.box_roi_pool had inferred the scales 1/2, 1/4, 1/8, 1/16"):
        handle = attach(student, teacher)
    with handle:
        student(*batch())
    for model in (student, teacher):
        assert model.roi_heads.box_roi_pool.scales == RIGHT
    assert (student.roi_heads.box_roi_pool.map_levels.k_min, student.roi_heads.box_roi_pool.map_levels.k_max) == (2, 5)


def test_the_head_term_pools_the_teachers_features_at_its_strides():
    student, teacher, seen = torchvisions(0).train(), torchvisions(1), {}
    heads = student.roi_heads
    heads.box_roi_pool.register_forward_pre_hook(lambda pool, inputs: seen.update(regions=inputs[1], sizes=inputs[2]))
    heads.box_predictor.register_forward_hook(lambda predictor, inputs, output: seen.update(logits=output[0]))
    with HeadDistiller(student, teacher) as distiller:
        student(*batch())
        pyramid = distiller.runner.of_teacher.pyramid
        found = distiller.loss()
    assert seen["sizes"] == [(40, 192)] and heads.box_roi_pool.scales == RIGHT

    def divergence(pool: nn.Module) -> float:
        regions = pool(pyramid, seen["regions"], seen["sizes"])
        taught = teacher.roi_heads.box_predictor(teacher.roi_heads.box_head(regions))[0]
        ours = F.log_softmax(seen["logits"], dim=1)
        return F.kl_div(ours, F.log_softmax(taught, dim=1), reduction="batchmean", log_target=True).item()

    right = teacher.roi_heads.box_roi_pool
    inferred = MultiScaleRoIAlign(right.featmap_names, right.output_size, right.sampling_ratio)
    assert found.item() == pytest.approx(divergence(right), rel=1e-4) and right.scales == RIGHT
    assert divergence(inferred) != pytest.approx(found.item(), rel=1e-3) and inferred.scales != RIGHT
