"""COCO scores of detectors whose answers are known."""

import dataclasses
import json

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import (
    fasterrcnn_mobilenet_v3_large_320_fpn,
    fcos_resnet50_fpn,
    retinanet_resnet50_fpn,
    ssdlite320_mobilenet_v3_large,
)

from jdkd.errors import InputError, ModelError
from jdkd.notices import Notice
from jdkd.train import evaluate
from jdkd.train.twelve import twelve
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


@pytest.mark.parametrize("make", [retinanet_resnet50_fpn, fcos_resnet50_fpn, ssdlite320_mobilenet_v3_large])
def test_a_detector_of_one_stage_with_other_classes_is_refused_though_it_finds_nothing(make, scenes):
    with torch.device("meta"):
        model = make(weights=None, weights_backbone=None, num_classes=91)
    with pytest.raises(InputError, match="knows 90 classes and the dataset has 3"):
        evaluate(model, scenes, **CPU)


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


def test_an_architecture_of_another_kind_says_nothing(scenes):
    model = Oracle(truth(scenes))
    model.architecture = "vit_base"  # as other libraries call what they were asked for
    assert evaluate(model, scenes, **CPU).map == pytest.approx(1)


@pytest.mark.parametrize("finds", [True, False])
def test_without_any_object_there_is_no_score(scenes, finds):
    empty = scenes.subset([len(scenes) - 1])
    box = torch.tensor([[1.0, 1.0, 30.0, 30.0]])
    find = {"boxes": box, "labels": torch.tensor([1]), "scores": torch.tensor([1.0])}
    with pytest.warns(Notice, match="none of the 1 images has a box to detect"):
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
    del plain.architecture
    with pytest.raises(InputError, match="knows 2 classes and the dataset has 3"):
        evaluate(plain, scenes, **CPU)


def test_a_detector_that_numbers_by_category_id_is_told_from_one_of_other_classes(scenes):
    model = detector(small_spec(classes=tuple(f"category {k}" for k in range(1, 12))))  # the ids are 3, 7 and 11
    del model.architecture
    with pytest.raises(InputError, match="knows 11 classes and the dataset has 3; if its labels are category ids"):
        evaluate(model, scenes, **CPU)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:RCNN always returns")
def test_a_scripted_detector_scores_what_it_was_made_from(scenes):
    how = {"weights": None, "weights_backbone": None, "num_classes": 4, "box_score_thresh": 0.0}
    model = fasterrcnn_mobilenet_v3_large_320_fpn(**how, min_size=64, max_size=96).eval()
    assert evaluate(torch.jit.script(model), scenes, **CPU).stats == evaluate(model, scenes, **CPU).stats


def test_the_same_classes_in_another_order_are_refused(tmp_path):
    other = write_scenes(tmp_path, images=2, classes=CLASSES[::-1])
    with pytest.raises(InputError, match="order cat, dog, bird and the dataset in the order bird, dog, cat"):
        evaluate(detector(small_spec()), other, **CPU)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda boxes, scores: boxes.fill_(NAN),
        lambda boxes, scores: boxes[:, 2].fill_(INF),
        lambda boxes, scores: boxes[:, 0].fill_(-INF),
        lambda boxes, scores: scores.fill_(NAN),
        lambda boxes, scores: scores.fill_(INF),
        lambda boxes, scores: boxes.copy_(boxes.flip(1)),  # ends before it begins
    ],
)
def test_what_is_not_finite_is_no_hit_and_is_counted(scenes, spoil):
    answers = truth(scenes)
    found = sum(len(answer["boxes"]) for answer in answers)
    missed = [dict(answer) for answer in answers]
    missed[0] = nothing()
    spoil(answers[0]["boxes"], answers[0]["scores"])
    lost = len(answers[0]["boxes"])
    said = rf"{lost} of the {found} detections of Oracle .* on 1 image\(s\), first on image 100: box .* left out"
    with pytest.warns(Notice, match=said):
        scores = evaluate(Oracle(answers), scenes, **CPU)
    assert scores == evaluate(Oracle(missed), scenes, **CPU)
    assert scores.map < 0.99


def test_a_detector_that_finds_nothing_finite_is_refused(scenes):
    answers = truth(scenes)
    for answer in answers:
        answer["boxes"].fill_(NAN)
    with pytest.raises(ModelError, match="nothing is left to score; look for NaN"):
        evaluate(Oracle(answers), scenes, **CPU)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_detections_of_any_float_type_score(scenes, dtype):
    answers = [
        {**answer, "boxes": answer["boxes"].to(dtype), "scores": answer["scores"].to(dtype)} for answer in truth(scenes)
    ]
    for answer in answers:
        answer["labels"] = answer["labels"].to(torch.int32)
    assert evaluate(Oracle(answers), scenes, **CPU).map == pytest.approx(1.0)


@pytest.mark.parametrize(("label", "hint"), [(0, ""), (4, ""), (91, ""), (-1, ""), (7, "category ids")])
def test_a_label_beyond_the_classes_is_named(scenes, label, hint):
    answers = truth(scenes)
    answers[1]["labels"] = torch.full_like(answers[1]["labels"], label)
    with pytest.raises(InputError, match=rf"Oracle gives a box of image 101 the label {label}.*{hint}.*labels 1 to 3"):
        evaluate(Oracle(answers), scenes, **CPU)


def without(key):
    return lambda found: {name: value for name, value in found.items() if name != key}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without("scores"), "no tensor of scores for an image, but boxes, labels"),
        (without("labels"), "no tensor of labels"),
        (lambda found: found["boxes"], "a Tensor for an image"),
        (lambda found: {**found, "boxes": found["boxes"].tolist()}, "no tensor of boxes"),
        (lambda found: {**found, "boxes": torch.zeros(2, 5)}, r"boxes \[2, 5\]"),
        (lambda found: {**found, "scores": torch.ones(9)}, r"scores \[9\]"),
        (lambda found: {**found, "scores": found["scores"][:, None]}, r"scores \[\d, 1\]"),
        (lambda found: {**found, "labels": found["labels"].float()}, "labels of torch.float32"),
    ],
)
def test_an_output_that_is_no_detection_is_described(scenes, change, says):
    with pytest.raises(InputError, match=f"Oracle returned .*{says}"):
        evaluate(Oracle([change(answer) for answer in truth(scenes)]), scenes, **CPU)


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (lambda images: {"loss": torch.zeros(())}, r"returned a dict of 1 for 4 image\(s\)"),
        (lambda images: [], r"returned a list of 0 for 4 image"),
        (lambda images: None, "returned a NoneType for 4"),
        (lambda images: nn.Conv2d(3, 4, 1)(images), r"does not run on a list of images \[3, H, W\]"),
    ],
)
def test_a_model_that_is_no_detector_is_told_so(scenes, returned, says):
    model = nn.Module()
    model.forward = returned
    with pytest.raises(InputError, match=says):
        evaluate(model, scenes, **CPU, batch_size=4)


def crowded(dataset) -> list[dict[str, Tensor]]:
    """The truth, behind 120 wrong boxes an image that score higher."""
    wrong = torch.tensor([[60.0, 60.0, 63.0, 63.0]]).repeat(120, 1)
    answers = []
    for right in truth(dataset):
        count = len(right["boxes"])
        answers.append(
            {
                "boxes": torch.cat((wrong, right["boxes"])),
                "labels": torch.cat(
                    (right["labels"][:1].repeat(120) if count else torch.ones(120).long(), right["labels"])
                ),
                "scores": torch.cat((torch.full((120,), 0.9), torch.full((count,), 0.5))),
            }
        )
    return answers


def test_more_than_100_detections_an_image_count_if_they_are_asked_for(scenes):
    dataset = scenes.subset([0])
    few, many = (evaluate(Oracle(crowded(dataset)), dataset, **CPU, max_detections=n) for n in (100, 300))
    assert few.map < many.map and 0 < many.map < 0.1 and many.map50 == many.map75 == many.map
    assert evaluate(Oracle(crowded(dataset)), dataset, **CPU) == few and few.max_detections == 100
    assert "area=   all | maxDets=300 ] = 0.0" in many.lines.splitlines()[0] and many.stats[8] == 1.0
    one = evaluate(Oracle(truth(dataset)), dataset, **CPU, max_detections=1)
    assert one.stats[6] == one.stats[7] == one.stats[8] > 0 and one.map > 0


def test_the_detector_makes_as_many_detections_as_are_scored(scenes):
    model = detector(small_spec(max_detections=7))
    model.roi_heads.score_thresh = 0.0
    made = []
    model.register_forward_hook(lambda module, args, found: made.append(max(len(each["boxes"]) for each in found)))
    assert evaluate(model, scenes, **CPU).max_detections == 7
    assert evaluate(model, scenes, **CPU, max_detections=20).max_detections == 20
    assert made == [7, 7, 20, 20] and model.roi_heads.detections_per_img == 7


@pytest.mark.parametrize("bad", [{"max_detections": 0}, {"batch_size": 0}, {"max_detections": 1.5}])
def test_numbers_that_make_no_sense_are_named(scenes, bad):
    (name,) = bad
    with pytest.raises(InputError, match=f"{name} must be a whole number of at least 1"):
        evaluate(Oracle([]), scenes, **CPU, **bad)


def test_the_twelve_are_those_of_pycocotools(scenes, capsys):
    from pycocotools.cocoeval import COCOeval

    answers = truth(scenes)
    for k, answer in enumerate(answers):
        answer["boxes"] += k % 5
        answer["labels"] = answer["labels"] if k % 3 else answer["labels"] % 3 + 1
    rows = [
        {"image_id": image, "category_id": scenes.label_to_category[label], "bbox": [x, y, X - x, Y - y], "score": 0.5}
        for image, answer in zip(scenes.image_ids, answers, strict=True)
        for (x, y, X, Y), label in zip(answer["boxes"].tolist(), answer["labels"].tolist(), strict=True)
    ]
    scoring = COCOeval(scenes.coco, scenes.coco.loadRes(rows), "bbox")
    scoring.evaluate()
    scoring.accumulate()
    capsys.readouterr()
    scoring.summarize()
    stats, lines = twelve(scoring)
    assert stats == pytest.approx(scoring.stats.tolist()) and 0.1 < stats[0] < 0.9
    assert lines == capsys.readouterr().out.rstrip("\n")


def test_an_image_of_which_no_pixel_would_be_left_is_named(tmp_path):
    data = write_scenes(tmp_path, images=2, size=(32, 4000))
    with pytest.raises(
        InputError, match=r"0\.png is 32x4000 .*max_size 96 \(2 such image\(s\)\); raise max_size to 125"
    ):
        evaluate(detector(small_spec()), data, **CPU)
    evaluate(detector(small_spec(max_size=125)), data, **CPU)


@pytest.mark.parametrize("model", [None, lambda images: images, "runs/base"])
def test_what_is_no_module_is_refused(model, scenes):
    with pytest.raises(InputError, match=r"evaluate takes a detector, a torch\.nn\.Module; got a"):
        evaluate(model, scenes, **CPU)
