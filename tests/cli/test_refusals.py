import errno
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from jdkd.cli import main
from jdkd.detect import load, save
from jdkd.run_folder import RunFolder


def _tree(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _refused(answer, *words):
    """Exit code 2 and one sentence on stderr that has all the words."""
    assert answer.code == 2, answer.err
    told = [line for line in answer.err.splitlines() if line.startswith("jdkd: ")]
    assert len(told) == 1 and "Traceback" not in answer.err
    for word in words:
        assert str(word) in told[0]


def test_a_folder_that_holds_another_run(jdkd, trained, train_arguments):
    before = _tree(trained)
    _refused(jdkd(*train_arguments, "--out", trained), trained, "already holds a run", "--resume")
    assert _tree(trained) == before


@pytest.fixture
def unreadable(tmp_path):
    """Data in the COCO layout that nobody can read."""
    for part in ("train2017", "val2017", "annotations"):
        (tmp_path / part).mkdir()
    for part in ("train", "val"):
        (tmp_path / "annotations" / f"instances_{part}2017.json").write_text("no JSON")
    return tmp_path


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("train", "--model", "none", "--lr", -1), "lr must be a number of at least 0"),
        (("train", "--model", "none", "--schedule", "1x", "--steps", 3), "--steps 3 and --schedule 1x are both given"),
        (("distill", "--teacher", "none", "--student", "none", "--flip", 2), "flip is a fraction"),
        (("swap", "--features", "none", "--head", "none", "--batch-size", 0), "batch_size must be"),
        (("pool", "train", "--base", "none", "--phases", "none"), "none cannot be read"),
        (("search", "--base", "none", "--teachers", "none"), "none is no detector"),
        (("search", "--base", "none", "--teacher-pool", "none"), "none holds no finished teacher pool"),
    ],
)
def test_what_no_data_are_needed_to_refuse_is_refused_before_they_are_read(
    jdkd, unreadable, tmp_path, monkeypatch, command, says
):
    monkeypatch.chdir(tmp_path)
    _refused(jdkd(*command, "--data", unreadable, "--out", "out"), says)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("eval", "--batch-size", 0), "--batch-size must be a whole number of at least 1"),
        (("eval", "--max-detections", -1), "--max-detections must be a whole number of at least 1"),
        (("show", "--out", "seen.html", "--teacher", "none"), "none is no folder of a detector"),
    ],
)
def test_what_looks_at_a_detector_is_refused_before_data_are_read(
    jdkd, trained, unreadable, monkeypatch, command, says
):
    monkeypatch.chdir(unreadable)
    _refused(jdkd(command[0], trained, *command[1:], "--data", unreadable), says)


@pytest.mark.parametrize("command", ["train", "distill", "swap", "pool train", "search"])
def test_a_folder_that_is_taken_is_refused_before_anything_is_read(jdkd, unreadable, tmp_path, command):
    """There is no detector of these names, and the annotations cannot be read."""
    out, none, kind = tmp_path / "out", tmp_path / "none", "search" if command == "train" else "train"
    detectors = {"train": "--model", "distill": "--teacher --student", "swap": "--features --head"}
    flags = [word for flag in detectors.get(command, "--base").split() for word in (flag, none)]
    command = [*command.split(), *flags, "--data", unreadable, "--out", out]
    RunFolder(out).begin(kind, {})
    before = _tree(out)
    _refused(jdkd(*command), out, f"already holds a run (unfinished `jdkd {kind}`")
    _refused(jdkd(*command, "--resume"), out, f"holds a `jdkd {kind}` and cannot be resumed")
    assert _tree(out) == before
    (out / "run.json").rename(out / "thesis.tex")
    _refused(jdkd(*command), "holds thesis.tex but no run.json")


def test_resuming_with_other_settings_names_them_before_a_detector_is_made(jdkd, trained, train_arguments, monkeypatch):
    monkeypatch.delattr("jdkd.cli.detectors.DetectorFlags.built")
    before = _tree(trained)
    answer = jdkd(*train_arguments, "--out", trained, "--lr", "0.5", "--seed", "7", "--resume")
    _refused(answer, "training.lr was 0.002 and is 0.5", "training.seed was 0 and is 7")
    assert _tree(trained) == before


def test_a_folder_that_is_no_run(jdkd, train_arguments, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    _refused(jdkd(*train_arguments, "--out", tmp_path), "thesis.tex", "run.json")
    _refused(jdkd(*train_arguments, "--out", tmp_path / "thesis.tex"), "is a file")
    assert {entry.name for entry in tmp_path.iterdir()} == {"thesis.tex"}


OBSTACLES = {
    "under a file": ("file/runs/out", "file is a file"),
    "a link to nowhere": ("link", "link is a link to nowhere, which does not exist"),
    "below a link to nowhere": ("link/out", "link is a link to nowhere, which does not exist"),
    "a name too long": ("x" * 300, "File name too long"),
    "a path too long": ("/".join(["y" * 200] * 30), "File name too long"),
    "in /proc": ("/proc/out", "/proc/out does not exist and cannot be made"),
    "no name a file can have": ("a\0b", "null"),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
@pytest.mark.parametrize("command", ["train", "search", "data", "eval", "latency"])
def test_where_nothing_can_be_written_is_said_before_any_work(
    jdkd, trained, squares, train_arguments, tmp_path, monkeypatch, command, obstacle
):
    def worked(*arguments, **options):
        raise AssertionError("it worked before it looked where to write")

    for work in ("jdkd.train.fit", "jdkd.train.evaluate", "jdkd.latency.measure_grid", "jdkd.data.digits.scene"):
        monkeypatch.setattr(work, worked)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("years of work")
    (tmp_path / "link").symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    name, words = OBSTACLES[obstacle]
    answer = jdkd(
        *{
            "train": (*train_arguments, "--out", name),
            "search": ("search", "--base", trained, "--data", squares, "--out", name, "--steps", 120),
            "data": ("data", "digits", name, "--train", 1, "--val", 1),
            "eval": ("eval", trained, "--data", squares, "--json", name),
            "latency": ("latency", trained, "--data", squares, "--out", name, "--seconds", 0, "--rounds", 1),
        }[command]
    )
    _refused(answer, words)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["train", "pool"])
def test_an_image_too_long_to_be_scored_on_is_named_before_the_training(
    jdkd, train_arguments, trained, squares, tmp_path, command
):
    data = tmp_path / "data"
    shutil.copytree(squares, data)
    file = data / "annotations" / "instances_val2017.json"
    content = json.loads(file.read_text())
    content["images"].append({"id": 999, "file_name": "thin.png", "width": 900, "height": 1})
    file.write_text(json.dumps(content))
    Image.new("RGB", (900, 1)).save(data / "val2017" / "thin.png")
    arguments = [data if word == str(squares) else word for word in train_arguments]
    if command == "pool":
        arguments = ["pool", "train", "--base", trained, "--data", data, "--steps", 12, "--batch-size", 2]
    _refused(jdkd(*arguments, "--out", tmp_path / "out"), "thin.png is 1x900", "leaves no pixel on the short side")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["eval", "latency", "inspect"])
def test_a_result_is_not_written_over_what_is_no_such_result(jdkd, trained, squares, tmp_path, command):
    theirs = shutil.copy(squares / "annotations" / "instances_val2017.json", tmp_path / "instances.json")
    before = theirs.read_bytes()
    flags = {"latency": ("--out",)}.get(command, ("--json",))
    data = () if command == "inspect" else ("--data", squares)
    _refused(jdkd(command, trained, *data, *flags, theirs), flags[0], theirs, "holds something else")
    assert theirs.read_bytes() == before


def test_a_result_is_written_over_its_like_and_over_nothing(jdkd, trained, squares, tmp_path):
    file = tmp_path / "scores.json"
    file.touch()
    for _ in range(2):
        assert jdkd("eval", trained, "--data", squares, "--json", file).code == 0
    assert "map50" in file.read_text()


@pytest.mark.parametrize("command", ["train", "search"])
def test_resuming_a_run_needs_a_name_that_can_be(jdkd, train_arguments, trained, squares, command):
    arguments = (
        train_arguments if command == "train" else ("search", "--base", trained, "--data", squares, "--steps", 120)
    )
    _refused(jdkd(*arguments, "--out", "x" * 300, "--resume"), "File name too long")


def test_a_folder_of_another_command(jdkd, trained, squares):
    answer = jdkd("search", "--base", trained, "--data", squares, "--out", trained, "--steps", 120, "--resume")
    _refused(answer, "jdkd train", "jdkd search")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--device", "cuda:63"), ("cuda:63", "CUDA devices")),
        (("--device", "gpu"), ("--device", "'gpu'")),
        (("--data", "nowhere"), ("--data nowhere", "COCO layout")),
        (("--model", "yolo"), ("'yolo'", "fasterrcnn")),
        (("--model", "missing.json"), ("missing.json", "cannot be read")),
        (("--width", "0"), ("width", "0")),
        (("--steps", "-1"), ("steps", "-1")),
        (("--weights", "none.pth"), ("none.pth", "does not exist")),
        (("--optimizer", "adamw", "--flip", "2"), ("flip", "2")),
    ],
)
def test_bad_flags_leave_no_folder(jdkd, train_arguments, tmp_path, change, words):
    arguments = list(train_arguments)
    for flag, value in zip(change[::2], change[1::2], strict=True):
        if flag in arguments:
            arguments[arguments.index(flag) + 1] = value
        else:
            arguments += [flag, value]
    _refused(jdkd(*arguments, "--out", tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


def test_no_data_at_all(jdkd, trained, tmp_path):
    save(tmp_path / "alone", load(trained))  # without the record of a run, which says where its data are
    _refused(jdkd("eval", tmp_path / "alone"), "--data", "--val-images")


def test_an_unknown_flag_is_refused_by_name(jdkd, trained):
    answer = jdkd("eval", trained, "--dataa", "x")
    assert answer.code == 2 and "--dataa" in answer.err and "Traceback" not in answer.err


def test_an_architecture_that_is_not_utf8(jdkd, trained, squares, tmp_path):
    wrong = tmp_path / "wrong"
    shutil.copytree(trained, wrong)
    (wrong / "architecture.json").write_bytes("{}".encode("utf-16"))
    _refused(jdkd("eval", wrong, "--data", squares), wrong / "architecture.json", "not UTF-8", "byte 0")
    arguments = ("train", "--model", wrong / "architecture.json", "--data", squares, "--out", tmp_path / "out")
    _refused(jdkd(*arguments), wrong / "architecture.json", "not UTF-8")


def test_a_record_that_is_not_utf8_or_of_another_version(jdkd, trained, train_arguments, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    record = json.loads((out / "run.json").read_text())
    del record["format"]
    (out / "run.json").write_text(json.dumps(record))
    _refused(jdkd(*train_arguments, "--out", out, "--resume"), "another version of jdkd", "format 1")
    (out / "run.json").write_bytes(b"\xff\xfe")
    _refused(jdkd(*train_arguments, "--out", out, "--resume"), out / "run.json", "not UTF-8")


def test_a_run_is_resumed_where_data_weights_and_itself_have_moved(jdkd, trained, train_arguments, squares, tmp_path):
    weights, moved, data, out = (
        tmp_path / "a.safetensors",
        tmp_path / "b.safetensors",
        tmp_path / "data",
        tmp_path / "o",
    )
    shutil.copy(trained / "weights.safetensors", weights)
    assert jdkd(*train_arguments, "--out", out, "--weights", weights).code == 0
    weights.rename(moved)
    shutil.copytree(squares, data)
    out = out.rename(tmp_path / "p")
    arguments = list(train_arguments)
    arguments[arguments.index("--data") + 1] = str(data)
    answer = jdkd(*arguments, "--out", out, "--weights", moved, "--resume")
    assert answer.code == 0, answer.err
    assert json.loads((out / "run.json").read_text())["where"]["data"]["val_images"] == str(data / "val2017")
    change = json.loads((data / "annotations" / "instances_val2017.json").read_text())
    change["annotations"][0]["bbox"][0] += 1
    (data / "annotations" / "instances_val2017.json").write_text(json.dumps(change))
    _refused(jdkd(*arguments, "--out", out, "--weights", moved, "--resume"), "data.val was", "data.val was")
    other = {name: tensor + 1 for name, tensor in load_file(moved).items()}
    save_file(other, file := tmp_path / "other.safetensors")
    _refused(jdkd(*train_arguments, "--out", out, "--weights", file, "--resume"), "weights was")


def test_a_base_without_an_architecture_or_with_weights_that_do_not_fit(jdkd, trained, squares, tmp_path):
    out = ("--data", squares, "--out", tmp_path / "out")
    empty, wrong = tmp_path / "empty", tmp_path / "wrong"
    empty.mkdir()
    shutil.copytree(trained, wrong)
    known = json.loads((wrong / "architecture.json").read_text())
    known["arguments"]["box_head"] = 24
    (wrong / "architecture.json").write_text(json.dumps(known))
    _refused(jdkd("search", "--base", empty, *out), empty, "architecture.json")
    _refused(jdkd("search", "--base", wrong, *out), "weights.safetensors", "16", "24")
    assert not (tmp_path / "out").exists()


def test_a_search_refuses_an_impossible_target_or_budget(jdkd, trained, squares, tmp_path):
    out = ("search", "--base", trained, "--data", squares, "--out", tmp_path / "out")
    _refused(jdkd(*out, "--target-latency", "1.5"), "targets", "1.5")
    _refused(jdkd(*out, "--steps", "2"), "the budget is 2 steps")
    assert not (tmp_path / "out").exists()


def _damaged(squares, tmp_path, name, change):
    folder = tmp_path / "damaged"
    shutil.copytree(squares, folder)
    file = folder / "annotations" / f"instances_{name}2017.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda content: content["annotations"][0].update(image_id=999), "999"),
        (lambda content: content["annotations"][0].update(category_id=77), "77"),
        (lambda content: content["annotations"][0].update(bbox=[5, 5, 10]), "[5, 5, 10]"),
        (lambda content: content["images"].clear(), "image"),
        (lambda content: content["images"][0].update(file_name="gone.png"), "gone.png"),
    ],
)
def test_damaged_annotations(jdkd, train_arguments, squares, tmp_path, change, word):
    arguments = [*train_arguments]
    arguments[arguments.index("--data") + 1] = str(_damaged(squares, tmp_path, "train", change))
    _refused(jdkd(*arguments, "--out", tmp_path / "out"), word)
    assert not (tmp_path / "out").exists()


def test_annotations_that_are_not_json(jdkd, trained, squares, tmp_path):
    (tmp_path / "bad.json").write_text("{]")
    flags = ("--val-images", squares / "val2017", "--val-annotations", tmp_path / "bad.json")
    _refused(jdkd("eval", trained, *flags), "bad.json", "JSON")


def test_a_truncated_image(jdkd, trained, squares, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(squares, folder)
    image = folder / "val2017" / "102.png"
    image.write_bytes(image.read_bytes()[:60])
    _refused(jdkd("eval", trained, "--data", folder), "102.png")
    _refused(jdkd("latency", trained, "--images", image), "102.png")
    _refused(jdkd("latency", trained, "--count", 0), "--count is 0")


def test_a_full_disk_names_the_file(jdkd, train_arguments, tmp_path, monkeypatch):
    def full(folder, model):
        raise OSError(errno.ENOSPC, "No space left on device", f"{folder}/weights.safetensors")

    monkeypatch.setattr("jdkd.detect.save", full)
    _refused(jdkd(*train_arguments, "--out", tmp_path / "out"), "weights.safetensors", "disk is full", "--resume")
    monkeypatch.undo()
    assert main([*train_arguments, "--out", str(tmp_path / "out"), "--resume"]) == 0
    assert (tmp_path / "out" / "weights.safetensors").is_file()


@pytest.mark.parametrize("package", ["pycocotools.coco", "faster_coco_eval"])
def test_a_missing_package_is_named_with_the_extra(jdkd, squares, trained, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    _refused(jdkd("eval", trained, "--data", squares), package, "pip install 'jdkd[detect]'")


def test_our_own_mistakes_keep_their_traceback(monkeypatch, trained, squares):
    def broken(*arguments, **options):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("jdkd.train.evaluate", broken)
    with pytest.raises(ZeroDivisionError):
        main(["eval", str(trained), "--data", str(squares)])


def test_ctrl_c_keeps_the_training_and_says_how_to_carry_on(train_arguments, tmp_path):
    out = tmp_path / "out"
    arguments = [*train_arguments, "--out", str(out)]
    arguments[arguments.index("--steps") + 1] = "400"
    process = subprocess.Popen(
        [sys.executable, "-m", "jdkd", *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 60
    while not (out / "log.jsonl").is_file() or not (out / "log.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in err
    told = [line for line in err.splitlines() if line.startswith("jdkd: ")]
    assert len(told) == 1 and "carry on with: jdkd train" in told[0] and told[0].endswith("--resume")
    assert not json.loads((out / "run.json").read_text())["finished"]
    assert (out / "checkpoint.pt").is_file()
