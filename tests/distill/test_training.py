"""Distillation in one call: what is compared, with what weight, what is left and what is refused."""

import copy
import json
import re
import warnings
import weakref

import pytest
import torch
from PIL import Image

from jdkd.data import CocoDetectionDataset, batches
from jdkd.detect import detector as of_family
from jdkd.detect import load, save
from jdkd.distill import DistillConfig, comparable, distill
from jdkd.distill.training import opened, require_seen, taught
from jdkd.errors import InputError
from jdkd.notices import Notice
from jdkd.train import DivergenceError, TrainConfig, calibrate_bn, fit
from tests.detectors import CLASSES, detector, small_spec
from tests.train.scenes import write_scenes

FEW = TrainConfig(steps=2, batch_size=2, gamma_l1=0.0)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def one_stage():
    torch.manual_seed(0)
    return of_family("fcos", "mobilenet_v3_small", CLASSES, channels=32, min_size=64)


def test_equal_widths_are_compared_channel_by_channel_and_that_is_said_in_one_line(student, teacher, scenes):
    before = state(teacher)
    line = (
        "pkd of weight 6 on the levels of stride 4, 8, 16, 32, channel by channel (16); the teacher sees images at its"
    )
    with pytest.warns(Notice, match=re.escape(line)):
        found = distill(student, teacher, scenes, FEW)
    assert found.student is student and found.training.steps == 2 and found.training.losses["loss_pkd"] > 0
    assert same(state(teacher), before) and not teacher.training


def test_what_was_looked_at_before_is_not_held_while_it_trains(student, teacher, scenes, monkeypatch):
    held = []

    def looked_at(*given):
        distiller, pairs = comparable(*given)
        held.extend(map(weakref.ref, (given[2][0][0], *(level for pair in pairs for level in pair[1:3]))))
        return distiller, pairs

    monkeypatch.setattr("jdkd.distill.training.comparable", looked_at)
    alive = []
    with pytest.warns(Notice):
        distill(
            student, teacher, scenes, FEW, progress=lambda *state: alive.append([one() is not None for one in held])
        )
    assert len(held) == 9 and not any(map(any, alive))


def test_unequal_widths_go_through_an_adapter_that_is_dropped(teacher, scenes, tmp_path):
    narrow = detector(small_spec(fpn=8)).train()
    names = [*narrow.state_dict()]
    with pytest.warns(Notice, match="through a trained 1x1 adapter, from 8 channels to 16"):
        distill(narrow, teacher, scenes, FEW, folder=tmp_path)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert [*narrow.state_dict()] == [*kept["model"]] == names, "the student alone"
    assert {tuple(weight.shape) for weight in kept["auxiliary"].values()} == {(16, 8, 1, 1)}


def test_unrelated_channels_are_matched_and_r_is_said(student, teacher, scenes):
    with pytest.warns(Notice) as notices:
        found = distill(student, teacher, scenes, FEW, DistillConfig(align="permute"))
    said = " ".join(str(notice.message) for notice in notices)
    assert "brought together by align=permute, from 16 to 16" in said
    assert "mean r of student and teacher, before and after permute: stride 4: " in said
    assert found.training.losses["loss_pkd"] > 0
    with pytest.raises(InputError, match="adapter and align='linear' are both given"):
        DistillConfig(adapter=True, align="linear")
    with pytest.raises(InputError, match=r"each of the student's 16 channels one of the teacher's, which has 8"):
        comparable(student, detector(small_spec(fpn=8)), _batch(scenes), DistillConfig(align="permute"))


def test_what_fits_adapters_leaves_the_norms_of_the_student(teacher, scenes):
    narrow = detector(small_spec(fpn=8)).train()
    for module in narrow.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
    before = state(narrow)
    with pytest.warns(Notice):
        distill(narrow, teacher, scenes, TrainConfig(steps=0, batch_size=2))
    assert same(state(narrow), before)


@pytest.mark.filterwarnings("ignore::jdkd.notices.Notice")
def test_adapters_are_fitted_to_norms_as_they_are_or_as_they_will_be_where_they_have_seen_nothing(teacher, scenes):
    probe = [*batches(scenes, batch_size=2, steps=2, seed=0)]
    fresh = detector(small_spec(fpn=8)).train()
    norms = [module for module in fresh.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
    measured, trained = copy.deepcopy(fresh), copy.deepcopy(fresh)
    calibrate_bn(measured, probe)
    for norm in (*measured.modules(), *trained.modules()):
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.num_batches_tracked += 1
    fitted = []
    for student in (fresh, measured, trained):
        with taught(student, teacher, DistillConfig(), probe) as given:
            fitted.append(next(given["auxiliary"].parameters()).clone())
    torch.testing.assert_close(fitted[0], fitted[1])
    assert (fitted[2] - fitted[1]).abs().max() > 0.01 * fitted[1].abs().max()


@pytest.mark.parametrize(
    ("loss", "two_stages", "weight"),
    [("pkd", True, 6), ("pkd", False, 10), ("pkd+logits", False, 10), ("cwd", True, 1), ("mse", False, 1)],
)
def test_the_published_weights(student, teacher, one_stage, loss, two_stages, weight):
    pair = (one_stage, teacher if two_stages else one_stage)
    assert DistillConfig(loss).weight(*pair) == DistillConfig(loss).weight(*pair[::-1]) == weight
    assert DistillConfig(loss, loss_weight=3).weight(*pair) == 3


def test_a_weight_of_nothing_is_the_training_without_a_teacher_bit_for_bit(teacher, scenes):
    taught, alone = (detector(small_spec()).train() for _ in range(2))
    distill(taught, teacher, scenes, FEW, DistillConfig(loss_weight=0))
    fit(alone, scenes, FEW, device="cpu")
    assert same(state(taught), state(alone))


def test_after_the_last_lesson_the_teacher_does_not_run(student, teacher, scenes, tmp_path):
    seen = []
    teacher.backbone.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    with pytest.warns(Notice):
        distill(
            student, teacher, scenes, TrainConfig(steps=4, batch_size=1, log_every=1, gamma_l1=0.0),
            DistillConfig(detach_after=2), folder=tmp_path,
        )  # fmt: skip
    assert seen == [False] * 3, "one comparison before, two lessons"
    with pytest.raises(InputError, match="detach_after is 2 and the training has 2 steps, all of which the teacher"):
        distill(student, teacher, scenes, FEW, DistillConfig(detach_after=2))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert (
        ["loss_pkd" in row["losses"] for row in rows] == ["parts" in row for row in rows] == [True, True, False, False]
    )


def test_an_image_of_which_either_sees_no_pixel_is_named_before_anything_is_written(student, tmp_path):
    split = write_scenes(tmp_path / "scenes", images=3).split
    content = json.loads(split.annotations.read_text())
    content["images"][2] |= {"height": 128, "width": 4}
    split.annotations.write_text(json.dumps(content))
    Image.new("RGB", (4, 128)).save(split.images / "2.png")
    thin, folder = CocoDetectionDataset(split), tmp_path / "run"
    teacher = detector(small_spec(min_size=16, max_size=24), seed=7)
    words = r"2\.png is 128x4 .*, of which the teacher \(FasterRCNN\) leaves no pixel .* max_size 24 \(1 such image"
    with pytest.raises(InputError, match=words) as caught:
        distill(student, teacher, thin, FEW, folder=folder)
    assert "raise max_size to 32 or more, let the teacher see images as the student does" in str(caught.value)
    with pytest.raises(InputError, match=r"of which the student \(FasterRCNN\) leaves no pixel"):
        distill(teacher, student, thin, FEW, folder=folder)
    assert not folder.exists()
    for unseen in (DistillConfig(own_size=False), DistillConfig(loss_weight=0)):
        require_seen(student, teacher, thin, unseen)


def test_anchors_are_not_asked_about_at_sizes_that_the_teacher_does_not_see(student, teacher, scenes):
    """Before anything is trained: the two would disagree in every batch, or not agree by accident in some."""
    sides = {"channels": 32, "min_size": 64, "max_size": 96}
    pair = [of_family("gfl", "mobilenet_v3_small", CLASSES, **sides) for _ in range(2)]
    method = DistillConfig("pkd+logits")
    words = "trained at short sides of 48, 64, and pkd.logits asks its teacher, which sees images at its own"
    with pytest.raises(InputError, match=f"{words}.*--shared-size.*, or leave the sizes out"):
        distill(*pair, scenes, TrainConfig(steps=1, batch_size=1, sizes=(48, 64)), method)
    for who, how in ((pair, DistillConfig("pkd+logits", own_size=False)), (pair, DistillConfig()), (pair, method)):
        require_seen(*who, scenes, how, None if how is method else (48, 64))
    require_seen(student, teacher, scenes, method, (48, 64))  # regions have their places at every size


def test_without_a_loss_of_features_nothing_is_said_of_their_channels(student, teacher, scenes, recwarn):
    distill(student, teacher, scenes, TrainConfig(steps=0), DistillConfig(loss_weight=0, align="permute"))
    assert not [one for one in recwarn if "mean r" in str(one.message)]


def test_the_teacher_runs_up_to_its_neck_only(student, teacher, scenes):
    teacher.rpn.register_forward_hook(lambda *_: pytest.fail("the teacher's head has run"))
    with pytest.warns(Notice):
        distill(student, teacher, scenes, FEW)


def test_neck_and_heads_are_taken_over_where_they_agree(student, teacher, scenes):
    own = state(student)
    with pytest.warns(Notice) as told:
        distill(student, teacher, scenes, TrainConfig(steps=0), DistillConfig(inherit=True))
    (said,) = [str(one.message) for one in told if "taken over from the teacher" in str(one.message)]
    assert "backbone.fpn, rpn.head, roi_heads.box_head, roi_heads.box_predictor" in said
    now, theirs = state(student), state(teacher)
    for name in now:
        taken = not name.startswith("backbone.body") and theirs[name].shape == own[name].shape
        assert torch.equal(now[name], theirs[name] if taken else own[name]), name


def test_a_pair_that_shares_nothing_cannot_inherit(one_stage, teacher, scenes):
    with pytest.raises(InputError, match=r"FCOS\) can take over nothing from its teacher \(FasterRCNN\)"):
        distill(one_stage, teacher, scenes, FEW, DistillConfig(inherit=True))


def test_other_classes_may_teach_features_and_no_logits(student, scenes):
    stranger = detector(small_spec("bottleneck", classes=("one", "two")), seed=7)
    comparable(student, stranger, _batch(scenes), DistillConfig())
    with pytest.raises(InputError, match=r"the student knows 3 classes and the teacher 2.*loss 'pkd'"):
        distill(student, stranger, scenes, FEW, DistillConfig("pkd+logits"))


def test_what_is_not_finite_is_named_with_its_level_and_the_last_good_checkpoint(student, teacher, scenes, tmp_path):
    steps = []

    def spoil(_, inputs, levels):
        steps.append(len(steps))
        if len(steps) == 4:  # the comparison before, two good steps, and this
            return levels | {"1": levels["1"] * float("nan")}

    teacher.backbone.register_forward_hook(spoil)
    config = TrainConfig(steps=5, batch_size=1, checkpoint_every=2)
    with pytest.warns(Notice), pytest.raises(DivergenceError) as caught:
        distill(student, teacher, scenes, config, folder=tmp_path)
    assert "diverged at step 3 of 5: loss_pkd, loss_pkd of stride 8 are not finite" in str(caught.value)
    assert f"last good checkpoint: step 2 in {tmp_path}" in str(caught.value)


def test_an_interrupted_distillation_ends_where_another_does(teacher, scenes, tmp_path):
    config = TrainConfig(steps=2, batch_size=1, checkpoint_every=1, ema=0.5)

    def trained(folder, teacher=teacher, method=None, **how):
        student = detector(small_spec(fpn=8)).train()
        distill(student, teacher, scenes, config, method, folder=folder, **how)
        return state(student)

    def stop(step, *_):
        if step == 1:
            raise KeyboardInterrupt

    with pytest.warns(Notice):  # once
        whole = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "halved", progress=stop)
    for other, words in (
        (
            {"method": DistillConfig(loss_weight=3)},
            r"cannot resume with other settings: loss_weight was 'auto' and is 3",
        ),
        (
            {"teacher": detector(small_spec("bottleneck"), seed=8)},
            r"other settings: teacher was .* and is .*; resume with",
        ),
    ):
        with warnings.catch_warnings(action="ignore", category=Notice), pytest.raises(InputError, match=words):
            trained(tmp_path / "halved", resume=True, **other)
    assert same(trained(tmp_path / "halved", resume=True), whole)


def test_folders_and_names_will_do(teacher, scenes, tmp_path):
    save(tmp_path / "teacher", teacher)
    (tmp_path / "student.json").write_text(small_spec().to_json())
    config, states, before = TrainConfig(steps=1, batch_size=1, seed=4), [], torch.get_rng_state()
    for _ in range(2):
        with warnings.catch_warnings(action="ignore", category=Notice):
            found = distill(tmp_path / "student.json", tmp_path / "teacher", scenes, config)
        assert torch.equal(torch.get_rng_state(), before), "the caller's generator is as it was"
        states.append(state(found.student))
        torch.manual_seed(len(states))
        before = torch.get_rng_state()
    assert same(*states), "fresh weights are of the seed"
    assert found.training.losses["loss_pkd"] > 0 and found.student.architecture.classes == CLASSES


def test_a_student_by_name_knows_the_classes_of_its_data_by_theirs(tmp_path):
    made = opened("fcos:mobilenet_v3_small", CLASSES, seed=4)
    save(tmp_path, made)
    again = load(tmp_path)
    assert made.architecture.classes == again.architecture.classes == CLASSES and same(state(made), state(again))


def test_a_student_of_other_classes_gets_new_predictors(tmp_path):
    save(tmp_path, detector(small_spec(classes=("one", "two"))))
    with pytest.warns(Notice, match="made anew for 3 classes"):
        made = opened(tmp_path, CLASSES, seed=4)
    assert made.architecture.classes == CLASSES and made.roi_heads.box_predictor.cls_score.out_features == 4


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"loss": "fgd"}, "loss must be one of pkd, mse, cwd"),
        ({"loss_weight": "much"}, "loss_weight is 'much'"),
        ({"loss_weight": float("nan")}, "loss_weight is nan"),
        ({"logits_weight": "auto"}, "logits_weight is 'auto'"),
        ({"logits_weight": 2.0}, "logits_weight is 2, and loss 'pkd' has no logits"),
        ({"levels": [8, 8]}, "give the strides of the levels"),
        ({"detach_after": -1}, "detach_after must be a whole number"),
        ({"detach_after": 1.5}, "detach_after must be a whole number"),
    ],
)
def test_settings_that_are_none_are_refused(setting, words):
    with pytest.raises(InputError, match=words):
        DistillConfig(**setting)


@pytest.mark.parametrize("loss", ["pkd", "mse", "cwd", "pkd+logits"])
def test_every_loss_trains_in_bfloat16(student, teacher, scenes, loss):
    with pytest.warns(Notice):
        found = distill(student, teacher, scenes, TrainConfig(steps=2, batch_size=1, amp="bf16"), DistillConfig(loss))
    assert all(torch.tensor([*found.training.losses.values()]).isfinite())
    assert ("loss_head_kd" in found.training.losses) == (loss == "pkd+logits")


def _batch(scenes):
    image, target = scenes[0]
    return [image / 255], [target]
