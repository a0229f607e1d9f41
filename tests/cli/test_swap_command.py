"""`jdkd swap`."""

import io
import json
import shutil
from contextlib import redirect_stdout

import pytest

from jdkd.cli import main
from jdkd.detect import load, save
from jdkd.train import engine, evaluate
from tests.cli.test_refusals import _refused, _tree
from tests.detectors import detector, small_spec

TRAINING = ("--batch-size", "2", "--steps", "3", "--lr", "0.01")


@pytest.fixture(scope="module")
def pair(trained, squares):
    """A detector's heads on its own features, on which nothing changes until they are trained."""
    return ["swap", "--features", str(trained), "--head", str(trained), "--data", str(squares)]


@pytest.fixture(scope="module")
def swapped(pair, tmp_path_factory):
    """A folder that `jdkd swap` wrote, and what it printed."""
    folder, told = tmp_path_factory.mktemp("swapped") / "out", io.StringIO()
    with redirect_stdout(told):
        assert main([*pair, *TRAINING, "--out", str(folder)]) == 0
    return folder, told.getvalue()


def test_heads_are_trained_on_other_features_scored_and_carried_on(jdkd, trained, pair, swapped, squares):
    out, told = swapped
    result = json.loads((out / "swap.json").read_text())
    assert [*result["r"]] == ["4", "8", "16", "32"] and all(r == pytest.approx(1) for r in result["r"].values())
    assert result["control"] == result["before"]  # its own features
    assert result["train_steps"] == 3 and result["config"]["gamma_l1"] == 0
    for scores, words in (
        (result["control"], "(the control)"),
        (result["before"], "before training"),
        (result, "steps"),
    ):
        (line,) = [line for line in told.splitlines() if words in line]
        assert line.startswith(f"mAP {scores['map']:.3f}, mAP50 {scores['map50']:.3f}")
    assert "r of the two pyramids: 1.000 at stride 4, " in told
    assert json.loads((trained / "train.json").read_text())["stats"] == pytest.approx(result["control"]["stats"])
    scored = json.loads(jdkd("eval", out, "--data", squares).out.splitlines()[-1])
    assert scored["stats"] == pytest.approx(result["stats"])
    ours, theirs = load(out).state_dict(), load(trained).state_dict()
    changed = {name.partition(".")[0] for name in ours if not ours[name].equal(theirs[name])}
    assert changed == {"rpn", "roi_heads"}
    before = _tree(out)
    _refused(jdkd(*pair, *TRAINING[:-1], "0.02", "--out", out, "--resume"), "training.lr was 0.01 and is 0.02")
    assert _tree(out) == before


def test_heads_of_classes_of_other_names_are_told_apart(jdkd, trained, squares, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    text = json.loads((other / "architecture.json").read_text())
    (other / "architecture.json").write_text(json.dumps({**text, "classes": ["left", "right"]}))
    run = ("swap", "--features", trained, "--head", other, "--data", squares, "--steps", 0, "--out", tmp_path / "out")
    answer = jdkd(*run)
    assert answer.code == 0, answer.err
    assert "other was made for left, right; its label k counts as the k-th of red, blue" in answer.err


def test_all_processes_score_each_its_share(jdkd, pair, tmp_path, monkeypatch):
    """Who scores alone on much data is waited for by the others, until their group gives up."""
    shares = []

    def evaluated(*given, shared=False, **how):
        shares.append(shared)
        return evaluate(*given, shared=shared, **how)

    monkeypatch.setattr("jdkd.train.evaluate", evaluated)
    assert jdkd(*pair, *TRAINING, "--out", tmp_path / "out").code == 0
    assert shares == [True] * 3, "control, before training and after it"


def test_what_was_interrupted_ends_as_it_would_have_and_measures_nothing_twice(
    jdkd, pair, swapped, tmp_path, monkeypatch
):
    whole, cut = swapped[0], tmp_path / "cut"

    advance = engine._Run.advance

    def stop_before_the_third(run, batches):
        if run.step == 2:
            raise KeyboardInterrupt
        advance(run, batches)

    monkeypatch.setattr(engine._Run, "advance", stop_before_the_third)
    answer = jdkd(*pair, *TRAINING, "--out", cut)
    assert answer.code == 2 and "carry on with: jdkd swap" in answer.err and answer.err.rstrip().endswith("--resume")
    assert {"before.json", "checkpoint.pt"} <= {entry.name for entry in cut.iterdir()}
    assert not (cut / "weights.safetensors").exists()
    monkeypatch.undo()
    monkeypatch.setattr("jdkd.distill.correlations", lambda *given, **how: pytest.fail("it is measured again"))
    resumed = jdkd(*pair, *TRAINING, "--out", cut, "--resume")
    assert resumed.code == 0, resumed.err
    assert (cut / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()
    ours, theirs = (json.loads((folder / "swap.json").read_text()) for folder in (cut, whole))
    assert [ours[name] for name in ("r", "control", "before")] == [theirs[name] for name in ("r", "control", "before")]
    assert ours["stats"] == theirs["stats"]


def test_what_does_not_go_together_is_said_before_anything_is_written(jdkd, trained, pair, squares, tmp_path):
    out, narrow, others = ("--out", tmp_path / "out", "--steps", 1), tmp_path / "narrow", tmp_path / "others"
    save(narrow, detector(small_spec(classes=("red", "blue"), fpn=8)))
    answer = jdkd("swap", "--features", trained, "--head", narrow, *pair[5:], *out)
    _refused(answer, "the head reads 8 channels at stride 4, and the features have 16 at stride 4")
    shutil.copytree(squares, others)
    for split in ("train", "val"):
        file = others / "annotations" / f"instances_{split}2017.json"
        content = json.loads(file.read_text())
        content["categories"].append({"id": 3, "name": "green"})
        file.write_text(json.dumps(content))
    _refused(jdkd(*pair[:5], "--data", others, *out), "the detector knows 2 classes and the dataset has 3")
    _refused(jdkd("swap", "--features", tmp_path / "none", *pair[3:], *out), tmp_path / "none")
    _refused(jdkd(*pair, *out[:2], "--steps", -1), "steps", "-1")
    _refused(jdkd(*pair, *out, "--batch-size", 0), "batch_size", "0")
    before = _tree(trained)
    _refused(jdkd(*pair, "--out", trained, "--steps", 1), trained, "already holds a run")
    _refused(jdkd(*pair, "--out", trained, "--steps", 1, "--resume"), "jdkd train", "jdkd swap")
    assert not (tmp_path / "out").exists() and _tree(trained) == before


def test_the_help_has_an_example(jdkd):
    for command in ("swap", "show"):
        answer = jdkd(command, "--help")
        assert answer.code == 0 and f"jdkd {command} " in " ".join(answer.out.split()).partition("options")[0]
        assert "Example: jdkd" in answer.out
