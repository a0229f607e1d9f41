"""What numpy does before and behind a file against what torchvision does."""

import numpy as np
import pytest
import torch
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import batched_nms

from jdkd.errors import InputError
from jdkd.export.preparing import batch_of, pasted, suppressed


@pytest.mark.parametrize("size", [(60, 90), (131, 47), (427, 640), (3, 200)])
def test_images_are_resized_as_torchvision_does(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    transform = GeneralizedRCNNTransform(96, 150, [0.0] * 3, [1.0] * 3).eval()
    theirs, _ = transform([torch.from_numpy(image).permute(2, 0, 1).float() / 255])
    batch, sizes = batch_of([image], {"min_size": 96, "max_size": 150, "multiple": 32})
    assert sizes.tolist() == [list(theirs.image_sizes[0])]
    torch.testing.assert_close(torch.from_numpy(batch), theirs.tensors, atol=1e-4, rtol=0)


def test_images_are_resized_to_the_one_size_of_a_detector():
    image = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    transform = GeneralizedRCNNTransform(64, 96, [0.0] * 3, [1.0] * 3, size_divisible=1, fixed_size=(96, 64)).eval()
    theirs, _ = transform([torch.from_numpy(image).permute(2, 0, 1).float() / 255])
    batch, sizes = batch_of([image], {"min_size": 64, "max_size": 96, "multiple": 1, "fixed": [64, 96]})
    assert sizes.tolist() == [[64, 96]] == [list(theirs.image_sizes[0])]
    torch.testing.assert_close(torch.from_numpy(batch), theirs.tensors, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ([], "images holds none"),
        ([np.zeros((4, 5, 3), np.uint8), np.zeros((4, 5, 3), np.float32)], "image 1 is of float32 and shape"),
        (np.zeros((4, 5, 3), np.uint8), r"image 0 is of uint8 and shape \(5, 3\); give arrays \[H, W, 3\] of uint8"),
        ([torch.zeros(3, 4, 5, dtype=torch.uint8)], "image 0 is Tensor"),
    ],
    ids=["none", "floats", "one image", "a tensor"],
)
def test_what_is_no_list_of_pictures_is_refused(images, words):
    with pytest.raises(InputError, match=words):
        batch_of(images, {"min_size": 96, "max_size": 150, "multiple": 32})


def test_masks_are_pasted_as_torchvision_does():
    generator = torch.Generator().manual_seed(0)
    corners = torch.tensor(
        [[3.2, 4.1, 30.0, 20.6], [-2.0, 10.0, 12.5, 39.5], [50.0, 0.0, 60.0, 40.0], [9.0, 9.0, 9.2, 9.3]]
    )
    masks = torch.rand(4, 1, 14, 14, generator=generator)
    theirs = paste_masks_in_image(masks, corners, (40, 60))[:, 0]
    ours = pasted(masks[:, 0].numpy(), corners.numpy(), (40, 60))
    torch.testing.assert_close(torch.from_numpy(ours), theirs, atol=1e-5, rtol=0)


def test_boxes_are_suppressed_class_by_class():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(200, 2, generator=generator) * 40
    boxes = torch.cat((corners, corners + 5 + 20 * torch.rand(200, 2, generator=generator)), dim=1)
    labels, scores = torch.randint(1, 4, (200,), generator=generator), torch.rand(200, generator=generator)
    theirs = batched_nms(boxes, scores, labels, 0.4)
    assert 12 < len(theirs) < 150
    ours = suppressed(boxes.numpy(), labels.numpy(), scores.numpy(), {"nms_iou": 0.4, "detections": 100})
    assert ours.tolist() == theirs[:100].tolist()
