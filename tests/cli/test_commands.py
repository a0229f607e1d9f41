import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from jdkd.detect import load, save
from jdkd.rewrite import describe
from tests.detectors import CLASSES, mask_detector, tiny_spec
from tests.train.scenes import write_scenes

COMMANDS = ("data", "train", "search", "eval", "latency", "export", "predict", "env", "tune")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(jdkd, command):
    answer = jdkd(command, "--help")
    assert answer.code == 0 and f"usage: jdkd {command}" in answer.out


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("predict", ("MODEL", "[IMAGES]")),
        ("show", ("[DETECTORS]",)),
        ("latency", ("BASE", "[STUDENTS]")),
        ("export", ("CKPT",)),
        ("pool eval", ("POOL",)),
        ("data check", ("[FOLDERS]",)),
    ],
)
def test_help_calls_positional_arguments_by_their_names(jdkd, command, names):
    shown = jdkd(*command.split(), "--help").out.partition("positional arguments")[2].partition("\n╰")[0]
    lines = [line.strip("│ ").split(maxsplit=1) for line in shown.splitlines()[1:] if not line.startswith("│    ")]
    assert tuple(name for name, _ in lines) == names and all(len(told) > 15 for _, told in lines)


def test_a_slip_in_a_command_is_met_with_the_one_that_is_near(jdkd):
    answer = jdkd("distil", "--teacher", "a", "--student", "b")
    assert answer.code == 2 and answer.out == "" and answer.err.count("\n") == 1
    assert all(f"{name}, " in answer.err for name in COMMANDS[:-2]) and "; give distill, if that was" in answer.err
    assert "; give one of these." in jdkd("quantise").err


def test_help_loads_nothing_heavy():
    heavy = {"torch", "torchvision", "matplotlib", "pycocotools", "sklearn"}
    script = (
        "import sys\nfrom jdkd.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        f"print(*sorted({heavy!r} & set(sys.modules)), file=sys.stderr)"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stderr.strip() == ""
    assert all(command in answer.stdout for command in COMMANDS)
    assert "Make data to try things on" in answer.stdout and "Union" not in answer.stdout


def test_runs_as_a_module():
    answer = subprocess.run([sys.executable, "-m", "jdkd", "--help"], capture_output=True, text=True, check=False)
    assert answer.returncode == 0 and "usage: jdkd" in answer.stdout


def test_train_leaves_a_detector_scores_and_a_record(trained):
    names = {entry.name for entry in trained.iterdir()}
    assert names >= {"architecture.json", "weights.safetensors", "log.jsonl", "train.json", "run.json"}
    scores = json.loads((trained / "train.json").read_text())
    assert scores["train_steps"] == 3 and 0 <= scores["map"] <= 1 and len(scores["stats"]) == 12
    record = json.loads((trained / "run.json").read_text())
    assert record["kind"] == "train" and record["finished"] and record["versions"]["torch"]
    assert record["identity"]["training"]["steps"] == 3


SHORT = "train --model none", "distill --teacher none --student none", "swap --features none --head none"


@pytest.mark.parametrize("command", [*SHORT, "pool train --base TRAINED --width 0"])
def test_images_that_are_trained_on_and_scored_on_are_said(jdkd, trained, squares, tmp_path, command):
    """Under another name and beside others; what else is wrong ends the command."""
    command = [*(trained if word == "TRAINED" else word for word in command.split()), "--out", tmp_path / "out"]
    data = shutil.copytree(squares, tmp_path / "data")
    assert "byte for byte" not in jdkd(*command, "--data", data).err
    shutil.copy(data / "train2017" / "7.png", data / "val2017" / "102.png")
    answer = jdkd(*command, "--data", data)
    assert answer.code == 2 and "1 of the 4 images" in answer.err, answer.err
    assert "instances_val2017.json are training images too, byte for byte (102.png); they are scored" in answer.err


def test_a_finished_training_can_be_resumed_and_stays_the_same(jdkd, trained, train_arguments):
    before = (trained / "weights.safetensors").read_bytes()
    answer = jdkd(*train_arguments, "--out", trained, "--resume")
    assert answer.code == 0, answer.err
    assert (trained / "weights.safetensors").read_bytes() == before


def test_a_training_outlives_whatever_its_mirror_raises(jdkd, train_arguments, tmp_path, monkeypatch):
    def full(*outcome):
        raise OSError(28, "No space left on device")

    board = SimpleNamespace(update=full, close=full)
    monkeypatch.setattr("jdkd.report.mirrors.TensorBoardMirror", lambda folder: board)
    monkeypatch.setattr("jdkd.report.tensorboard.TensorBoardMirror", lambda folder: board)
    monkeypatch.setattr("jdkd.cli.training.MIRROR_SECONDS", 0)
    answer = jdkd(*train_arguments, "--out", tmp_path / "out", "--tensorboard")
    assert answer.code == 0, answer.err
    assert answer.err.count("the run goes on, but is not mirrored: OSError: [Errno 28] No space left on device") == 1
    assert json.loads((tmp_path / "out" / "run.json").read_text())["finished"]


def test_a_batch_without_variance_is_refused_and_the_folder_is_given_back(jdkd, train_arguments, tmp_path):
    small = {"--batch-size": "1", "--min-size": "32", "--max-size": "32"}
    words = [small.get(before, word) for before, word in zip(["", *train_arguments], train_arguments, strict=False)]
    answer = jdkd(*words, "--out", tmp_path / "out")
    assert answer.code == 2 and "batch_size 1 leaves a batch norm 1 value a channel" in answer.err, answer.err
    assert not (tmp_path / "out").exists()


def test_train_takes_the_file_of_an_architecture_and_weights(jdkd, trained, squares, tmp_path):
    before = json.loads((trained / "architecture.json").read_text())
    weights = ("--weights", trained / "weights.safetensors", "--model", trained / "architecture.json")
    flags = ("--data", squares, "--steps", 1, "--batch-size", 2, "--out", tmp_path / "again")
    answer = jdkd("train", *weights, *flags)
    assert answer.code == 0, answer.err
    assert "tensors loaded" in answer.out
    assert json.loads((tmp_path / "again" / "architecture.json").read_text()) == before


def test_eval_prints_twelve_lines_a_table_of_the_classes_and_json(jdkd, trained, squares, tmp_path):
    answer = jdkd("eval", trained, "--data", squares)
    assert answer.code == 0, answer.err
    *lines, last = answer.out.strip().splitlines()
    lines, table = lines[:12], lines[12:]
    assert all("IoU=" in line for line in lines) and table[0].startswith("class")
    content = json.loads(last)
    assert len(content["stats"]) == 12
    assert [line.split()[0] for line in table[1:]] == [each["name"] for each in content["per_class"]] != []

    file = tmp_path / "scores.json"
    answer = jdkd("eval", trained, "--data", squares, "--json", file)
    assert answer.out.strip().splitlines() == [*lines, *table, str(file)]
    assert json.loads(file.read_text()) == json.loads(last)


def test_eval_and_show_know_the_data_of_a_run(jdkd, trained, squares, tmp_path):
    given, known = jdkd("eval", trained, "--data", squares), jdkd("eval", trained)
    assert known.code == 0 and known.out == given.out
    said = f"no data are given: these are the val images that {trained} was made with, in {squares / 'val2017'}"
    assert f"jdkd: {said}\n" in known.err and said not in given.err
    page = tmp_path / "seen.html"
    assert jdkd("show", trained, "--out", page).code == 0 and page.exists()
    save(tmp_path / "alone", load(trained))
    answer = jdkd("eval", tmp_path / "alone")
    assert answer.code == 2 and "--data" in answer.err and answer.err.count("\n") == 1


def test_eval_scores_masks_beside_boxes(jdkd, tmp_path):
    model, data = mask_detector(), write_scenes(tmp_path / "data", images=3).split
    model.architecture = describe(model, "tests.detectors:mask_detector", classes=CLASSES)
    save(tmp_path / "masks", model)
    answer = jdkd("eval", tmp_path / "masks", "--val-images", data.images, "--val-annotations", data.annotations)
    assert answer.code == 0, answer.err
    *lines, last = answer.out.splitlines()
    assert (lines[0], lines[13], len(lines)) == ("boxes:", "masks:", 30)
    assert lines[26].startswith("class") and "mask mAP" in lines[26]
    content = json.loads(last)
    assert (
        content["segm"].keys() == {"map", "map50", "map75", "stats", "per_class"}
        and len(content["segm"]["stats"]) == 12
    )
    assert f"= {content['segm']['map']:.3f}" in lines[14] and 0 <= content["segm"]["map"] <= 1


def test_masks_that_the_data_do_not_have_are_refused_before_anything_is_written(jdkd, squares, tmp_path):
    model = ("--model", "maskrcnn", "--backbone", "resnet18", "--fpn", 16, "--box-head", 16, "--min-size", 64)
    answer = jdkd("train", *model, "--data", squares, "--out", tmp_path / "out", "--steps", 1)
    assert answer.code == 2 and "none of its 12 boxes has a segmentation, and masks are asked for" in answer.err
    assert not (tmp_path / "out").exists()


def test_eval_scores_what_train_scored(jdkd, trained, squares):
    answer = jdkd("eval", trained, "--data", squares)
    at_training = json.loads((trained / "train.json").read_text())["stats"]
    assert json.loads(answer.out.strip().splitlines()[-1])["stats"] == pytest.approx(at_training)


def test_train_and_eval_score_oblong_images_alike(jdkd, oblong_squares, tmp_path):
    data, out = oblong_squares, tmp_path / "base"
    file = tmp_path / "tiny.json"
    file.write_text(tiny_spec(("red", "blue"), box_head=32, min_size=128, max_size=128).to_json())
    flags = ("--data", data, "--steps", 60, "--batch-size", 4, "--lr", 4e-3, "--max-detections", 150)
    answer = jdkd("train", "--model", file, *flags, "--out", out)
    assert answer.code == 0, answer.err
    answer = jdkd("eval", out, "--data", data)
    assert answer.code == 0, answer.err
    at_training, scored = json.loads((out / "train.json").read_text()), json.loads(answer.out.splitlines()[-1])
    assert scored["stats"] == pytest.approx(at_training["stats"]) and scored["map"] > 0.02
    assert scored["max_detections"] == 150 and "maxDets=150" in answer.out
    few = jdkd("eval", out, "--data", data, "--max-detections", 1)
    assert json.loads(few.out.splitlines()[-1])["max_detections"] == 1 and few.out.count("maxDets=  1") == 12


def test_weights_that_cannot_be_used_leave_nothing_behind(jdkd, squares, tmp_path):
    (tmp_path / "x.pth").write_bytes(b"not a checkpoint")
    flags = ("--model", "fasterrcnn:resnet18", "--data", squares, "--steps", 1, "--out", tmp_path / "out")
    answer = jdkd("train", *flags, "--width", 0.125, "--weights", tmp_path / "x.pth")
    assert answer.code == 2 and "x.pth cannot be read" in answer.err and "Traceback" not in answer.err
    assert not (tmp_path / "out").exists()


QUICK = ("--rounds", 3, "--seconds", 0)


def test_an_adopted_detector_is_trained_scored_and_timed(jdkd, squares, tmp_path):
    base = tmp_path / "base"
    how = ("--data", squares, "--steps", 2, "--batch-size", 2)
    answer = jdkd("train", "--model", "tests.detect.elsewhere:make", *how, "--out", base)
    assert answer.code == 0, answer.err
    assert json.loads((base / "architecture.json").read_text())["builder"] == "tests.detect.elsewhere:make"
    scored = json.loads(jdkd("eval", base, "--data", squares).out.splitlines()[-1])
    timed = jdkd("latency", base, "--images", squares / "val2017" / "101.png", *QUICK)
    assert timed.code == 0 and scored["gmacs"] == json.loads((base / "train.json").read_text())["gmacs"] > 0


def test_data_writes_a_folder_that_train_can_read(jdkd, tmp_path):
    out = tmp_path / "digits"
    sizes = ("--train", 3, "--val", 2, "--size", 64)
    assert jdkd("data", "digits", out, *sizes).code == 0
    assert {entry.name for entry in out.iterdir()} >= {"annotations", "train2017", "val2017"}
    assert jdkd("data", "digits", out, *sizes, "--resume").code == 0
    before = sorted(path.stat().st_mtime_ns for path in out.rglob("*"))
    again = jdkd("data", "digits", out, "--train", 4, "--val", 2, "--size", 64, "--resume")
    assert again.code == 2 and "Traceback" not in again.err
    assert sorted(path.stat().st_mtime_ns for path in out.rglob("*")) == before


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m jdkd env | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
