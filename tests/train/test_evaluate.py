"""COCO scores of detectors whose answers are known."""

import dataclasses
import json

import pytest
import torch
from torch import Tensor, nn

from jdkd.errors import InputError
from jdkd.train import evaluate
from tests.detectors import CLASSES, detector, small_spec
from tests.train.scenes import write_scenes

CPU = {"device": "cpu"}


class Oracle(nn.Module):
    """Answers with what it was told, image after image."""

    def __init__(self, answers: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.answers = iter(answers)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        assert all(image.dtype == torch.float32 and image.max() <= 1 for image in images)
        return [next(self.answers) for _ in images]


def truth(dataset) -> list[dict[str, Tensor]]:
    targets = [target for _, target in dataset]
    return [{"boxes": t["boxes"], "labels": t["labels"], "scores": torch.ones(len(t["labels"]))} for t in targets]


def nothing() -> dict[str, Tensor]:
    return {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}


def test_the_truth_scores_one(scenes):
    scores = evaluate(Oracle(truth(scenes)), scenes, **CPU, batch_size=5)
    assert scores.map == scores.map50 == scores.map75 == pytest.approx(1.0)
    assert len(scores.stats) == 12 == len(scores.lines.splitlines())
    assert scores.lines.splitlines()[0].endswith("= 1.000")
    json.dumps(dataclasses.asdict(scores))


def test_labels_are_mapped_to_category_ids(scenes):
    answers = truth(scenes)
    for answer in answers:
        answer["labels"] = answer["labels"] % 3 + 1
    assert evaluate(Oracle(answers), scenes, **CPU).map < 0.2


def test_finding_nothing_scores_zero(scenes):
    scores = evaluate(Oracle([nothing() for _ in range(len(scenes))]), scenes, **CPU)
    assert scores.map == scores.map50 == 0.0 and scores.stats[8] == 0.0
    assert len(scores.lines.splitlines()) == 12


def test_a_find_on_an_image_without_objects_counts_against(scenes):
    answers = truth(scenes)
    box = torch.tensor([[1.0, 1.0, 30.0, 30.0]])
    answers[-1] = {"boxes": box, "labels": torch.tensor([1]), "scores": torch.tensor([2.0])}
    assert len(scenes[len(scenes) - 1][1]["boxes"]) == 0
    assert evaluate(Oracle(answers), scenes, **CPU).map < 0.99


@pytest.mark.parametrize("finds", [True, False])
def test_without_any_object_there_is_no_score(scenes, finds):
    empty = scenes.subset([len(scenes) - 1])
    box = torch.tensor([[1.0, 1.0, 30.0, 30.0]])
    find = {"boxes": box, "labels": torch.tensor([1]), "scores": torch.tensor([1.0])}
    assert evaluate(Oracle([find if finds else nothing()]), empty, **CPU).map == -1


def test_only_the_images_of_a_subset_count(scenes):
    part = scenes.subset([2, 0])
    assert evaluate(Oracle(truth(part)), part, **CPU).map == pytest.approx(1.0)


def test_the_batch_size_does_not_matter_and_modes_are_kept(scenes):
    model = detector(small_spec()).train()
    model.backbone.eval()
    model.roi_heads.score_thresh = 0.0
    one, many = (evaluate(model, scenes, **CPU, batch_size=size) for size in (1, 12))
    assert one.stats == pytest.approx(many.stats, abs=0.02)
    assert model.training and model.roi_heads.training and not model.backbone.training


def test_prints_nothing_and_tells_how_far_it_is(scenes, capsys):
    seen = []
    progress = lambda done, total: seen.append((done, total))  # noqa: E731
    evaluate(Oracle(truth(scenes)), scenes, **CPU, batch_size=5, progress=progress)
    assert seen == [(5, 12), (10, 12), (12, 12)]
    assert capsys.readouterr().out == ""


def test_oblong_images_do_not_set_the_scales_of_a_foreign_detector(tmp_path):
    data = write_scenes(tmp_path, images=2, size=(60, 192))
    model = detector(small_spec(min_size=128, max_size=128))
    pool = model.roi_heads.box_roi_pool
    pool.scales = pool.map_levels = None  # as torchvision's own builders leave them
    evaluate(model, data, **CPU)
    assert pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def test_another_number_of_classes_is_named(scenes):
    with pytest.raises(InputError, match="knows 2 classes and the dataset has 3"):
        evaluate(detector(small_spec(classes=("cat", "dog"))), scenes, **CPU)
    plain = detector(small_spec(classes=("cat", "dog")))
    del plain.spec
    with pytest.raises(InputError, match="knows 2 classes and the dataset has 3"):
        evaluate(plain, scenes, **CPU)


def test_the_same_classes_in_another_order_are_refused(tmp_path):
    other = write_scenes(tmp_path, images=2, classes=CLASSES[::-1])
    with pytest.raises(InputError, match="order cat, dog, bird and the dataset in the order bird, dog, cat"):
        evaluate(detector(small_spec()), other, **CPU)
