"""A search that was killed, interrupted, moved or asked of more workers comes to the same archive."""

import json
import shutil
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import pytest

from jdkd.data import Split
from jdkd.detect import save
from jdkd.errors import InputError
from jdkd.files import LOCK
from jdkd.latency.protocol import conditions_of
from jdkd.notices import Notice
from jdkd.run_folder import RunFolder
from jdkd.search import Archive, Cycle, Method, Proposal, outcome, plan, search
from jdkd.search.archive import ARCHIVE
from jdkd.search.context import TRAINING
from jdkd.search.loop import _generation
from jdkd.search.teachers import TEACHERS
from jdkd.train import checkpoint
from jdkd.train.checkpoint import CHECKPOINT
from tests.detectors import detector, small_spec
from tests.ranks import FORKS
from tests.search.conftest import DIGITS
from tests.search.rows import known, timing
from tests.search.small_search import (
    SteadyTask,
    archived,
    config_of,
    remembered_table,
    search_and_tell,
    steady_measure,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*hold no box of:jdkd.notices.Notice")  # a handful of scenes, 10 digits


@pytest.fixture
def unfinished(finished, tmp_path):
    """A copy of a finished search that lacks its result."""
    shutil.copytree(finished[0], tmp_path / "out")
    (tmp_path / "out" / "result.json").unlink()
    return tmp_path / "out"


def up_to_the_pool(finished, out):
    """Copies what a search has written before its first candidate."""
    shutil.copytree(finished[0] / "pool", out / "pool")
    shutil.copy(finished[0] / "latency_table.json", out)
    record = json.loads((finished[0] / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(record | {"finished": None}))


def forgotten(out, number):
    """Takes the candidates from a number on out of an archive, as if a kill had come before them."""
    with closing(Archive(out / ARCHIVE)) as archive:
        archive._db.execute("DELETE FROM candidates WHERE number >= ?", (number,))
        archive._db.commit()


def interrupted_at(moment):
    """A progress callback that presses Ctrl-C."""

    def stop(what, *state):
        if what.startswith(moment):
            raise KeyboardInterrupt

    return stop


def killed_at(config, moment):
    """Runs a search in a process of its own until it says what it is at, and kills it."""
    ours, theirs = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=search_and_tell, args=(config, theirs))
    process.start()
    theirs.close()
    while not ours.recv().startswith(moment):
        pass
    process.kill()
    process.join()


def test_a_search_killed_once_and_interrupted_again_and_again_reaches_the_same_archive(
    folder, finished, steady, tmp_path
):
    out, told = tmp_path / "out", []
    up_to_the_pool(finished, out)
    config = config_of(folder, out, resume=True)
    killed_at(config, "candidate 1")
    decided = (out / "generation.json").read_text()
    assert len(archived(out)) <= 2 and not (out / "result.json").exists()
    for moment in ("candidate 2", "candidates", "candidate 4", "timing", "control", "scoring"):

        def stop(what, *state, moment=moment):
            told.append(what)
            if what.startswith(moment):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            search(config, stop)
        assert RunFolder(out).read()["finished"] is None and not (out / "result.json").exists()
        if moment == "candidate 2":
            assert (out / "generation.json").read_text() == decided, "a generation is decided once"
    result = search(config)
    assert not any(what.startswith(("pool: ", "candidate 1:")) for what in told), "nothing finished is redone"
    assert archived(out) == archived(finished[0])
    for name in ("base", "control", "students", "predictor", "aa"):
        assert result[name] == finished[1][name]


def test_a_lost_archive_is_made_again_and_by_two_workers_the_same(folder, finished, unfinished, steady, monkeypatch):
    (unfinished / ARCHIVE).unlink()
    (unfinished / TEACHERS).unlink()  # which knows those that were scored in later generations
    shutil.rmtree(unfinished / "candidates")
    monkeypatch.setattr("jdkd.search.loop.SearchTask", SteadyTask)
    told = []
    search(config_of(folder, unfinished, resume=True, workers=2), lambda what, *state: told.append(what))
    assert archived(unfinished) == archived(finished[0])
    assert any(what.startswith("candidate 1:") for what in told), "what workers report is passed on"
    assert "pool: largest" not in told, "the pool was not lost"


@pytest.mark.parametrize("left", [None, b""])
def test_candidates_whose_archive_is_lost_are_not_written_over(context, steady, tmp_path, left):
    out = tmp_path / "out"
    config = replace(context.config, out=out, resume=True)
    RunFolder(out).begin("search", context.identity())
    weights = out / "candidates" / "001" / "weights.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"of a student")
    if left is not None:
        (out / ARCHIVE).write_bytes(left)
    with pytest.raises(
        InputError, match=r"archive\.sqlite is gone or empty, and .*candidates holds candidates of it; put"
    ):
        search(config)
    assert weights.read_bytes() == b"of a student"


def test_a_generation_that_is_decided_anew_carries_on_no_training_of_another(context, tmp_path):
    here = replace(context, config=replace(context.config, out=tmp_path))
    made = Proposal(1, 1, "000", "morph", "cut", (), None, Cycle(2, 0, 2, 1e-3), 0.9)
    strategy = SimpleNamespace(
        ask=lambda archive: [made], matching=SimpleNamespace(pool=None), plan=plan(here.config, 32)
    )
    workers = SimpleNamespace(clear=lambda: None)
    left = here.folder(1) / TRAINING / CHECKPOINT
    left.parent.mkdir(parents=True)
    left.touch()
    with closing(Archive(tmp_path / ARCHIVE)) as archive:
        archive.add(timing(), **known())
        assert _generation(strategy, archive, workers, here) == [made] and not left.exists()
        left.parent.mkdir()
        left.touch()
        assert _generation(strategy, archive, workers, here) == [made] and left.exists(), "it is carried on"


@pytest.mark.parametrize("steps", [3, 4])
def test_a_control_of_another_student_is_trained_again(context, tmp_path, monkeypatch, steps):
    control, trained = tmp_path / "control", []
    save(control, context.base)
    (control / TRAINING).mkdir()
    state = {name: {} for name in checkpoint.FIELDS} | {"step": 3, "seconds": 1.0, "config": {"steps": 3}}
    checkpoint.write(control / TRAINING, state)
    monkeypatch.setattr(outcome, "fit", lambda model, data, config, **how: trained.append(config.steps))
    monkeypatch.setattr(outcome, "_row", lambda detector, latency, base, steps, context: steps)
    assert outcome._control(steps, None, replace(context, config=replace(context.config, out=tmp_path))) == steps
    assert trained == [4] * (steps == 4) and (control / "weights.safetensors").exists()


def test_a_control_that_a_kill_left_half_written_is_written_again(folder, finished, unfinished, steady):
    (unfinished / "control" / "architecture.json").unlink()
    result = search(config_of(folder, unfinished, resume=True))
    assert result["control"] == finished[1]["control"]


def test_a_finished_search_that_is_read_again_keeps_nobody_out(folder, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "out")
    search(config_of(folder, tmp_path / "out", resume=True))
    locking = f"import fcntl; fcntl.lockf(open({str(tmp_path / 'out' / LOCK)!r}, 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    subprocess.run([sys.executable, "-c", locking], check=True)  # of another process, which fails where one holds it


def test_a_generation_whose_end_is_lost_is_carried_on(folder, finished, unfinished, steady):
    last = max(row[0] for row in archived(unfinished))
    forgotten(unfinished, last)
    shutil.rmtree(unfinished / "candidates" / f"{last:03d}")
    (unfinished / "generation.json").unlink()  # that of the end of the search, which is empty
    search(config_of(folder, unfinished, resume=True))
    decided = "number, id, generation, parent, kind, action, teacher, target, lineage_steps, cycles"
    assert archived(unfinished, decided) == archived(finished[0], decided)
    assert archived(unfinished)[:last] == archived(finished[0])[:last]


@pytest.mark.parametrize("content", ["{", "[1]", '{"members": 1}', '[{"number": 1}]'])
@pytest.mark.parametrize("name", ["teachers.json", "latency_table.json", "generation.json"])
def test_a_file_that_is_broken_is_named(folder, unfinished, name, content):
    (unfinished / name).write_text(content)
    with pytest.raises(InputError, match=rf"{name} (is not JSON|holds something else).*remove it and resume"):
        search(config_of(folder, unfinished, resume=True))


@pytest.mark.parametrize(("content", "says"), [("[]", "has no 'base'"), ("{", "is not JSON")])
def test_a_result_that_is_none_is_named(folder, unfinished, content, says):
    (unfinished / "result.json").write_text(content)
    with pytest.raises(InputError, match=rf"result\.json {says}.*remove it and resume"):
        search(config_of(folder, unfinished, resume=True))


def test_a_candidate_whose_weights_are_damaged_is_named(folder, finished, unfinished, steady):
    with closing(Archive(unfinished / ARCHIVE)) as archive:
        last = archive.candidates[-1]
    forgotten(unfinished, last.number)
    weights = next((unfinished / "candidates" / last.parent[:3]).glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match=f"candidates/{last.parent[:3]}"):
        search(config_of(folder, unfinished, resume=True))


def test_a_kill_after_the_archive_leaves_nothing_behind(folder, finished, unfinished, steady):
    training = unfinished / "candidates" / "002" / "training"
    training.mkdir(exist_ok=True)
    (training / CHECKPOINT).touch()
    again = search(config_of(folder, unfinished, resume=True))
    assert not (training / CHECKPOINT).exists()
    assert again["students"] == finished[1]["students"] and archived(unfinished) == archived(finished[0])


def test_renamed_folders_are_the_same_search(folder, finished, tmp_path):
    there = tmp_path / "elsewhere"
    for name in ("data", "base", "out"):
        shutil.copytree(folder / name, there / name)
    shutil.move(there / "base", tmp_path / "another name")
    other = {"workers": 3, "loaders": 2, "latency_seconds": 1.0}  # how it is done, and not what
    config = config_of(there, there / "out", base=tmp_path / "another name", resume=True, **other)
    told = []
    again = search(config, lambda what, *state: told.append(what))
    assert not [what for what in told if not what.startswith("check ")], "data are looked at, and nothing is done"
    assert again == json.loads(json.dumps(finished[1]))


def test_a_generation_on_disk_that_is_of_another_archive_is_decided_anew(folder, finished, unfinished, steady):
    last = max(row[0] for row in archived(unfinished))
    forgotten(unfinished, last)
    with pytest.raises(KeyboardInterrupt):
        search(config_of(folder, unfinished, resume=True), interrupted_at(f"candidate {last}"))
    decided = json.loads((unfinished / "generation.json").read_text())
    for wrong in ({"parent": "nobody"}, {"number": last + 1}):
        (unfinished / "generation.json").write_text(json.dumps([proposal | wrong for proposal in decided]))
        with pytest.raises(KeyboardInterrupt):
            search(config_of(folder, unfinished, resume=True), interrupted_at(f"candidate {last}"))
        assert json.loads((unfinished / "generation.json").read_text()) == decided


def test_a_damaged_candidate_is_named_whoever_opens_it(folder, unfinished, steady):
    last = max(row[0] for row in archived(unfinished))
    forgotten(unfinished, last)
    (unfinished / "generation.json").unlink()
    for file in unfinished.glob("candidates/*/weights.safetensors"):
        file.write_bytes(file.read_bytes()[:500])
    says = (
        r"candidate \d of this search cannot be opened: .*weights\.safetensors.*; copy .*again, or search into another"
    )
    with pytest.raises(InputError, match=says):
        search(config_of(folder, unfinished, resume=True))


@pytest.mark.parametrize("students", [None, {}, [{}], [3]])
def test_a_result_without_its_students_is_named(folder, finished, tmp_path, students):
    shutil.copytree(finished[0], tmp_path / "out")
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    (tmp_path / "out" / "result.json").write_text(json.dumps(result | {"students": students}))
    with pytest.raises(
        InputError, match=r"result\.json does not say of its students folder, id, .*remove it and resume"
    ):
        search(config_of(folder, tmp_path / "out", resume=True))


def test_a_finished_search_whose_student_is_gone_says_where_another_copy_lies(folder, finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    shutil.rmtree(out / "student")
    with pytest.raises(InputError, match=r"its student in .*student is gone; copy it from ") as raised:
        search(config_of(folder, out, resume=True))
    shutil.copytree(str(raised.value).rpartition("from ")[2].rstrip("."), out / "student")
    assert search(config_of(folder, out, resume=True))["students"] == finished[1]["students"]


def test_the_device_is_where_a_search_runs_and_not_what_it_is(context):
    identity, where = context.identity(), context.where()
    assert "device" not in json.dumps(identity) and where["device"] == "cpu"
    moved = replace(context, config=replace(context.config, device="cuda:1"))
    assert moved.identity() == identity and moved.where() != where


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 7}, "seed was 0 and is 7"),
        ({"proposals": 9}, "proposals was 5 and is 9"),
        ({"feature_weight": 1.0}, "feature_weight was 2.0 and is 1.0"),
        ({"targets": (0.8,)}, r"targets was \[0.9\] and is \[0.8\]"),
        ({"method": Method(criterion="gamma")}, 'method.criterion was "taylor" and is "gamma"'),
        ({"steps": 33}, "steps was 32 and is 33"),
    ],
)
def test_another_search_is_refused_in_its_folder(folder, finished, changes, says, monkeypatch):
    monkeypatch.delattr("jdkd.search.loop.plan")  # what takes long has not begun
    before = (finished[0] / "run.json").read_bytes()
    with pytest.raises(InputError, match="already holds a run"):
        search(config_of(folder, finished[0], **changes))
    with pytest.raises(InputError, match=says):
        search(config_of(folder, finished[0], resume=True, **changes))
    assert (finished[0] / "run.json").read_bytes() == before


def test_other_weights_or_images_or_teachers_are_another_search(folder, finished, tmp_path):
    shutil.copytree(folder / "base", tmp_path / "base")
    save(tmp_path / "base", detector(small_spec(classes=DIGITS), seed=1))
    with pytest.raises(InputError, match=r"base\.(weights|architecture) was"):
        search(config_of(folder, finished[0], resume=True, base=tmp_path / "base"))
    other = shutil.copytree(tmp_path / "base", tmp_path / "other")
    with pytest.raises(InputError, match=r"teachers.*was"):
        search(config_of(folder, finished[0], resume=True, teachers=(other,)))
    val = config_of(folder, finished[0]).val
    content = json.loads(val.annotations.read_text())
    content["annotations"].pop()
    (tmp_path / "val.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"data\.(report|selection) was"):
        search(config_of(folder, finished[0], resume=True, val=Split(val.images, tmp_path / "val.json")))


def test_a_search_that_goes_on_elsewhere_times_everything_again(folder, unfinished, steady, monkeypatch):
    elsewhere = lambda *where: conditions_of(*where) | {"device_name": "new"}  # noqa: E731
    monkeypatch.setattr("jdkd.search.context.conditions_of", elsewhere)
    measured, table = [], []

    def measure(models, images, **options):
        measured.append(set(models))
        report = steady_measure(models, images, **options)
        return replace(report, environment=report.environment | {"device_name": "new"})

    monkeypatch.setattr("jdkd.search.context.measure", measure)
    monkeypatch.setattr(
        "jdkd.search.context.measure_table", lambda *given, **how: table.append(1) or remembered_table(*given, **how)
    )
    with pytest.warns(Notice, match="goes on on new.* timed again"):
        result = search(config_of(folder, unfinished, resume=True))
    known = {architecture_id for (architecture_id,) in archived(unfinished, "architecture_id")}
    assert set.union(*measured) == known | {"copy"} and table, "also the parts of the base, and the base against itself"
    assert result["device"]["device_name"] == "new"


def test_the_folder_of_an_earlier_version_is_refused_with_a_sentence(folder, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "old")
    record = json.loads((tmp_path / "old" / "run.json").read_text())
    record["identity"] = {"data": {"train_images": "/a/b"}, "device": "cpu"}
    del record["format"]
    (tmp_path / "old" / "run.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"begun by another version of jdkd.*give another folder"):
        search(config_of(folder, tmp_path / "old", resume=True))
