"""Detectors with a mask head train on masks and are scored by them."""

import dataclasses
import json
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch
from torch import Tensor, nn

from jdkd.errors import InputError, ModelError
from jdkd.notices import Notice
from jdkd.train import TrainConfig, evaluate, fit
from jdkd.train.findings import Findings
from tests.detectors import mask_detector
from tests.train.scenes import write_scenes
from tests.train.test_evaluate import Oracle, nothing, truth
from tests.train.toy import Toy

CPU = {"device": "cpu"}


def masked_truth(dataset) -> list[dict[str, Tensor]]:
    """The truth with its masks, as [M, 1, H, W] floats."""
    masks = [target["masks"][:, None].float() for _, target in dataset.with_masks()]
    return [{**answer, "masks": each} for answer, each in zip(truth(dataset), masks, strict=True)]


def without_segmentations(folder):
    dataset = write_scenes(folder, images=3)
    file = dataset.split.annotations
    content = json.loads(file.read_text())
    for record in content["annotations"]:
        del record["segmentation"]
    file.write_text(json.dumps(content))
    return type(dataset)(dataset.split)


def test_a_detector_with_a_mask_head_learns_masks(scenes):
    few = scenes.subset([0, 1, len(scenes) - 1])  # the last has no box
    model = mask_detector(seed=1)
    report = fit(model, few, TrainConfig(steps=60, batch_size=3, lr=5e-3, flip=0.5), **CPU)
    assert report.losses["loss_mask"] < 0.6
    scores = evaluate(model, few, **CPU)
    assert scores.segm.map > 0.1 and scores.map > 0.1 and scores.segm.segm is None
    assert scores.numbers.keys() == {"map", "map50", "map75", "stats", "per_class", "segm"}
    json.dumps([scores.numbers, dataclasses.asdict(scores)])
    assert scores.text == f"boxes:\n{scores.lines}\nmasks:\n{scores.segm.lines}\n{scores.table}"
    torch.nn.init.constant_(model.roi_heads.mask_predictor.mask_fcn_logits.bias, -100.0)
    unmasked = evaluate(model, few, **CPU)
    assert unmasked.stats == scores.stats and unmasked.segm.map == 0, "masks are scored by themselves"
    assert "box mAP  box mAP50  box mAP75  mask mAP" in scores.table


def test_resuming_with_masks_ends_where_an_uninterrupted_training_does(scenes, tmp_path):
    settings = {"batch_size": 2, "lr": 1e-3, "flip": 0.5}
    straight, resumed = mask_detector(), mask_detector()
    fit(straight, scenes, TrainConfig(steps=2, **settings), **CPU)

    def stop(step, total, losses):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(resumed, scenes, TrainConfig(steps=2, **settings), **CPU, folder=tmp_path, progress=stop)
    fit(resumed, scenes, TrainConfig(steps=2, **settings), **CPU, folder=tmp_path, resume=True)
    for ours, theirs in zip(straight.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_detector_without_a_mask_head_gets_none(scenes):
    seen = []

    def losses(images, targets, step):
        seen.extend(targets)
        return {"loss": model.weight.sum()}

    model = Toy()
    fit(model, scenes, TrainConfig(steps=1, batch_size=2), **CPU, losses=losses)
    fit(model, scenes.with_masks(), TrainConfig(steps=1, batch_size=2), **CPU, losses=losses)
    assert ["masks" in target for target in seen] == [False, False, True, True]


def test_data_without_segmentations_are_refused_before_anything_is_written(tmp_path):
    data = without_segmentations(tmp_path / "data")
    with pytest.raises(InputError, match=r"annotations\.json: none of its .* boxes has a segmentation"):
        fit(mask_detector(), data, TrainConfig(steps=1), **CPU, folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel])
def test_a_detector_of_keypoints_is_not_trained_but_its_boxes_are_scored(scenes, wrap):
    model = mask_detector().eval()
    model.roi_heads.keypoint_predictor = nn.Identity()
    with pytest.raises(InputError, match="trains on keypoints, and those of annotations are not read; train a det"):
        fit(wrap(model), scenes, TrainConfig(steps=1), **CPU)
    answers = [{**answer, "keypoints": torch.zeros(len(answer["boxes"]), 17, 3)} for answer in truth(scenes)]
    assert evaluate(Oracle(answers), scenes, **CPU).map == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bool])
def test_true_masks_score_one(scenes, dtype):
    answers = [{**answer, "masks": answer["masks"].to(dtype)} for answer in masked_truth(scenes)]
    scores = evaluate(Oracle(answers), scenes, **CPU, batch_size=5)
    assert scores.map == scores.segm.map == pytest.approx(1.0)
    assert scores == dataclasses.replace(evaluate(Oracle(truth(scenes)), scenes, **CPU), segm=scores.segm)


def test_images_may_have_ids_below_zero(tmp_path):
    dataset = write_scenes(tmp_path, images=4)
    file = dataset.split.annotations
    content = json.loads(file.read_text())
    for record, key in [(one, "id") for one in content["images"]] + [
        (one, "image_id") for one in content["annotations"]
    ]:
        record[key] -= 10**6
    file.write_text(json.dumps(content))
    dataset = type(dataset)(dataset.split)
    scores = evaluate(Oracle(masked_truth(dataset)), dataset, **CPU)
    assert max(dataset.image_ids) < 0 and scores.map == scores.segm.map == pytest.approx(1.0)


def test_masks_are_scored_as_pycocotools_does(scenes):
    from pycocotools.cocoeval import COCOeval

    answers = masked_truth(scenes)
    for k, answer in enumerate(answers):
        answer["masks"] = answer["masks"].roll(k % 4, -1) * 0.51
        answer["masks"][:, :, : k % 5 * 4] = 0.49  # no pixel
    scores = evaluate(Oracle(answers), scenes, **CPU)
    rows = []
    for image, answer in zip(scenes.image_ids, answers, strict=True):
        for mask, label in zip(answer["masks"][:, 0].numpy() > 0.5, answer["labels"].tolist(), strict=True):
            rows.append({"image_id": image, "category_id": scenes.label_to_category[label], "score": 1.0})
            rows[-1]["segmentation"] = {"size": list(mask.shape), "counts": _counts(mask)}
    with redirect_stdout(StringIO()):
        truth_of = scenes.with_masks().coco
        for row in rows:
            row["segmentation"] = truth_of.annToRLE({**row})
        scoring = COCOeval(truth_of, truth_of.loadRes(rows), "segm")
        scoring.evaluate(), scoring.accumulate(), scoring.summarize()
    assert scores.segm.stats == pytest.approx(scoring.stats.tolist()) and 0.2 < scores.segm.map < 0.95
    assert scores.map == pytest.approx(1.0)


def _counts(mask) -> list[int]:
    runs, value = [0], False
    for pixel in mask.flatten(order="F").tolist():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs


def test_finding_nothing_scores_zero(scenes):
    found = {**nothing(), "masks": torch.zeros(0, 1, 64, 64)}
    scores = evaluate(Oracle([found] * len(scenes)), scenes, **CPU)
    assert scores.map == scores.segm.map == 0.0


def test_masks_without_a_truth_are_not_scored_which_is_said(tmp_path):
    data = without_segmentations(tmp_path)
    answers = [{**answer, "masks": torch.ones(len(answer["boxes"]), 1, 64, 64)} for answer in truth(data)]
    with pytest.warns(Notice, match="no segmentation to score them against; boxes are scored"):
        scores = evaluate(Oracle(answers), data, **CPU)
    assert scores.map == pytest.approx(1.0) and scores.segm is None and scores.text == f"{scores.lines}\n{scores.table}"
    assert "segm" not in scores.numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_mask_that_is_not_finite_is_no_hit_and_is_counted(scenes, value):
    answers = masked_truth(scenes)
    answers[0]["masks"][0, 0, 3, 3] = value
    with pytest.warns(Notice, match=r"1 of the \d+ detections of Oracle have boxes, scores or masks that are not fin"):
        scores = evaluate(Oracle(answers), scenes, **CPU)
    assert scores.segm.map < 1 and scores.map < 1
    answers = [{**answer, "masks": torch.full_like(answer["masks"], value)} for answer in masked_truth(scenes)]
    with pytest.raises(ModelError, match=r"masks that are not finite.*nothing is left to score"):
        evaluate(Oracle(answers), scenes, **CPU)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda masks: masks[:, 0], r"masks \[\d, 64, 64\] where \[\d, 1, 64, 64\] is the shape"),
        (lambda masks: masks[..., :28, :28], r"masks \[\d, 1, 28, 28\] where"),
        (lambda masks: torch.cat((masks, masks)), "masks "),
        (lambda masks: masks.tolist(), "masks in a list"),
    ],
)
def test_masks_of_another_shape_are_described(scenes, change, says):
    answers = [{**answer, "masks": change(answer["masks"])} for answer in masked_truth(scenes)]
    with pytest.raises(InputError, match=f"Oracle returned {says}"):
        evaluate(Oracle(answers), scenes, **CPU)


def test_masks_of_nothing_may_be_of_any_shape():
    findings = Findings("a detector", [-1, 1])
    findings.add(7, {name: torch.zeros(0) for name in ("boxes", "labels", "scores", "masks")}, masks=True)
    assert findings.masks and findings.close() == []
