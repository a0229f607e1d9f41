"""The matching proxy 1 - r against float64 correlations of all the data at once."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from jdkd.distill import correlations, explained, pyramids
from jdkd.errors import InputError
from tests.detectors import detector, small_spec
from tests.distill.frameworks import Plain
from tests.distill.pyramids import PyramidDetector, batch

LEVELS = {"0": 4, "1": 8}


def uneven() -> list[list[torch.Tensor]]:
    """Batches whose brightness differs, so that their pooled correlation is not the mean of each one's."""
    return [
        [image + shift for image in batch(count, size, seed=shift)]
        for shift, (count, size) in enumerate([(1, 32), (3, 64)])
    ]


def test_is_one_minus_r_over_all_batches_together():
    student, teacher, batches = PyramidDetector(5, LEVELS), PyramidDetector(5, LEVELS, seed=1), uneven()
    measured = correlations(student, teacher, batches)
    assert list(measured) == [4, 8]
    for stride, name in ((4, "0"), (8, "1")):
        ours, theirs = (
            torch.cat(
                [model(images)[name].detach().double().transpose(0, 1).flatten(1) for images in batches],
                dim=1,
            )
            for model in (student, teacher)
        )
        r = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(ours, theirs, strict=True)])
        assert measured[stride] == pytest.approx((1 - r).mean().item(), abs=1e-6)
    apart = [correlations(student, teacher, [images])[4] for images in batches]
    assert abs(measured[4] - sum(apart) / 2) > 0.01, "the batches must differ for this test to mean anything"


def test_is_zero_for_itself_and_two_for_its_opposite():
    student, opposite = PyramidDetector(5, LEVELS), PyramidDetector(5, LEVELS)
    assert correlations(student, student, uneven()) == pytest.approx({4: 0, 8: 0}, abs=1e-6)
    with torch.no_grad():
        opposite.backbone.mix.mul_(-3)
    assert correlations(student, opposite, uneven()) == pytest.approx({4: 2, 8: 2}, abs=1e-6)


def test_levels_of_one_stride_count_alike():
    student, teacher = PyramidDetector(5, {"a": 4, "b": 4}), PyramidDetector(5, {"a": 4, "b": 4})
    teacher.backbone.register_forward_hook(lambda module, given, levels: levels | {"b": -levels["b"]})
    assert correlations(student, teacher, uneven()) == pytest.approx({4: (0 + 2) / 2}, abs=1e-6)


def test_explained_is_what_the_best_linear_map_of_a_students_channels_correlates_with_its_teachers():
    batches, teacher = uneven(), PyramidDetector(4, LEVELS, seed=1)
    seen, all_told, one = (
        pyramids(model, batches) for model in (teacher, PyramidDetector(5, LEVELS), PyramidDetector(1, LEVELS))
    )
    assert explained(all_told, seen) == pytest.approx(1, abs=1e-3), "three colours are in three channels or more"
    expected = []
    for name in LEVELS:
        ours, theirs = (
            torch.cat([each.pyramid[name].double().transpose(0, 1).flatten(1) for each in side], dim=1)
            for side in (one, seen)
        )
        expected += torch.corrcoef(torch.cat((ours, theirs)))[0, 1:].abs().tolist()
    assert explained(one, seen) == pytest.approx(sum(expected) / 8, abs=1e-4) and 0.1 < sum(expected) / 8 < 0.95


def test_a_channel_that_never_changes_correlates_with_nothing():
    student, dead = PyramidDetector(2, LEVELS), PyramidDetector(2, LEVELS)
    with torch.no_grad():
        dead.backbone.mix[1] = 0
    assert correlations(student, dead, uneven()) == pytest.approx({4: 0.5, 8: 0.5}, abs=1e-6)


def test_channels_and_levels_may_be_chosen():
    teacher, student = PyramidDetector(6, LEVELS), PyramidDetector(3, LEVELS)
    with torch.no_grad():
        student.backbone.mix.copy_(teacher.backbone.mix[[5, 1, 2]])
    assert correlations(student, teacher, uneven(), channels=[5, 1, 2], levels=[8]) == pytest.approx({8: 0}, abs=1e-6)
    with pytest.raises(InputError, match="has 3 channels and the teacher's 6"):
        correlations(student, teacher, uneven())


def test_detectors_are_run_in_evaluation_mode_and_left_as_they_were(student, teacher, images, targets):
    teacher.train()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    measured = correlations(student, teacher, [(images, targets)])
    assert list(measured) == [4, 8, 16, 32] and all(0 < value < 2 for value in measured.values())
    assert student.training and teacher.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert correlations(student, teacher, [(images, targets)]) == measured


def test_a_teacher_may_look_at_its_own_input_size(images):
    large, small = detector(small_spec()), detector(small_spec(min_size=32))
    assert correlations(small, large, [images]) == pytest.approx(dict.fromkeys((4, 8, 16, 32), 0), abs=1e-6)
    measured = correlations(small, large, [images], own_size=True)
    assert list(measured) == [4, 8, 16, 32]
    assert all(0.01 < distance < 1 for distance in measured.values())


def test_pyramids_of_a_teacher_serve_many_students(images):
    teacher = detector(small_spec(), seed=3).train()
    batches = [images, images[::-1]]
    seen = pyramids(teacher, batches)
    assert teacher.training
    calls = teacher.backbone.register_forward_hook(lambda *state: pytest.fail("the teacher ran again"))
    found = [correlations(detector(small_spec(min_size=size)), seen, batches) for size in (32, 64)]
    calls.remove()
    for size, distances in zip((32, 64), found, strict=True):
        student = detector(small_spec(min_size=size))
        assert distances == correlations(student, teacher, batches, own_size=True)
    with pytest.raises(InputError, match="given 2 pyramids and more batches; give one for each batch"):
        correlations(teacher, seen, [*batches, images])


def test_no_batches_are_an_error(student, teacher):
    with pytest.raises(InputError, match="given 0 batches and needs at least 1"):
        correlations(student, teacher, [])


@pytest.mark.parametrize("wrap", [AveragedModel, nn.DataParallel, nn.Sequential])
def test_models_inside_torchs_wrappers_are_measured_as_they_are(wrap):
    student, teacher, batches = PyramidDetector(5, LEVELS), PyramidDetector(5, LEVELS, seed=1), uneven()
    measured = correlations(student, teacher, batches)
    assert correlations(wrap(student), wrap(teacher), batches) == measured
    assert correlations(wrap(student), pyramids(wrap(teacher), batches), batches) == measured


@pytest.mark.parametrize(
    ("student", "teacher", "batches", "message"),
    [
        (PyramidDetector(5, LEVELS), None, uneven(), "the teacher is None; pass a detector"),
        (
            Plain(),
            PyramidDetector(4, LEVELS),
            uneven(),
            r"Plain\) does not run up to its neck on a list of .*adopt",
        ),
        (PyramidDetector(4, LEVELS), nn.Conv2d(3, 4, 1), uneven(), "teacher .* no submodule neck or backbone"),
        (PyramidDetector(5, LEVELS), PyramidDetector(5, LEVELS, seed=1), [3], "holds 3, where images are expected"),
        (PyramidDetector(5, LEVELS), PyramidDetector(5, LEVELS, seed=1), [([], [])], r"holds \[\], where images"),
        (PyramidDetector(5, LEVELS), PyramidDetector(5, LEVELS, seed=1), uneven()[0], r"a tensor \[3, 32, 32\]"),
    ],
)
def test_what_cannot_be_measured_is_named(student, teacher, batches, message):
    with pytest.raises(InputError, match=message):
        correlations(student, teacher, batches)
