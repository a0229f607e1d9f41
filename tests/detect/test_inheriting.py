"""What a student takes over from its teacher means the same in both: what predicts classes goes by their names."""

import pytest
import torch
from torch import nn

from jdkd.detect import detector as of_family
from jdkd.detect.inheriting import take_neck_and_heads
from jdkd.errors import InputError
from tests.detectors import CLASSES, detector, outputs, small_spec

PREDICTOR = "roi_heads.box_predictor."


def pair(theirs, ours=CLASSES):
    """A student, and a teacher whose backbone it shares, so that equal heads find equal things."""
    student, teacher = (detector(small_spec(classes=names), seed) for names, seed in ((ours, 1), (theirs, 2)))
    student.backbone.body.load_state_dict(teacher.backbone.body.state_dict())
    return student, teacher


def test_classes_in_another_order_are_found_by_their_names():
    student, teacher = pair(("dog", "cat", "bird"))
    said = str(take_neck_and_heads(student, teacher))
    assert said.endswith(
        "; what predicts classes was taken by their names, as the student knows cat, dog, bird (3) and the teacher "
        "knows dog, cat, bird (3)"
    )
    (logits, deltas, *rest), (others, their_deltas, *theirs) = outputs(student), outputs(teacher)
    places = [0, 2, 1, 3]  # background, cat, dog, bird in the teacher
    assert torch.allclose(logits, others[:, places], atol=1e-5) and not torch.allclose(logits, others, atol=1e-3)
    deltas, their_deltas = (each.view(-1, 4, 4) for each in (deltas, their_deltas))  # [regions, classes, 4]
    assert torch.allclose(deltas, their_deltas[:, places], atol=1e-5)
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(rest, theirs, strict=True))


def test_of_a_teacher_of_more_classes_the_students_own_are_taken():
    student, teacher = pair(("ant", "bird", "cat", "cow", "dog"))
    assert "roi_heads.box_predictor" in str(take_neck_and_heads(student, teacher)).partition(";")[0]
    assert torch.allclose(outputs(student)[0], outputs(teacher)[0][:, [0, 3, 5, 2]], atol=1e-5)


def test_anchors_of_a_dense_head_keep_their_places():
    models = []
    for names in (("red", "blue"), ("blue", "green", "red")):
        torch.manual_seed(len(names))
        models.append(of_family("retinanet", "mobilenet_v3_small", names, channels=16, min_size=64).eval())
    student, teacher = models
    assert "taken by their names" in str(take_neck_and_heads(student, teacher))
    levels = [torch.rand(1, 16, 4, 6, generator=torch.Generator().manual_seed(3))]
    ours, theirs = (model.head.classification_head(levels) for model in models)  # [1, anchors, classes]
    assert ours.shape[2] == 3 and theirs.shape[2] == 4 and torch.allclose(ours, theirs[..., [0, 3, 1]], atol=1e-6)


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        (("dog", "cat", "cow"), "as the student knows cat, dog, bird (3) and the teacher knows dog, cat, cow (3)"),
        (None, "as the teacher does not say which it knows"),
    ],
)
def test_classes_that_are_not_the_same_are_not_taken_though_the_shapes_are(theirs, words):
    student, teacher = pair(theirs or CLASSES)
    if theirs is None:
        del teacher.architecture
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    found = take_neck_and_heads(student, teacher)
    assert str(found).endswith(
        f"its own are roi_heads.box_predictor (4 tensors); what predicts classes was not, {words}"
    )
    for name, tensor in student.state_dict().items():
        if not name.startswith("backbone.body"):
            wanted = before[name] if name.startswith(PREDICTOR) else teacher.state_dict()[name]
            assert torch.equal(tensor, wanted), name


def test_the_same_classes_go_without_a_word():
    student, teacher = pair(CLASSES)
    found = take_neck_and_heads(student, teacher)
    assert "classes" not in str(found) and not found.left
    assert all(torch.equal(tensor, teacher.state_dict()[name]) for name, tensor in student.state_dict().items())


class Foreign(nn.Module):
    """A detector whose head has a place for each class, and nothing says where."""

    def __init__(self, neck=True):
        super().__init__()
        self.backbone, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)
        if neck:
            self.neck = nn.Conv2d(4, 4, 1)


def test_of_heads_that_are_not_known_nothing_is_taken():
    student, teacher = Foreign(), Foreign()
    found = take_neck_and_heads(student, teacher)
    assert found.taken == ("neck.weight", "neck.bias")
    assert "was not, as the student and the teacher do not say which they know" in str(found)
    with pytest.raises(InputError, match="the student and the teacher do not say which they know; leave inherit out"):
        take_neck_and_heads(Foreign(neck=False), Foreign(neck=False))
