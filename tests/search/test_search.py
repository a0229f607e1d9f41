"""The joint search from end to end, in miniature."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from jdkd.data import Split
from jdkd.detect import load, save
from jdkd.errors import InputError
from jdkd.latency.clock import environment
from jdkd.notices import Notice
from jdkd.run_folder import RunFolder
from jdkd.search import plan, search
from jdkd.search.archive import ARCHIVE, Archive
from jdkd.search.loop import TEACHERS
from tests.detectors import detector, small_spec
from tests.search.conftest import DIGITS
from tests.search.small_search import archived, config_of, steady_measure

pytestmark = pytest.mark.filterwarnings("ignore:.*hold no box of:jdkd.notices.Notice")  # a handful of scenes, 10 digits


def test_a_search_leaves_a_student_a_result_and_an_archive(folder, finished):
    out, result, told = finished
    assert json.loads((out / "result.json").read_text()) == json.loads(json.dumps(result))
    budget = plan(config_of(folder, out), 12)
    steps = {name: result[name]["train_steps"] for name in ("base", "control", "control_single", "student")}
    assert steps.pop("base") == 0 and len(set(steps.values())) == 1
    rows = archived(out, "number, kind, steps, architecture, id")
    assert [row[:3] for row in rows] == [
        (0, "base", 0), (1, "morph", budget.per_candidate), (2, "teacher", budget.per_candidate)
    ]  # fmt: skip
    (known,) = [row[3] for row in rows if row[4] == result["student_id"]]
    assert load(out / "student").architecture.to_json(indent=None) == known
    assert {"pool: largest", "pool: full", "screening students", "control", "timing"} <= told
    assert not list(out.glob("candidates/*/training")), "what only a resume needs is cleared away"
    assert result["command"] == "jdkd search --base 'a folder'"
    assert RunFolder(out).read()["finished"]


def test_the_result_the_archive_and_the_target_know_one_ratio(finished):
    out, result, _ = finished
    with closing(Archive(out / ARCHIVE)) as archive:
        (student,) = (one for one in archive.candidates if one.id == result["student_id"])
        timings = archive.timings(student.architecture_id)
        assert all(
            len(t.samples) == len(t.base_samples)
            for one in archive.candidates
            for t in archive.timings(one.architecture_id)
        )
    told, base = result["student"], result["base"]
    assert told["latency_ratio"] == student.latency_ratio
    assert told["latency_ratio_interval"] == list(student.latency_interval)
    assert told["latency_ratio"] == pytest.approx(told["latency_ms"]["p50"] / base["latency_ms"]["p50"])
    assert result["target_met"] is (student.latency_ratio <= 0.95)
    assert [t.stage for t in timings].count("long") == 1, "who is chosen was timed at length, once"
    assert base["latency_ratio"] == result["control"]["latency_ratio"] == result["control_single"]["latency_ratio"] == 1
    assert "architecture" in result["latency_ratio_is"]


def test_what_selects_and_what_reports_are_named_and_disjoint(folder, finished):
    out, result, _ = finished
    selection, report = result["selection"], result["report"]
    assert selection["images"] == report["images"] == 3 and selection["boxes"] > 0 < report["boxes"]
    assert selection["annotations"] == report["annotations"] == str(config_of(folder, out).val.annotations)
    assert selection["fingerprint"] != report["fingerprint"]
    pool = json.loads((out / "pool" / "pool.json").read_text())
    assert pool["scored_on"] == selection["fingerprint"], "teachers are scored on the images that students are"
    identity = RunFolder(out).read()["identity"]["data"]
    assert pool["trained_on"] == identity["train"] not in (selection["fingerprint"], report["fingerprint"])


def test_a_killed_search_resumes_and_reaches_the_same_archive(folder, finished, steady):
    out, root = folder / "killed", Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.search.small_search", str(folder), str(out)]
    alone = os.environ | {"OMP_NUM_THREADS": "1"}  # threads that wait for a busy core would spin
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=alone, cwd=root) as process:
        for line in process.stdout:
            if line.startswith("candidate 2"):
                break
        process.send_signal(signal.SIGKILL)
    before, told = archived(out), []
    assert [row[0] for row in before] == [0, 1] and not (out / "result.json").exists()
    search(config_of(folder, out, resume=True), lambda what, *state: told.append(what))
    assert not any(what.startswith(("pool: ", "candidate 1:")) for what in told), "nothing finished is redone"
    assert archived(out)[:2] == before
    assert archived(out) == archived(finished[0])


def test_a_search_interrupted_again_and_again_reaches_the_same_archive(folder, finished, steady):
    out, config = folder / "interrupted", config_of(folder, folder / "interrupted", resume=True)
    moments = ("pool: largest", "pool: scoring", "screening students", "candidate 1", "candidates", "scoring teachers")
    for moment in (*moments, "timing", "control", "scoring"):

        def stop(what, *state, moment=moment):
            if what.startswith(moment):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            search(config, stop)
        assert RunFolder(out).read()["finished"] is None and not (out / "result.json").exists()
    result = search(config)
    assert archived(out) == archived(finished[0])
    for name in ("base", "control", "control_single", "student"):
        assert result[name] == finished[1][name]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("result.json", r"result\.json is not JSON.*remove it and resume"),
        ("teachers.json", r"teachers\.json is not JSON.*remove it and resume"),
    ],
)
def test_a_file_that_is_broken_is_named(folder, finished, tmp_path, name, says):
    shutil.copytree(finished[0], tmp_path / "out")
    (tmp_path / "out" / "result.json").unlink()
    (tmp_path / "out" / name).write_text("{")
    with pytest.raises(InputError, match=says):
        search(config_of(folder, tmp_path / "out", resume=True))


def test_a_result_that_is_none_is_named(folder, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "out")
    (tmp_path / "out" / "result.json").write_text("[]")
    with pytest.raises(InputError, match=r"result\.json has no 'base'.*remove it and resume"):
        search(config_of(folder, tmp_path / "out", resume=True))


def test_a_kill_after_the_archive_leaves_nothing_behind(folder, finished, steady, tmp_path, monkeypatch):
    shutil.copytree(finished[0], tmp_path / "out")
    (tmp_path / "out" / "result.json").unlink()
    (tmp_path / "out" / "candidates" / "002" / "training").mkdir()
    search(config_of(folder, tmp_path / "out", resume=True))
    assert not (tmp_path / "out" / "candidates" / "002" / "training").exists()


def test_renamed_folders_are_the_same_search(folder, finished, tmp_path):
    there = tmp_path / "elsewhere"
    for name in ("data", "base", "out"):
        shutil.copytree(folder / name, there / name)
    shutil.move(there / "base", tmp_path / "another name")
    config = config_of(there, there / "out", base=tmp_path / "another name", workers=3, resume=True)
    told = []
    again = search(config, lambda what, *state: told.append(what))
    assert not [what for what in told if not what.startswith("check ")], "data are looked at, and nothing is done"
    assert again == json.loads(json.dumps(finished[1]))


def test_the_device_is_where_a_search_runs_and_not_what_it_is(context):
    identity, where = context.identity(), context.where()
    assert "device" not in json.dumps(identity) and where["device"] == "cpu"
    moved = replace(context, config=replace(context.config, device="cuda:1"))
    assert moved.identity() == identity and moved.where() != where


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 7}, "seed was 0 and is 7"),
        ({"proposals": 5}, "proposals was 2 and is 5"),
        ({"feature_weight": 1.0}, "feature_weight was 6.0 and is 1.0"),
    ],
)
def test_another_search_is_refused_in_its_folder(folder, finished, changes, says):
    before = (finished[0] / "run.json").read_bytes()
    with pytest.raises(InputError, match="already holds a run"):
        search(config_of(folder, finished[0], **changes))
    with pytest.raises(InputError, match=says):
        search(config_of(folder, finished[0], resume=True, **changes))
    assert (finished[0] / "run.json").read_bytes() == before


def test_other_weights_or_images_are_another_search(folder, finished, tmp_path):
    shutil.copytree(folder / "base", tmp_path / "base")
    save(tmp_path / "base", detector(small_spec(classes=DIGITS), seed=1))
    with pytest.raises(InputError, match=r"base\.weights was"):
        search(config_of(folder, finished[0], resume=True, base=tmp_path / "base"))
    val = config_of(folder, finished[0]).val
    content = json.loads(val.annotations.read_text())
    content["annotations"].pop()
    (tmp_path / "val.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"data\.(report|selection) was"):
        search(config_of(folder, finished[0], resume=True, val=Split(val.images, tmp_path / "val.json")))


def test_a_search_that_goes_on_elsewhere_times_everything_again(folder, finished, steady, monkeypatch):
    out = folder / "moved"
    shutil.copytree(finished[0], out)
    (out / "result.json").unlink()
    monkeypatch.setattr("jdkd.search.context.environment", lambda device: environment(device) | {"device_name": "new"})
    measured = []

    def measure(models, images, **options):
        measured.append(set(models))
        report = steady_measure(models, images, **options)
        return replace(report, environment=report.environment | {"device_name": "new"})

    monkeypatch.setattr("jdkd.search.context.measure", measure)
    with pytest.warns(Notice, match="goes on on new.* timed again"):
        result = search(config_of(folder, out, resume=True))
    assert set.union(*measured) == {architecture_id for (architecture_id,) in archived(out, "architecture_id")}
    assert result["device"]["device_name"] == "new"


def test_a_lost_archive_is_made_again(small, steady, tmp_path):
    config = small(tmp_path / "out", candidates=1, steps=3)
    search(config)
    before = archived(tmp_path / "out")
    for name in (ARCHIVE, "result.json"):
        (tmp_path / "out" / name).unlink()
    search(replace(config, resume=True))
    assert archived(tmp_path / "out") == before


def test_a_finished_pool_serves_another_search_and_is_scored_on_its_images(folder, finished, steady, tmp_path):
    pool, out = finished[0] / "pool", tmp_path / "again"
    before, whole = (pool / "pool.json").read_bytes(), config_of(folder, out).val
    train = config_of(folder, out).train
    config = config_of(folder, out, teacher_pool=pool, seed=1, steps=3, candidates=1, val=train, train=whole)
    with pytest.warns(Notice, match="was trained on other data than"):
        result = search(config)
    assert result["seed"] == 1 and not (out / "pool").exists()
    assert (pool / "pool.json").read_bytes() == before
    scores = [(teacher["subnet"], teacher["map"]) for teacher in json.loads((out / TEACHERS).read_text())]
    known = [(member["subnet"], member["map"]) for member in json.loads(before)["members"]]
    assert sorted(map(str, (s for s, _ in scores))) == sorted(map(str, (s for s, _ in known))) and scores != known


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": 3}, "steps is 3, too few"),
        ({"target_latency": 0.0}, r"must be in \(0, 1\], got 0.0"),
        ({"target_latency": 1.5}, "got 1.5"),
        ({"candidates": 0}, "candidates must be at least 1, got 0"),
        ({"latency_rounds": 0}, "latency_rounds must be at least 1, got 0"),
        ({"teacher_pool": Path("no pool")}, "holds no finished teacher pool"),
        ({"teacher_pool": Path(__file__)}, "holds no finished teacher pool"),
        ({"lr": -1.0}, r"lr must be a number of at least 0\.0, got -1\.0"),
        ({"seed": -1}, "seed must be a number of at least 0, got -1"),
        ({"workers": -1}, "workers must be"),
        ({"amp": "int8"}, "amp must be one of"),
        ({"latency_seconds": math.nan}, "latency_seconds must be a number of at least 0, got nan"),
        ({"feature_weight": math.inf}, "feature_weight must be"),
    ],
)
def test_a_search_that_cannot_be_planned_is_refused_before_anything_is_written(folder, tmp_path, changes, says):
    with pytest.raises(InputError, match=says):
        search(config_of(folder, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_the_default_budget_said_in_steps_is_the_same_search(context):
    default = replace(context, config=replace(context.config, steps=None))
    said = replace(context, config=replace(context.config, steps=36 * 12 // 2))
    assert default.identity() == said.identity() != context.identity()


def test_a_val_without_boxes_to_select_on_is_refused_before_anything_is_written(folder, tmp_path):
    val = config_of(folder, tmp_path).val
    content = json.loads(val.annotations.read_text())
    first = content["images"][0]["id"]
    content["annotations"] = [record for record in content["annotations"] if record["image_id"] == first]
    (tmp_path / "val.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="6 images to select and to report on, 1 of them with a box"):
        search(config_of(folder, tmp_path / "out", val=Split(val.images, tmp_path / "val.json")))
    assert not (tmp_path / "out").exists()


def test_a_base_of_other_classes_is_refused(folder, tmp_path):
    save(tmp_path / "base", detector(small_spec()))
    with pytest.raises(InputError, match=r"3 \(cat, dog, bird\).*10 \(0, 1, 2, 3, 4, ...\)"):
        search(config_of(folder, tmp_path / "out", base=tmp_path / "base"))


def test_a_base_that_was_trained_on_other_images_is_said(folder, tmp_path):
    shutil.copytree(folder / "base", tmp_path / "base")
    (tmp_path / "base" / "run.json").write_text(
        json.dumps({"kind": "train", "started": "today", "identity": {"data": {"train": "another"}}})
    )
    with pytest.warns(Notice, match="was trained on other data"), pytest.raises(InputError, match="too few"):
        search(config_of(folder, tmp_path / "out", base=tmp_path / "base", steps=3))


def test_a_base_that_does_not_say_what_it_was_trained_on_is_said(folder, tmp_path):
    save(tmp_path / "base", load(folder / "base"))
    with pytest.warns(Notice, match="does not say whether it was trained on"), pytest.raises(InputError, match="few"):
        search(config_of(folder, tmp_path / "out", base=tmp_path / "base", steps=3))


def test_a_base_of_weights_that_are_no_numbers_is_refused_before_anything_is_written(folder, tmp_path):
    shutil.copytree(folder / "base", tmp_path / "base")
    base = load(tmp_path / "base")
    base.backbone.body.conv1.weight.data[0] = math.nan
    save(tmp_path / "base", base)
    with pytest.raises(InputError, match=r"backbone\.body\.conv1\.weight holds .* not finite"):
        search(config_of(folder, tmp_path / "out", base=tmp_path / "base"))
    assert not (tmp_path / "out").exists()


def test_the_budget_covers_pool_candidates_and_both_controls(folder):
    config = config_of(folder, folder / "none", steps=1200, candidates=4)
    budget = plan(config, 100)
    assert 1150 <= budget.total <= 1200 and budget.pool == 432
    assert plan(replace(config, steps=None), 1000).total <= 36 * 1000 // 2
    assert plan(replace(config, teacher_pool=folder), 100).pool == 0


def test_the_folder_of_an_earlier_version_is_refused_with_a_sentence(folder, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "old")
    record = json.loads((tmp_path / "old" / "run.json").read_text())
    record["identity"] = {"data": {"train_images": "/a/b"}, "device": "cpu"}
    del record["format"]
    (tmp_path / "old" / "run.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"begun by another version of jdkd.*give another folder"):
        search(config_of(folder, tmp_path / "old", resume=True))
