import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from jdkd.cli.flags import DataFlags, record_of
from jdkd.cli.pool import _loaded, _split
from jdkd.cli.progress import Progress
from jdkd.data import resolve_splits
from jdkd.detect import load
from jdkd.notices import Notice
from jdkd.rewrite import Architecture
from jdkd.run_folder import RunFolder
from tests.detectors import mask_detector

PHASES = [
    {"name": "largest", "share": 0.25, "top_fraction": 0, "subnets": 0, "lr": 1},
    {"name": "full", "share": 0.75, "top_fraction": 1, "subnets": 1, "lr": 0.5, "sandwich": True},
]


@pytest.fixture(scope="session")
def phases(tmp_path_factory):
    file = tmp_path_factory.mktemp("phases") / "phases.json"
    file.write_text(json.dumps(PHASES))
    return file


@pytest.fixture(scope="session")
def pool_arguments(trained, squares, phases):
    return [
        "pool", "train", "--base", trained, "--data", squares, "--phases", phases,
        "--steps", 8, "--batch-size", 2, "--subnets", 2,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def foreign(squares, tmp_path_factory):
    """A detector of another family and of other channels."""
    from jdkd.cli import main

    folder = tmp_path_factory.mktemp("foreign") / "retina"
    flags = ["--fpn", "24", "--min-size", "64", "--max-size", "64", "--steps", "1", "--batch-size", "2"]
    model = ["--model", "retinanet", "--backbone", "mobilenet_v2", "--width", "0.25", "--norm", "frozen"]
    assert main(["train", *model, *flags, "--data", str(squares), "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def pool(pool_arguments, foreign, tmp_path_factory):
    """A folder that `jdkd pool train` wrote, with a foreign teacher."""
    from jdkd.cli import main

    folder = tmp_path_factory.mktemp("pools") / "pool"
    assert main([*map(str, pool_arguments), "--teacher", str(foreign), "--out", str(folder)]) == 0
    return folder


def test_a_pool_is_trained_and_says_what_its_members_score(pool, trained, foreign):
    facts = json.loads((pool / "pool.json").read_text())
    assert [next(iter(member)) for member in facts["members"]].count("foreign") == 1 and len(facts["members"]) == 3
    assert {"foreign": "retina"}.items() <= next(m for m in facts["members"] if "foreign" in m).items()
    assert facts["steps"] == 8  # 2 steps of one pass, 2 of three
    assert json.loads((pool / "run.json").read_text())["finished"]
    assert not (pool / "training").exists()
    assert (pool / "foreign" / "retina" / "weights.safetensors").read_bytes() == (
        foreign / "weights.safetensors"
    ).read_bytes()
    sizes = [sum(p.numel() for p in load(folder).parameters()) for folder in (pool, trained)]
    assert sizes[0] > sizes[1], "the pool's folder is the largest network"


def test_the_spread_of_a_pool_is_measured_on_the_data_that_it_recorded(jdkd, pool, tmp_path):
    answer = jdkd("pool", "eval", pool, "--subnets", 3, "--rounds", 2, "--count", 1, "--out", tmp_path / "spread")
    assert answer.code == 0, answer.err
    content = json.loads((tmp_path / "spread" / "spread.json").read_text())
    rows = content["teachers"]
    assert len(rows) == 4 and (content["images"], content["split"]) == (4, "val")
    assert [row["map"] for row in rows] == sorted((row["map"] for row in rows), reverse=True)
    assert len({row["parameters"] for row in rows}) == 4
    for row in rows:
        low, high = row["latency_interval"]
        assert row["latency_ms"] > 0 and low <= row["latency_ratio"] <= high
    assert "retina (foreign)" in answer.out and "1x1 1x1 1x1" not in answer.out.split("retina")[0][:20]
    assert (tmp_path / "spread" / "spread.png").read_bytes().startswith(b"\x89PNG")
    assert "distance" not in rows[0]
    named = [row["name"] for row in rows if "subnet" in row["teacher"]]
    assert all(name in answer.out for name in named)


@pytest.mark.parametrize("name", ["smallest", "retina"])
def test_a_member_is_exported_as_a_detector_that_eval_opens(jdkd, pool, squares, tmp_path, name):
    answer = jdkd("pool", "export", pool, "--subnet", name, "--out", tmp_path / "one")
    assert answer.code == 0, answer.err
    facts = json.loads((pool / "pool.json").read_text())["members"]
    key = {"retina": "foreign", "smallest": "subnet"}[name]
    known = min((m for m in facts if key in m), key=lambda m: m["parameters"])
    assert sum(p.numel() for p in load(tmp_path / "one").parameters()) == known["parameters"]
    scored = jdkd("eval", tmp_path / "one", "--data", squares, "--json", tmp_path / "eval.json", "--batch-size", 2)
    assert scored.code == 0, scored.err
    assert json.loads((tmp_path / "eval.json").read_text())["map"] == pytest.approx(known["map"], abs=1e-6)


def test_a_subnet_is_exported_by_the_name_that_the_table_gives_it(jdkd, pool, tmp_path):
    facts = json.loads((pool / "pool.json").read_text())
    depths, widths = [choices[0] for choices in facts["space"]["depths"]], facts["space"]["widths"]
    middle = " ".join(f"{depth}x{widths[1]:.2g}" for depth in depths)
    assert jdkd("pool", "export", pool, "--subnet", middle, "--out", tmp_path / "one").code == 0
    small, large = (sum(p.numel() for p in load(folder).parameters()) for folder in (tmp_path / "one", pool))
    assert small < large


def test_a_finished_pool_is_only_read_and_another_plan_is_refused(jdkd, pool, pool_arguments, foreign, tmp_path):
    before = (pool / "pool.json").read_bytes()
    same = [*pool_arguments, "--teacher", foreign, "--out", pool]
    assert jdkd(*same, "--resume").code == 0 and (pool / "pool.json").read_bytes() == before
    answer = jdkd(*same)
    assert answer.code == 2 and "already holds a run (finished `jdkd pool train`" in answer.err
    answer = jdkd(*same, "--resume", "--extra-depth", 0)
    assert answer.code == 2 and "space.depths was" in answer.err
    other = tmp_path / "other.json"
    other.write_text(json.dumps([{**PHASES[0], "share": 1.0}]))
    answer = jdkd(*same, "--resume", "--phases", other)
    assert answer.code == 2 and "phases.full" in answer.err
    other.write_text(json.dumps(PHASES[::-1]))
    answer = jdkd(*same, "--resume", "--phases", other)
    assert answer.code == 2 and 'other settings: phase_order was ["largest", ' in answer.err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{}", "holds no list of phases"),
        ("[]", "holds no phase"),
        ("[3]", "holds no list of phases"),
        (json.dumps([{**PHASES[0], "depth": 2}]), "phase 1 of .* has the unknown field 'depth'"),
        (json.dumps([{"name": "a", "share": 1}]), "phase 1 of .* has no top_fraction"),
        (json.dumps([PHASES[0]]), "shares that are 0.25 together"),
        (json.dumps([{**PHASES[0], "share": "1"}]), "phase largest has share '1'; give a number above 0"),
        (json.dumps([{**PHASES[0], "subnets": 1.5}]), "phase largest has subnets 1.5; give a whole number"),
        (json.dumps([{**PHASES[0], "sandwich": 1}]), "phase largest has sandwich 1; give true or false"),
        (json.dumps([{**PHASES[0], "name": "../out"}]), r"a phase is named '\.\./out'"),
        (json.dumps([{**PHASES[0], "share": 0.5}] * 2), "a name of its own"),
        ("[", "is not JSON"),
    ],
)
def test_phases_that_make_no_training_are_refused_in_one_sentence(tmp_path, content, says):
    from jdkd.errors import InputError
    from jdkd.pool import read_phases

    file = tmp_path / "phases.json"
    file.write_text(content)
    with pytest.raises(InputError, match=says):
        read_phases(file)


def test_what_cannot_be_a_pool_is_refused_before_anything_is_written(jdkd, pool_arguments, trained, foreign, tmp_path):
    out = tmp_path / "out"
    for flags, says in (
        (["--subnets", 0], "--subnets is 0; score at least 1"),
        (["--teacher", tmp_path / "none"], "none"),
        (["--teacher", trained], "a foreign teacher base is named as what the search starts from"),
        (["--teacher", foreign, foreign], "the pool has a foreign teacher retina already"),
        (["--width", 0.5], "a pool is grown"),
        (["--width", "nan"], "width in 1..100 and the number of widths at least 1, got 1, nan and 3."),
        (["--width", "inf"], "got 1, inf and 3."),
        (["--steps", 0], "--steps is 0; give at least 4, a step of every phase."),
        (["--steps", 3], "--steps is 3; give at least 4"),
        (["--phases", tmp_path / "none.json"], "none.json cannot be read"),
        (["--steps", -1], "steps must be a number of at least 0"),
        (["--data", tmp_path], "does not exist"),
    ):
        answer = jdkd(*pool_arguments, *flags, "--out", out)
        assert answer.code == 2 and says in answer.err and "Traceback" not in answer.err, (flags, answer.err)
        assert not out.exists()


def test_a_teacher_of_other_classes_is_refused_by_name(jdkd, pool_arguments, trained, squares, tmp_path):
    from jdkd.detect import save
    from jdkd.rewrite import describe

    other = load(trained)
    known = other.architecture
    other.architecture = describe(other, known.builder, known.arguments, classes=("blue", "red"))
    save(tmp_path / "other", other)
    answer = jdkd(*pool_arguments, "--teacher", tmp_path / "other", "--out", tmp_path / "out")
    assert answer.code == 2 and "teacher other knows the classes blue, red (2) and the pool " in answer.err
    assert "(2) in another order" in answer.err
    assert "class 1 is 'blue' in the first and 'red' in the second" in answer.err
    assert not (tmp_path / "out").exists()


def test_what_is_asked_of_a_pool_and_is_not_there_is_refused(jdkd, pool, trained, tmp_path):
    out = ["--out", tmp_path / "out"]
    for command, says in (
        (["export", pool, "--subnet", "1x1 1x1"], "2 depths and 2 widths for"),
        (["export", pool, "--subnet", "nothing"], "'nothing' names no subnet; give largest, smallest, best"),
        (["export", pool, "--subnet", "9x1"], "does not fit its supernet"),
        (["export", trained, "--subnet", "largest"], "holds no finished teacher pool"),
        (["export", pool, "--data", tmp_path], "does not exist"),
        (["eval", pool, "--subnets", 0], "--subnets is 0"),
        (["eval", tmp_path / "no"], "holds no finished teacher pool"),
    ):
        answer = jdkd("pool", *command, *out)
        assert answer.code == 2 and says in answer.err and "Traceback" not in answer.err, (command, answer.err)
        assert not (tmp_path / "out").exists()
    answer = jdkd("pool", "export", pool)
    assert answer.code == 2 and "--out is missing" in answer.err


@pytest.mark.parametrize(("name", "says"), [("spread.json", "it holds something else"), ("spread.png", "write over")])
def test_a_spread_is_written_over_nothing_else(jdkd, tmp_path, name, says):
    (tmp_path / name).write_text("mine")
    answer = jdkd("pool", "eval", tmp_path / "no", "--out", tmp_path)
    assert answer.code == 2 and says in answer.err and name in answer.err, answer.err
    assert [file.read_text() for file in tmp_path.iterdir()] == ["mine"]


def test_the_pool_of_a_detector_with_masks_knows_its_training_images(digits, tmp_path, monkeypatch, recwarn):
    train, _ = digits
    model = mask_detector(classes=train.classes)
    model.architecture = Architecture("my.nets:make", {}, classes=train.classes)
    pool = SimpleNamespace(supernet=SimpleNamespace(model=model), trained_on=train.with_masks().fingerprint)
    monkeypatch.setattr("jdkd.pool.load_pool", lambda *given, **how: pool)
    (tmp_path / "pool.json").touch()
    source = DataFlags(train_images=train.split.images, train_annotations=train.split.annotations)
    assert _loaded(tmp_path, source, "cpu", Progress()) is pool and not recwarn.list
    pool.trained_on = "others"
    content = json.loads(train.split.annotations.read_text())
    for box in content["annotations"]:
        del box["segmentation"]
    (tmp_path / "plain.json").write_text(json.dumps(content))
    for other in (source, replace(source, train_annotations=tmp_path / "plain.json")):
        with pytest.warns(Notice, match="was trained on other images than"):
            assert _loaded(tmp_path, other, "cpu", Progress()) is pool, "norms need no masks"


@pytest.mark.parametrize("flags", [(), ("val",), ("train", "val")])
def test_a_split_that_no_flag_names_is_the_one_that_the_pool_recorded(squares, tmp_path, flags):
    there, here = resolve_splits(squares), {}
    RunFolder(tmp_path / "pool").begin("pool train", {}, **record_of(there, "cpu"))
    for name in flags:
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.json").touch()
        here |= {f"{name}_images": tmp_path / name, f"{name}_annotations": tmp_path / f"{name}.json"}
    for split in there:
        found = _split(tmp_path / "pool", DataFlags(**here), split.name)
        assert found.images == (tmp_path / split.name if split.name in flags else split.images)
