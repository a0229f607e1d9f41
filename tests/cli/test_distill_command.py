"""`jdkd distill`: pairs by folder, name, file and preset; what it writes, carries on and refuses."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from jdkd.cli.detectors import DetectorFlags
from jdkd.cli.distill import Distill, _say_if_blind
from jdkd.cli.flags import TrainingFlags
from jdkd.detect import load, open_model
from jdkd.distill import DistillConfig, distill
from jdkd.errors import InputError
from jdkd.notices import Notice
from jdkd.presets import preset
from jdkd.train import TrainConfig
from tests.detectors import detector, small_spec
from tests.train.scenes import write_scenes

SHORT = ("--steps", 2, "--batch-size", 2)


@pytest.fixture(scope="session")
def student_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("student") / "student.json"
    file.write_text(small_spec(classes=("red", "blue")).to_json())
    return file


@pytest.fixture
def pair(trained, student_file, squares):
    """A trained teacher and a student of the same width from a file, on the squares."""
    return ("distill", "--teacher", trained, "--student", student_file, "--data", squares)


def test_help_has_an_example(jdkd):
    answer = jdkd("distill", "--help")
    assert (
        answer.code == 0 and "Example: jdkd distill --teacher runs/teacher --student retinanet:resnet18" in answer.out
    )


def test_leaves_the_student_alone_its_scores_and_a_record(jdkd, pair, trained, tmp_path):
    out = tmp_path / "out"
    answer = jdkd(*pair, *SHORT, "--out", out, "--inherit", "--ema", 0.9)
    assert answer.code == 0, answer.err
    assert "pkd of weight 6 on the levels of stride 4, 8, 16, 32, channel by channel (16)" in answer.err
    assert "taken over from the teacher: backbone.fpn" in answer.err and "images/s" in answer.err
    assert {"architecture.json", "weights.safetensors", "distill.json", "log.jsonl"} <= {f.name for f in out.iterdir()}
    assert [*load(out).state_dict()] == [*torch.load(out / "checkpoint.pt", weights_only=True)["model"]]
    alone = detector(small_spec(classes=("red", "blue")))  # torchvision's own class
    alone.load_state_dict(load_file(out / "weights.safetensors"), strict=True)
    summary, record = (json.loads((out / f"{name}.json").read_text()) for name in ("distill", "run"))
    assert summary["method"]["loss"] == "pkd" and summary["losses"]["loss_pkd"] > 0 and summary["config"]["ema"] == 0.9
    assert record["kind"] == "distill" and record["finished"] and len(record["identity"]["teacher"]["weights"]) == 64
    before = (out / "weights.safetensors").read_bytes()
    again = jdkd(*pair, *SHORT, "--out", out, "--inherit", "--ema", 0.9, "--resume")
    assert again.code == 0 and (out / "weights.safetensors").read_bytes() == before
    other = jdkd(*pair, *SHORT, "--out", out, "--ema", 0.9, "--resume")
    assert other.code == 2 and "method.inherit was true and is false" in other.err


def test_a_preset_is_its_recipe_and_flags_go_before_it(jdkd, pair, tmp_path):
    published = ("--preset", "fasterrcnn_r101_fasterrcnn_r50", "--min-size", 64, "--max-size", 64)
    answer = jdkd(*pair[:1], *published, *pair[1:], *SHORT, "--lr", 1e-3, "--out", tmp_path / "out")
    assert answer.code == 0, answer.err
    assert "published mAP on COCO: teacher 39.8, student 38.4, distilled 40.3 (mmrazor" in answer.out
    identity = json.loads((tmp_path / "out" / "run.json").read_text())["identity"]
    taken = {name: identity["training"][name] for name in ("optimizer", "lr", "weight_decay", "batch_size", "steps")}
    assert taken == {"optimizer": "sgd", "lr": 1e-3, "weight_decay": 1e-4, "batch_size": 2, "steps": 2}
    assert identity["training"]["milestones"] == pytest.approx([8 / 12, 11 / 12])
    assert identity["method"]["loss_weight"] == 6 and identity["method"]["levels"] == [4, 8, 16, 32]


def test_the_images_of_a_published_step_are_divided_among_processes_and_batches(tmp_path):
    run, chosen = Distill(tmp_path, training=TrainingFlags(accumulate=4)), preset("gfl_r101_gfl_r50")
    with warnings.catch_warnings(action="error"):
        assert [run._recipe(chosen, processes).batch_size for processes in (1, 2, 4)] == [4, 2, 1]
    with pytest.warns(Notice, match="a step has 12 images, 1 in each of 12 batches, and the published one 16, which"):
        assert run._recipe(chosen, 3).batch_size == 1


def test_a_teacher_without_weights_is_trained_first_and_a_run_that_was_interrupted_is_carried_on(
    jdkd, student_file, squares, tmp_path, monkeypatch
):
    run = ("distill", "--teacher", student_file, "--student", student_file, "--data", squares, *SHORT)
    run = (*run, "--teacher-steps", 1, "--out", tmp_path / "out")
    monkeypatch.setattr("jdkd.distill.distill", _interrupt)
    answer = jdkd(*run)
    assert (
        answer.code == 2 and "interrupted" in answer.err and "--resume" in answer.err and "Traceback" not in answer.err
    )
    assert f"{student_file} has no weights yet and is trained first, for 1 steps" in answer.err
    monkeypatch.undo()
    monkeypatch.setattr("jdkd.notices._said", set())  # as in another process
    taught = (tmp_path / "out" / "teacher" / "weights.safetensors").read_bytes()
    answer = jdkd(*run, "--resume")
    assert answer.code == 0 and "channel by channel (16)" in answer.err, answer.err
    assert "is trained first" not in answer.err
    assert (tmp_path / "out" / "teacher" / "weights.safetensors").read_bytes() == taught
    assert load(tmp_path / "out" / "teacher").architecture.classes == ("red", "blue")


def test_a_teacher_that_its_first_step_refuses_leaves_nothing(jdkd, tiny_file, squares, tmp_path):
    small = ("--min-size", 32, "--max-size", 32, "--batch-size", 1)  # one position at stride 32
    run = ("distill", "--teacher", tiny_file, "--student", tiny_file, "--data", squares, "--steps", 1, *small)
    answer = jdkd(*run, "--out", tmp_path / "out")
    assert answer.code == 2 and "leaves a batch norm 1 value a channel" in answer.err, answer.err
    assert "is trained first" in answer.err and not (tmp_path / "out").exists()


def _interrupt(*arguments, **options):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "--teacher and --student not given"),
        (("--teacher", "T"), "--student not given; give both, or --preset"),
        (("--teacher", "nowhere", "--student", "S"), "'nowhere' is no folder with an architecture.json"),
        (("--teacher", "no/where", "--student", "S"), "no/where does not exist; give the folder of a detector"),
        (("--teacher", "T", "--student", "fcos:resnet19"), "backbone 'resnet19' is none of"),
        (("--teacher", "T", "--student", "fcos:resnet18", "--backbone", "resnet18"), "leave backbone 'resnet18' out"),
        (("--teacher", "T", "--student", "no.json"), "no.json"),
        (
            ("--teacher", "T", "--student", "S", "--backbone", "resnet18"),
            "is a file, whose detector has its own backbone",
        ),
        (("--teacher", "T", "--student", "S", "--teacher-weights", "DEFAULT"), "is a folder, which has weights"),
        (
            ("--teacher", "T", "--student", "S", "--loss-weight", "much"),
            "--loss-weight is 'much'; give a number, or auto",
        ),
        (("--teacher", "T", "--student", "S", "--loss-weight=-1"), "loss_weight is -1"),
        (("--teacher", "T", "--student", "S", "--levels", "fine"), "--levels is 'fine'; give strides such as 8,16,32"),
        (("--teacher", "T", "--student", "S", "--levels", "3"), "levels asks for [3]"),
        (("--teacher", "T", "--student", "S", "--narrow", "0.5"), "--narrow 0.5 is of a --preset"),
        (("--preset", "yolo"), "preset 'yolo' is none of fasterrcnn_r101"),
        (("--preset", "fcos_x101_retinanet_r50", "--narrow", "2"), "--narrow is 2, a share of the channels"),
        (
            ("--teacher", "T", "--student", "S", "--steps", "1", "--schedule", "1x"),
            "--steps 1 and --schedule 1x are both",
        ),
        (("--teacher", "T", "--student", "S", "--teacher-steps", "0"), "--teacher-steps is 0"),
        (
            ("--teacher", "T", "--student", "S", "--teacher-steps", "9"),
            "--teacher-steps 9 trains a teacher that has no",
        ),
        (("--teacher", "T", "--student", "S", "--tau", "2"), "'pearson', which takes no tau"),
        (("--teacher", "T", "--student", "S", "--ema", "2"), "ema is a fraction"),
        (("--teacher", "T", "--student", "S", "--detach-after=-1"), "detach_after must be a whole number"),
        (("--teacher", "T", "--student", "S", "--detach-after", "1000"), "detach_after is 1000 and the training has"),
        (("--teacher", "T", "--student", "S", "--detach-epoch", "9999"), "training has 1000 steps, all of which the"),
        (("--teacher", "T", "--student", "S", "--detach-epoch", "0"), "--detach-epoch is 0"),
        (
            ("--teacher", "T", "--student", "S", "--detach-epoch", "1", "--detach-after", "1"),
            "--detach-epoch 1 and --detach-after 1 are both given",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_touched(jdkd, trained, student_file, squares, tmp_path, flags, words):
    flags = [{"T": trained, "S": student_file}.get(flag, flag) for flag in flags]
    answer = jdkd("distill", *flags, "--data", squares, "--out", tmp_path / "out")
    assert answer.code == 2 and words in answer.err and "Traceback" not in answer.err, answer.err
    assert not (tmp_path / "out").exists()


def test_every_flag_of_the_method_reaches_it(tmp_path):
    given = {"loss": "cwd", "tau": 2.0, "align": "linear", "inherit": True, "detach_after": 5}
    asked = Distill(tmp_path, loss_weight="3", levels="8,16", shared_size=True, **given)._method(None)
    assert asked == DistillConfig(loss_weight=3.0, levels=[8, 16], own_size=False, **given)
    given = {"loss": "pkd+logits", "logits_weight": 0.5, "adapter": True}
    chosen = preset("gfl_r101_gfl_r50")
    assert Distill(tmp_path, **given)._method(chosen) == DistillConfig(loss_weight=6, levels=chosen.levels, **given)
    every = Distill(tmp_path, levels="by-stride", loss="mse")._method(chosen)
    assert every == DistillConfig("mse"), "the published weight is PKD's"


@pytest.mark.parametrize(("batch", "accumulate", "processes", "step"), [(8, 1, 1, 25), (2, 2, 2, 25), (16, 1, 1, 13)])
def test_a_teacher_leaves_after_an_epoch(tmp_path, batch, accumulate, processes, step):
    config = TrainConfig(steps=30, batch_size=batch, accumulate=accumulate)
    run = Distill(tmp_path, detach_epoch=2)
    assert run._until(DistillConfig(), 100, config, processes).detach_after == step
    with pytest.raises(InputError, match="detach_after is 200 and the training has 30 steps"):
        run._until(DistillConfig(), 100, TrainConfig(steps=30, batch_size=1), 1)


def test_events_are_written_while_it_trains(jdkd, pair, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    answer = jdkd(*pair, "--steps", 1, "--batch-size", 1, "--out", tmp_path / "out", "--tensorboard")
    assert answer.code == 0, answer.err
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard" / "training")).Reload()
    (row,) = map(json.loads, (tmp_path / "out" / "log.jsonl").read_text().splitlines())
    (loss,) = events.Scalars("losses/loss_pkd")
    assert loss.step == 1 and loss.value == pytest.approx(row["losses"]["loss_pkd"])


@pytest.mark.parametrize(("first", "asked"), [(True, ["meta", "meta"]), (False, [])])
def test_a_teacher_is_looked_at_once_and_where_it_is_to_teach(monkeypatch, first, asked):
    """At a published size, on a CPU beside a GPU, and in every process, it takes long."""
    seen = []
    monkeypatch.setattr("jdkd.data.batches", lambda data, *, device, **how: device)
    monkeypatch.setattr("jdkd.distill.recall.say_if_blind", lambda *given: seen.extend(given))
    monkeypatch.setattr("jdkd.train.distributed.is_first", lambda: first)
    _say_if_blind(torch.nn.Linear(1, 1), SimpleNamespace(train=None), TrainConfig(steps=1), "meta")
    assert [each if isinstance(each, str) else each.weight.device.type for each in seen] == asked


def test_a_teacher_that_is_trained_first_is_whole_where_the_student_is_narrowed(tmp_path):
    flags = DetectorFlags(width=0.5, min_size=64)
    run = Distill(tmp_path, teacher="fcos:mobilenet_v3_small", student="fcos:mobilenet_v3_small", detector=flags)
    teacher, is_fresh = run._teacher(run.teacher, run._detector(None), ("red", "blue"), TrainConfig(steps=1))
    whole = open_model(run.teacher, classes=2, min_size=64)
    assert is_fresh and teacher.architecture.shapes == whole.architecture.shapes
    assert teacher.transform.min_size == whole.transform.min_size and [*teacher.state_dict()] == [*whole.state_dict()]
    assert sum(map(torch.numel, teacher.parameters())) == sum(map(torch.numel, whole.parameters()))


@pytest.mark.slow
@pytest.mark.usefixtures("when_asked")
def test_the_first_step_of_a_published_pair_at_its_published_size(tmp_path):
    chosen = preset("maskrcnn_swin_retinanet_r50")
    scenes = write_scenes(tmp_path / "scenes", images=2, size=(800, 1333))
    sizes = {"classes": 3, "min_size": chosen.min_size, "max_size": chosen.max_size}
    student, teacher = (open_model(source, **sizes) for source in (chosen.student, chosen.teacher))
    seen = []
    for model in (student, teacher):
        model.backbone.register_forward_hook(lambda _, inputs, __: seen.append(tuple(inputs[0].shape[-2:])))
    method = DistillConfig(loss_weight=chosen.loss_weight, levels=chosen.levels)
    with pytest.warns(Notice, match="levels of stride 8, 16, 32, channel by channel"):
        found = distill(student.train(), teacher, scenes, TrainConfig(steps=1, batch_size=1), method)
    assert {*seen} == {(800, 1344)} and 0 < found.training.losses["loss_pkd"] < 2 * 6 * 3
