"""Exported detectors of every family against the detectors."""

import json
from functools import partial

import pytest
import torch

from jdkd.detect import adopt
from jdkd.detect import detector as built
from jdkd.detect.exportable import NOTHING, exportable
from jdkd.errors import InputError
from jdkd.export.opening import OPENERS
from jdkd.export.parity import TOLERANCES, Parity, numbers, parity
from jdkd.export.preparing import batch_of
from jdkd.export.suppression import by_torchvision
from jdkd.export.writing import exported
from tests.detectors import mask_detector
from tests.export.tiny import FAMILIES, formed, made, pictures
from tests.graph.networks import pan_detector

SIZES = ((60, 90), (120, 77), (96, 128))


def agree(model, file, tolerance=TOLERANCES["fp32"]):
    """One by one, and in one batch of several sizes."""
    images = pictures(*SIZES)
    found = parity(model, file, [(image, {}) for image in images])
    assert found.complaint(tolerance) is None and found.same >= 20, found.sentence()
    together = file([image.permute(1, 2, 0).numpy() for image in images])
    assert len(together) == len(images)
    with torch.no_grad():
        eager = model([image.float() / 255 for image in images])  # padded as together, not as alone
    counted, least = Parity(), file.facts["score_threshold"]
    for ours, theirs in zip(map(numbers, eager), together, strict=True):
        counted.compare(ours, theirs, tolerance, lambda mine, its: max(its["scores"].min(), least))
    assert counted.complaint(tolerance) is None and counted.same >= 20, counted.sentence()


def headless():
    model = made("fcos")
    model.head = torch.nn.Identity()
    return model


@pytest.mark.parametrize("family", ["fcos", "maskrcnn"])
def test_a_detector_that_finds_nothing_yet_is_exported_to_count_as_many_boxes_as_it_may(family):
    onnx = pytest.importorskip("onnx")
    content = exported(made(family), "onnx", counting=True)
    kinds = {node.op_type for node in onnx.load_from_string(content).graph.node}
    assert "TopK" in kinds and "NonMaxSuppression" not in kinds
    images = [image.permute(1, 2, 0).numpy() for image in pictures(*SIZES)]
    file = OPENERS[".onnx"](content, "cpu")
    assert [len(found["scores"]) for found in file(images)] == len(images) * [file.facts["detections"]]


class Suppressed(torch.nn.Module):
    def forward(self, boxes, scores):
        return by_torchvision(boxes, scores, 0.5, 10)


@pytest.mark.filterwarnings("ignore:.create_unbacked_symint:FutureWarning")  # in torchvision
def test_an_exported_suppression_may_keep_one_box_or_none():
    boxes = torch.tensor([[[0.0, 0, 8, 8], [0, 0, 8, 9], [20, 20, 30, 30]]])
    example = boxes, torch.tensor([[[0.9, 0.8, 0.7]]])
    program = torch.export.export(Suppressed(), example, strict=False).module()
    assert program(*example).tolist() == [[0, 0, 0], [0, 0, 2]]
    assert program(boxes, torch.tensor([[[0.8, 0.9, NOTHING]]])).tolist() == [[0, 0, 1]]
    assert program(boxes, torch.full((1, 1, 3), NOTHING)).shape == (0, 3)


@pytest.mark.slow
@pytest.mark.usefixtures("when_asked")
@pytest.mark.parametrize("family", ["fcos", "fasterrcnn"])
@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_a_file_of_a_detector_that_finds_nothing_finds_nothing(family, form):
    model = made(family)
    (model if family == "fcos" else model.roi_heads).score_thresh = 0.999999
    file = OPENERS[f".{form}"](exported(model, form), "cpu")
    found = file([image.permute(1, 2, 0).numpy() for image in pictures(*SIZES)])
    assert [len(each["scores"]) for each in found] == [0, 0, 0]


OUTSIDE = ("retinanet", "outside"), ("fasterrcnn", "outside")


@pytest.mark.parametrize(("family", "nms"), [*((family, "inside") for family in FAMILIES), *OUTSIDE])
def test_the_form_of_tensors_finds_what_each_family_finds(family, nms):
    model = made(family)
    images = pictures(*SIZES)
    found = formed(model, nms=nms)([image.permute(1, 2, 0).numpy() for image in images])
    with torch.no_grad():
        eager = model([image.float() / 255 for image in images])
    assert sum(len(each["scores"]) for each in eager) >= 15
    for ours, theirs in zip(eager, found, strict=True):
        assert ours["labels"].tolist() == theirs["labels"].tolist()
        for name in ours.keys() - {"labels"}:
            mine = ours[name][:, 0] if name == "masks" else ours[name]
            torch.testing.assert_close(mine, torch.from_numpy(theirs[name]), atol=2e-3, rtol=1e-4)


WRITTEN = ("maskrcnn",)  # in every run of the tests; the others where slow ones are asked for


@pytest.mark.parametrize("family", WRITTEN)
def test_an_onnx_file_finds_it_in_batches_of_any_sizes(family):
    model = made(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    content = exported(model, "onnx", weights="0" * 64)
    agree(model, OPENERS[".onnx"](content, "cpu"))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    import onnx

    written = onnx.load_from_string(content)
    assert [(each.domain, each.version >= 17) for each in written.opset_import] == [("", True)]
    assert {node.domain for node in written.graph.node} == {""}
    told = json.loads({each.key: each.value for each in written.metadata_props}["jdkd"])
    assert told["classes"] == ["red", "blue"] and told["weights_sha256"] == "0" * 64
    assert told["architecture"] == model.architecture.id
    assert told["resize"] == {"min_size": 96, "max_size": 128, "multiple": 32}


@pytest.mark.slow
@pytest.mark.usefixtures("when_asked")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_every_family_in_every_form(family, form):
    model = made(family)
    agree(model, OPENERS[f".{form}"](exported(model, form), "cpu"))
    agree(model, OPENERS[f".{form}"](exported(model, form, half=True), "cpu"), TOLERANCES["fp16"])
    if not family.startswith("maskrcnn"):
        file = OPENERS[f".{form}"](exported(model, form, nms="outside"), "cpu")
        agree(model, file)
        scores = file.run(*batch_of([pictures((96, 128))[0].permute(1, 2, 0).numpy()], file.facts["resize"]))[2]
        of_classes = {"fasterrcnn": 30 * 2, "fasterrcnn_v2": 30 * 2, "ssd": 40 * 2, "ssdlite": 40 * 2}
        assert scores.shape == (1, of_classes.get(family, 40 * 5))  # 40 of a level, or so many regions or of all boxes


REFUSED = {
    "keypointrcnn": "its key points are read off heat maps",
    "pan": "PANDetector cannot be exported: what follows",
}
OTHERS = [
    (headless, "FCOS cannot be exported: what follows its heads"),
    (lambda: adopt(torch.nn.Conv2d(3, 3, 1), predict=lambda model, images: []), "Adopted cannot be exported"),
]


def small(family):
    return pan_detector() if family == "pan" else built(family, "resnet18", 2, channels=32)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [*((partial(small, family), said) for family, said in REFUSED.items()), *OTHERS],
)
def test_what_cannot_be_exported_is_refused_with_the_reason(make, sentence):
    with torch.device("meta"):
        model = make()
    with pytest.raises(InputError, match=sentence):
        exportable(model, by_torchvision)


def test_masks_are_made_of_what_the_suppression_keeps():
    with pytest.raises(InputError, match="its masks are made of the boxes that this keeps"):
        exportable(mask_detector(), by_torchvision, final=False)  # of the class of those without
    assert exportable(mask_detector(), by_torchvision).names == ("boxes", "labels", "scores", "masks")
