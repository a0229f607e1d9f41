"""What an elastic convolution refuses, and what it takes for channels."""

import pytest
import torch

from jdkd.errors import InputError
from jdkd.functional import elastic_conv2d, elastic_conv2d_levels


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"x": torch.ones(2, 3, 5, 5, dtype=torch.int32)}, "x is torch.int32; give a floating tensor"),
        ({"x": [1.0]}, "x is list; give a floating tensor"),
        ({"x": torch.ones(2, 3, 5, 5, device="meta")}, "x is on meta and weight on cpu; move one"),
        ({"weight": torch.ones(4, 3, 3)}, r"weight is \(4, 3, 3\); give the shared weight"),
        ({"bias": torch.ones(3)}, r"bias has shape \(3,\); give the shared bias of all 4 outputs"),
        ({"bias": [1.0]}, "bias is a list; give the shared bias of all 4 outputs"),
        ({"groups": 3}, "groups=3 does not divide the 4 output channels of weight; give a divisor"),
    ],
)
def test_what_is_no_image_weight_or_bias_is_refused_in_a_sentence(given, message):
    image, weight, bias = torch.ones(2, 3, 5, 5), torch.ones(4, 3, 3, 3), torch.ones(4)
    given = {"x": image, "weight": weight, "bias": bias} | given
    with pytest.raises(InputError, match=message):
        elastic_conv2d(given.pop("x"), **given)
    level = given.get("weight"), given.get("bias")
    for levels in ({"P3": image}, (x for x in [image]), [image.tolist()]):
        with pytest.raises(InputError, match=r"give a list of levels|give floating tensors"):
            elastic_conv2d_levels(levels, weight)
    if level[0].dim() == 3 or level[1] is not bias:
        with pytest.raises(InputError, match=message):
            elastic_conv2d_levels([image], *level)


def test_numbers_and_arrays_of_numpy_are_channels():
    numpy = pytest.importorskip("numpy")
    x, weight = torch.randn(2, 3, 5, 5), torch.randn(8, 6, 3, 3)
    expected = elastic_conv2d(x, weight, in_channels=[4, 0, 2], out_channels=5)
    for listed in (numpy.array([4, 0, 2]), list(numpy.array([4, 0, 2]))):
        assert torch.equal(elastic_conv2d(x, weight, in_channels=listed, out_channels=numpy.int64(5)), expected)
    for wrong in (numpy.array([0.0, 1.0, 2.0]), numpy.array([True, False, True]), numpy.float32(3)):
        with pytest.raises(InputError, match="in_channels"):
            elastic_conv2d(x, weight, in_channels=wrong)


@pytest.mark.parametrize("index", [[4, 0, 2], torch.tensor([4, 0, 2])], ids=["list", "tensor"])
def test_listed_channels_follow_to_the_meta_device(index):
    y = elastic_conv2d(
        torch.empty(2, 3, 5, 5, device="meta"),
        torch.empty(8, 6, 3, 3, device="meta"),
        in_channels=index,
        out_channels=[7],
    )
    assert y.shape == (2, 1, 3, 3) and y.is_meta
