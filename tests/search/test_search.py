"""The joint search from end to end, in miniature."""

import json
import math
import shutil
import warnings
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from jdkd.data import CocoDetectionDataset, Split
from jdkd.detect import load, save
from jdkd.errors import InputError
from jdkd.latency import Latency, ModelLatency
from jdkd.latency.table import LatencyTable
from jdkd.notices import Notice
from jdkd.report import read_outcome
from jdkd.run_folder import RunFolder
from jdkd.search import Archive, Method, plan, search
from jdkd.search.archive import ARCHIVE
from jdkd.search.context import open_context
from jdkd.search.loop import _say_if_unsteady
from jdkd.search.teachers import TEACHERS, given_pool, remember
from jdkd.train.checkpoint import CHECKPOINT
from tests.detectors import detector, small_spec
from tests.search.conftest import DIGITS
from tests.search.rows import timing
from tests.search.small_search import archived, config_of, steady_measure

pytestmark = pytest.mark.filterwarnings("ignore:.*hold no box of:jdkd.notices.Notice")  # a handful of scenes, 10 digits


def test_a_search_leaves_a_student_a_result_and_an_archive(folder, finished):
    out, result, told = finished
    assert json.loads((out / "result.json").read_text()) == json.loads(json.dumps(result))
    (student,) = result["students"]
    outcome = read_outcome(out)
    known = outcome.by_id[student["id"]]
    (line,) = outcome.lines
    assert load(out / student["folder"]).architecture == known.architecture
    assert student["train_steps"] == known.lineage_steps == sum(one.steps for one in line)
    assert result["control"]["train_steps"] == known.lineage_steps, "trained as long"
    assert {"pool: largest", "pool: full", "screening students", "control", "timing"} <= told
    assert not list(out.glob(f"candidates/*/training/{CHECKPOINT}")), "what only a resume needs is cleared away"
    assert not (out / "outcomes").exists()
    assert result["command"] == "jdkd search --base 'a folder'"
    assert RunFolder(out).read()["finished"]


def test_generations_are_as_planned_and_who_goes_on_alone_is_annealed_in_each(folder, finished):
    out, result, _ = finished
    budget = plan(config_of(folder, out), 32)
    with closing(Archive(out / ARCHIVE)) as archive:
        candidates = archive.candidates
        assert max(one.generation for one in candidates) == len(budget.rungs)
        for one in candidates[1:]:
            rung = budget.rungs[one.generation - 1]
            assert one.steps == rung.steps and (one.target is None) is rung.explores
            own, before = one.cycles[-1], one.lineage_steps - one.steps
            assert before == sum(cycle.steps for cycle in one.cycles[:-1])
            if rung.alone:
                assert (own.start, own.total) == (0, one.steps), "a cycle of its own, to its end"
            else:
                assert own.start == before and one.lineage_steps < own.total <= budget.lineage
        final = [one for one in candidates if not budget.rungs[one.generation - 1].explores and one.number]
    assert all(one.parent != candidates[0].id for one in final), "the base is no finalist"
    assert result["cost"]["candidate_steps"] == sum(one.steps for one in candidates) <= budget.total - budget.pool
    assert result["cost"]["pool_steps"] == pytest.approx(budget.pool, abs=2), "but for what phases round"
    assert {"training", "scoring", "timing", "inheriting"} <= result["cost"]["candidate_seconds"].keys()
    spent = result["cost"]["seconds"]
    assert {"pool", "candidates", "control", "timing", "scoring", "proposing", "everything else"} == spent.keys()
    assert all(seconds > 0 for seconds in spent.values())


def test_the_result_the_archive_and_the_target_know_one_ratio(finished):
    out, result, _ = finished
    told, base = result["students"][0], result["base"]
    with closing(Archive(out / ARCHIVE)) as archive:
        (student,) = (one for one in archive.candidates if one.id == told["id"])
        timings = archive.timings(student.architecture_id)
        everything = [t for one in archive.candidates for t in archive.timings(one.architecture_id)]
    assert all(len(t.samples) == len(t.base_samples) for t in everything)
    assert told["latency_ratio"] == student.latency_ratio
    assert told["latency_ratio_interval"] == list(student.latency_interval)
    assert told["latency_ratio"] == pytest.approx(told["latency_ms"]["p50"] / base["latency_ms"]["p50"])
    assert told["target"] == 0.9 and result["target_met"] is told["target_met"] is (student.latency_ratio <= 0.9)
    stages = [t.stage for t in timings]
    assert stages.count("long") == stages.count("final") == 1, "at length before it was trained on, and in the end"
    assert base["latency_ratio"] == result["control"]["latency_ratio"] == 1
    assert result["aa"] == {"ratio": 1.0, "interval": [1.0, 1.0]}
    table = LatencyTable.from_json(json.loads((out / "latency_table.json").read_text())["table"])
    assert result["fixed_share"] == table.fixed and 0 <= table.fixed < 1
    predictor = result["predictor"]
    assert predictor["architectures"] >= 1 and 0 <= predictor["mean_absolute_percentage_error"] < 30
    assert "architecture" in result["latency_ratio_is"] and result["method"] == vars(Method())


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


@pytest.mark.filterwarnings("ignore:the teacher .* has nothing to say:jdkd.notices.Notice")  # nobody was trained
def test_every_target_has_a_student_of_its_own_under_a_foreign_teacher(
    folder, finished, quick, steady, tmp_path, monkeypatch
):
    foreign = tmp_path / "wide"
    wide = small_spec(classes=DIGITS, fpn=24)
    shutil.copytree(folder / "base", foreign)  # with the record of what it was trained on
    save(foreign, detector(wide, seed=3))
    told, always = [], Method(teaching="fixed")
    changes = {"targets": (0.9, 0.6), "teacher_pool": finished[0] / "pool", "teachers": (foreign,), "method": always}
    config = quick(tmp_path / "out", steps=18, **changes)
    pool = (finished[0] / "pool" / "pool.json").read_bytes()
    monkeypatch.setattr("jdkd.pool.elastic_pool.evaluate", lambda model, *given, **how: scores_of(model, wide))
    result = search(config, lambda what, *state: told.append(what))
    fast, faster = [student["latency_ratio"] for student in result["students"]]
    assert (
        [student["target"] for student in result["students"]] == [0.9, 0.6] and faster <= 0.6 and faster <= fast <= 0.9
    )
    assert [student["folder"] for student in result["students"]] == ["student-0.9", "student-0.6"]
    assert all(load(tmp_path / "out" / student["folder"]) for student in result["students"])
    assert "control" not in result and "control" not in told and result["cost"]["control_steps"] == 0
    assert not (tmp_path / "out" / "pool").exists() and (finished[0] / "pool" / "pool.json").read_bytes() == pool
    members = json.loads((tmp_path / "out" / TEACHERS).read_text())
    assert [member["foreign"] for member in members if "foreign" in member] == ["wide"]
    taught = {row[0] for row in archived(tmp_path / "out", "teacher")}
    assert taught == {None, json.dumps({"foreign": "wide"})}, "of another width and depth, through the adapter"
    targets = [row[0] for row in archived(tmp_path / "out", "target")]
    assert {json.loads(target) for target in targets} == {None, 0.9, 0.6}


def scores_of(model, best):
    """In place of :func:`jdkd.train.evaluate`: the teacher of one pyramid is the best."""
    return SimpleNamespace(map=0.9 if model.architecture.arguments.get("fpn") == best.fpn else 0.1)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: None, "wide is no detector"),
        (
            lambda folder: save(folder / "wide", detector(small_spec())),
            r"teacher wide knows .* cat, dog, bird \(3\)",
        ),
        (lambda folder: save(folder / "base", detector(small_spec(classes=DIGITS))), "is named as what the search"),
        (lambda folder: save(folder / "best", detector(small_spec(classes=DIGITS))), "named best, as a subnet is"),
    ],
    ids=["is not there", "of other classes", "named base", "named as a subnet"],
)
def test_a_teacher_that_cannot_teach_is_refused_before_anything_is_written(folder, tmp_path, make, says):
    make(tmp_path)
    teacher = next((tmp_path / name for name in ("base", "best") if (tmp_path / name).exists()), tmp_path / "wide")
    with pytest.raises(InputError, match=says):
        search(config_of(folder, tmp_path / "out", teachers=(teacher,)))
    assert not (tmp_path / "out").exists()


def test_a_pool_with_a_teacher_named_as_the_base_is_refused(context, tmp_path, monkeypatch):
    pool = SimpleNamespace(trained_on=context.train.fingerprint, foreign={"base": None})
    monkeypatch.setattr("jdkd.search.teachers.load_pool", lambda *given, **how: pool)
    with pytest.raises(InputError, match="has a foreign teacher named base, as what the search starts from"):
        given_pool(tmp_path, context)


def test_a_teacher_that_does_not_see_an_image_is_refused_before_anything_is_written(folder, tmp_path, monkeypatch):
    save(tmp_path / "wide", detector(small_spec(classes=DIGITS, max_size=64)))
    monkeypatch.setattr(CocoDetectionDataset, "sizes", property(lambda data: [("long.png", 2, 150)]))
    with pytest.raises(InputError, match=r"long.png is 2x150 .*, of which teacher wide \(FasterRCNN\) leaves no pixel"):
        search(config_of(folder, tmp_path / "out", teachers=(tmp_path / "wide",)))
    assert not (tmp_path / "out").exists()


def test_a_base_that_does_not_see_an_image_is_refused_before_anything_is_written(folder, steady, tmp_path, monkeypatch):
    monkeypatch.setattr(CocoDetectionDataset, "sizes", property(lambda data: [("long.png", 2, 250)]))
    with pytest.raises(InputError, match=r"long.png is 2x250 .*, of which the base \(FasterRCNN\) leaves no pixel"):
        search(config_of(folder, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_base_that_the_runtime_cannot_run_is_refused_before_anything_is_written(
    folder, steady, tmp_path, monkeypatch
):
    def prepare(model, batches, device, dtype):
        raise InputError(f"a {type(model).__name__} cannot be run on {len(batches)} batch in {dtype}.")

    runtime = SimpleNamespace(name="compile", version="1", why_not=lambda device, dtype: None, prepare=prepare)
    monkeypatch.setattr("jdkd.search.context.known_runtimes", lambda: {"compile": runtime})
    with pytest.raises(InputError, match="a FasterRCNN cannot be run on 1 batch in float32"):
        search(config_of(folder, tmp_path / "out", runtime="compile"))
    assert not (tmp_path / "out").exists()


def test_two_teachers_of_one_name_are_refused(folder, tmp_path):
    same = [tmp_path / name / "wide" for name in ("one", "two")]
    for place in same:
        save(place, detector(small_spec(classes=DIGITS)))
    with pytest.raises(InputError, match="a foreign teacher wide already"):
        search(config_of(folder, tmp_path / "out", teachers=tuple(same)))
    assert not (tmp_path / "out").exists()


def test_a_target_that_no_cut_reaches_is_missed_by_a_student_all_the_same(quick, steady, tmp_path):
    with pytest.warns(Notice) as said:
        result = search(quick(tmp_path / "out", targets=(0.02,), method=Method(teaching="none", gradual=False)))
    words = [str(notice.message) for notice in said]
    assert any("no student can be made at 0.02 of the base's latency; this generation has 0." in w for w in words)
    assert any("is none that a cut saves, so a student at 0.02 has 2% of the rest" in w for w in words)
    assert any("the fastest version that was timed" in w for w in words)
    assert not result["target_met"] and result["students"][0]["latency_ratio"] < 0.9
    assert (tmp_path / "out" / "student").is_dir()


def test_a_finalist_that_is_too_slow_at_length_is_cut_before_it_is_trained_on(quick, steady, tmp_path, monkeypatch):
    config = quick(tmp_path / "out", targets=(0.9,))

    def measure(models, images, *, rounds, **how):
        report = steady_measure(models, images, rounds=rounds, **how)
        if rounds == config.latency_rounds:
            return report
        base, *others = report.models.items()
        slower = [(n, ModelLatency(Latency(tuple(1.3 * ms for ms in one.end_to_end.samples)))) for n, one in others]
        return replace(report, models=dict([base, *slower]))

    monkeypatch.setattr("jdkd.search.context.measure", measure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)  # it may end above the target
        search(config)
    kinds = [kind for (kind,) in archived(tmp_path / "out", "kind")]
    assert kinds[:3] == ["base", "morph", "morph"]


@pytest.mark.parametrize(("factors", "said"), [((0.9, 1.2), True), ((0.99, 1.02), False)])
def test_a_machine_that_cannot_tell_the_base_from_itself_is_said_to_be_busy(context, monkeypatch, factors, said):
    found = timing([10.0 * factor for factor in factors] * 10, [10.0] * 20)
    monkeypatch.setattr(type(context), "timed", lambda self, models: dict.fromkeys(models, found))
    with pytest.warns(Notice, match="the base timed against itself takes") if said else nullcontext():
        _say_if_unsteady(context)


def test_a_budget_in_minutes_is_measured_once_and_kept(quick, steady, tmp_path, monkeypatch):
    def fit(model, *given, **options):
        measured.append(1)
        return SimpleNamespace(seconds=3.0)  # of three steps

    measured = []
    monkeypatch.setattr("jdkd.search.context.fit", fit)
    monkeypatch.setattr("jdkd.search.loop._searched", lambda evaluator, budget, workers: keep(evaluator, budget))

    def keep(evaluator, budget):
        evaluator.context.keep_budget()
        return {"total": budget.total}

    config = quick(tmp_path / "out", steps=None, minutes=0.5)
    found = search(config)
    assert measured == [1] and 25 <= found["total"] <= 30
    assert search(replace(config, resume=True)) == found and measured == [1]
    with pytest.raises(InputError, match=r"minutes was 0\.5 and is 1\.0"):
        search(replace(config, resume=True, minutes=1.0))
    (tmp_path / "out" / "budget.json").write_text("{}")
    with pytest.raises(InputError, match=r"budget\.json holds something else"):
        search(replace(config, resume=True))


def test_a_finished_pool_is_scored_anew_on_the_images_of_another_search(folder, finished, steady, tmp_path):
    pool, whole = finished[0] / "pool", config_of(folder, tmp_path)
    before = (pool / "pool.json").read_bytes()
    save(tmp_path / "base", load(folder / "base"))
    swapped = replace(whole, base=tmp_path / "base", train=whole.val, val=whole.train)
    with pytest.warns(Notice, match="base .* does not say whether it was trained on"):
        context = open_context(swapped, lambda *state: None)
    with pytest.warns(Notice, match="teacher pool .* was trained on other data than"):
        given = given_pool(pool, context)
    known = [member.teacher for member in given.members]
    remember(given, context)
    assert given.scored_on == context.selection.dataset.fingerprint != json.loads(before)["scored_on"]
    assert sorted(map(str, known)) == sorted(str(member.teacher) for member in given.members)
    kept = json.loads((tmp_path / TEACHERS).read_text())
    assert (
        json.loads(json.dumps([member.to_json() for member in given.members])) == kept
        and (pool / "pool.json").read_bytes() == before
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": 3}, "the budget is 3 steps, too few"),
        ({"epochs": 0.1, "steps": None}, "the budget is 0 steps, too few"),
        ({"teacher_pool": Path("no pool")}, "holds no finished teacher pool"),
        ({"teacher_pool": Path(__file__)}, "holds no finished teacher pool"),
        ({"ray": "nowhere:1"}, "ray"),
    ],
)
def test_a_search_that_cannot_be_planned_is_refused_before_anything_is_written(folder, tmp_path, changes, says):
    with pytest.raises(InputError, match=says):
        search(config_of(folder, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_the_default_budget_said_in_steps_or_epochs_is_the_same_search(context):
    default = replace(context, config=replace(context.config, steps=None))
    for same in ({"steps": 24 * 12 // 2}, {"steps": None, "epochs": 24.0}):
        said = replace(context, config=replace(context.config, **same))
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
    with pytest.raises(InputError, match=r"cat, dog, bird \(3\).*0, 1, 2, 3, 4, ... \(10\)"):
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
