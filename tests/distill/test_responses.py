"""What the channels of two pyramids respond to."""

import pytest
import torch

from jdkd.detect import detector as family
from jdkd.distill import correlations
from jdkd.distill.responses import responses
from jdkd.errors import InputError
from tests.detectors import detector, small_spec


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(3, 64, width, generator=generator) for width in (64, 88)]


@pytest.fixture(scope="module")
def pair():
    return detector(small_spec()), detector(small_spec(min_size=96, max_size=128), seed=1)


def test_r_is_that_of_every_channel_over_all_images_and_its_mean_is_the_correlation(pair, images):
    student, teacher = pair
    found = responses(student, teacher, images)
    distances = correlations(student, teacher, [[image] for image in images], own_size=True)
    assert [level.stride for level in found] == list(distances) == [4, 8, 16, 32]
    for level in found:
        assert len(level.r) == 16 and level.mapped is None and level.r.unique().numel() == 16
        assert 1 - level.r.mean().item() == pytest.approx(distances[level.stride], abs=1e-6)


def test_of_one_image_the_maps_are_standardised_and_correlate_as_r_says(pair, images):
    for level in responses(*pair, images[:1]):
        ours, theirs = level.student.double(), level.teacher.double()  # [C, H, W]
        assert ours.shape == theirs.shape == (16, 96 // level.stride, 96 // level.stride)  # at the teacher's size
        for maps in (ours, theirs):
            torch.testing.assert_close(maps.mean((1, 2)), torch.zeros(16).double(), atol=1e-5, rtol=0)
            torch.testing.assert_close(maps.flatten(1).std(1), torch.ones(16).double(), atol=1e-4, rtol=0)
        together = torch.stack((ours, theirs)).flatten(2)
        expected = [torch.corrcoef(together[:, channel])[0, 1].item() for channel in range(16)]
        assert level.r.tolist() == pytest.approx(expected, abs=1e-5)


def test_padding_is_not_drawn(pair, images):
    level = responses(*pair, images[1:])[0]  # 64x88, resized to 93x128 or so and padded to 96
    assert level.teacher.shape == (16, 24, 32)
    padded = responses(pair[0], detector(small_spec(min_size=68, max_size=68), seed=1), [torch.rand(3, 64, 64)])
    assert [tuple(one.teacher.shape[1:]) for one in padded] == [(17, 17), (9, 9), (5, 5), (3, 3)]  # not 24, 12, 6, 3


def test_a_detector_agrees_with_itself_and_a_silent_channel_with_nothing(images):
    student, teacher = detector(small_spec()), detector(small_spec())
    assert all((level.r > 1 - 1e-6).all() for level in responses(student, teacher, images))
    with torch.no_grad():
        for layer in student.backbone.fpn.layer_blocks:
            layer[0].weight[3] = 0.0
    for level in responses(student, teacher, images):
        assert level.r[3] == 0 and not level.student[3].any() and level.teacher[3].any()
        assert level.r[2] > 1 - 1e-6 and level.student.isfinite().all()


def test_other_widths_are_compared_through_the_best_linear_map_and_it_is_said(images):
    student, teacher = detector(small_spec(fpn=8)), detector(small_spec())
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    for level in responses(student, teacher, images):
        assert level.mapped == 8 and level.r.shape == (16,) and level.student.shape == level.teacher.shape
        assert (level.r > 0).all()
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    alike = responses(detector(small_spec()), teacher, images)
    assert all((level.r > 0.999).all() and level.mapped is None for level in alike)


def test_what_has_no_level_in_common_or_no_image_is_refused(pair, images):
    with pytest.raises(InputError, match="0 images"):
        responses(*pair, [])
    lite = family("ssdlite", "mobilenet_v3_small", 2, min_size=64).eval()
    with pytest.raises(InputError, match="stride"):
        responses(detector(small_spec()), _Coarse(lite), images)


class _Coarse(torch.nn.Module):
    """A detector of which only the coarsest level is left."""

    def __init__(self, inner):
        super().__init__()
        self.backbone, self.transform = _Last(inner.backbone), inner.transform

    def forward(self, images):
        return self.backbone(self.transform(images)[0].tensors)


class _Last(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return torch.nn.functional.avg_pool2d(next(iter(self.inner(x).values())), 4)
