"""A ladder of students is cut to shares of a base's arithmetic, and what is timed of it is timed once."""

import json

import pytest
import torch
from PIL import Image

from benchmarks import latency, record
from benchmarks.ladder import NEAR, Ladder, fresh
from jdkd.data import write_digit_scenes
from jdkd.errors import InputError
from jdkd.latency import profile_cost
from tests.detectors import Stage, detector, small_spec

SIZE = (64, 64)
QUICKEST = {"rounds": 1, "seconds": 0, "warmup_seconds": 0}
WORDS = ["--model", "base", "--size", "64", "64", "--rungs", "0.7", "0.4", "--device", "cpu"]
WORDS += ["--rounds", "1", "--seconds", "0", "--warmup-seconds", "0"]


def base():
    """Wide enough that a step of 8 channels is little of it."""
    stages = tuple(Stage(width, ((width,),)) for width in (32, 64, 96, 128))
    return detector(small_spec(stages=stages, stem=32, fpn=64, box_head=64))


@pytest.fixture(scope="module")
def ladder():
    return Ladder("base", base(), SIZE)


def test_students_have_their_share_of_the_arithmetic(ladder):
    first, *students = ladder
    whole = profile_cost(ladder[first], SIZE).gmacs
    assert students == [f"base cut to 0.{share}" for share in (9, 8, 7, 6, 5, 4, 3)]
    for name, share in zip(students, (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3), strict=True):
        assert profile_cost(ladder[name], SIZE).gmacs / whole == pytest.approx(share, abs=NEAR)


def test_all_groups_are_cut_alike(ladder):
    keep, groups = ladder.cut(0.4).keep, {group.name: group for group in ladder._topology.groups}
    large = {name: group for name, group in groups.items() if group.size >= 64}
    shares = [len(keep[name]) / group.units for name, group in large.items()]
    assert len(shares) > 5 and max(shares) - min(shares) < 0.15
    assert all(tuple(units) == tuple(range(len(units))) for units in keep.values())


def test_a_base_has_the_same_weights_every_time():
    first, second = (fresh("ssdlite320_mobilenet_v3_large", (96, 96)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert first.transform.min_size == (96,) and not first.training


def test_names_of_committed_rows_are_those_of_detectors():
    made = fresh("faster_rcnn_r18_fpn", SIZE).architecture.arguments
    assert (made["family"], made["backbone"], made["min_size"], made["norm"]) == ("fasterrcnn", "resnet18", 64, None)


def test_what_cannot_be_a_ladder_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--rungs has 1\.2; give shares of the base's arithmetic between 0 and 1"):
        Ladder("base", base(), SIZE, [0.5, 1.2])
    with pytest.raises(InputError, match="may have trained weights, and a ladder has random ones; give --detectors"):
        fresh(str(tmp_path), SIZE)
    with pytest.raises(
        InputError, match=r"no cut of all channels leaves 0\.01 of the arithmetic: 0\.\d+ is the nearest"
    ):
        Ladder("base", base(), SIZE, [0.01])["base cut to 0.01"]


# What is left to time


@pytest.fixture
def names():
    return dict.fromkeys(("base", "a", "b", "c"))


def test_students_take_turns_together_and_what_is_exported_runs_in_all_modes_at_once(names):
    grid = latency.grid_of(runtimes=("eager", "onnxruntime"), **QUICKEST)
    assert [str(turn) for turn in latency.turns(names, grid, together=2)] == [
        "eager float32, batch 1, end_to_end: a, b",
        "eager float32, batch 1, model_only: a, b",
        "onnxruntime float32, batch 1, end_to_end and model_only: a, b",
        "eager float32, batch 1, end_to_end: c",
        "eager float32, batch 1, model_only: c",
        "onnxruntime float32, batch 1, end_to_end and model_only: c",
    ]
    (alone,) = latency.turns({"base": None}, latency.grid_of(modes=("model_only",)))
    assert alone.students == () and str(alone).endswith(": base")
    with pytest.raises(InputError, match="--together is 0"):
        latency.turns(names, grid, together=0)


def test_what_is_done_is_not_left(names):
    def done(cell, first, name):
        return name == "c" or (first == "base" and cell.modes == ("end_to_end",))

    left = latency.turns(names, latency.grid_of(**QUICKEST), together=3, done=done)
    assert [(turn.students, turn.grid.modes) for turn in left] == [(("a", "b"), ("model_only",))]


def test_few_long_rounds_are_warm_after_two_that_agree():
    assert latency.grid_of(rounds=4).schedule.window == 1 and latency.grid_of().schedule.window == 10


CLEAN = {"version": "0", "commit": "0" * 40, "dirty": False}
NAMES = ("base", "base cut to 0.7", "base cut to 0.4")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Measures stand-ins for a ladder into a file: what was printed, and the rows that came to it."""
    stems = dict(zip(NAMES, (32, 16, 8), strict=True))
    monkeypatch.setattr(latency, "fresh", lambda name, size: detector(small_spec()))
    monkeypatch.setattr(
        latency, "Ladder", lambda *given: {name: detector(small_spec(stem=stem)) for name, stem in stems.items()}
    )
    monkeypatch.setattr(latency, "sources", lambda: CLEAN)
    monkeypatch.setattr("jdkd.latency.protocol.sources", lambda: CLEAN)
    file = tmp_path / "latency.jsonl"

    def again(*words):
        before = len(record.load([file])) if file.exists() else 0
        latency.main([*WORDS, "--out", str(file), *words])
        return capsys.readouterr().out, record.load([file])[before:]

    again.file = file
    return again


def test_a_ladder_is_measured_once_and_what_was_lost_again(run):
    printed, rows = run("--modes", "model_only")
    assert [row["model"] for row in rows] == [*NAMES]
    assert "left to time, 1:\n  eager float32, batch 1, model_only: base cut to 0.7, base cut to 0.4" in printed
    shares = [row["macs_of_base"] for row in rows]
    assert (
        shares[0] == 1 and shares == sorted(shares, reverse=True) and shares[2] == rows[2]["gmacs"] / rows[0]["gmacs"]
    )
    assert all(row["weights"] == "random" and row["note"].startswith("random weights: what NMS") for row in rows)
    assert all(row["size"] == [64, 64] and row["images"] == "noise" and row["device"] for row in rows)

    run.file.write_text(of(rows[:2]))  # killed before the last was written
    printed, rows = run("--modes", "model_only")
    assert [row["model"] for row in rows] == ["base", "base cut to 0.4"]
    printed, rows = run("--modes", "model_only")
    assert not rows and "left to time, 0:" in printed


def of(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_rows_of_anything_else_do_not_count(run, monkeypatch):
    _, rows = run("--modes", "model_only")
    monkeypatch.setattr(latency, "_timed", lambda commit: commit)
    asked = latency.grid_of(modes=("model_only",), **QUICKEST)

    def kept(name="base cut to 0.4", grid=asked, images=None):
        return latency.kept_in(run.file, SIZE, "cpu", images or latency.noise(SIZE))(grid, "base", name)

    assert kept() and not kept("base cut to 0.3") and not kept(images=[torch.zeros(3, *SIZE)])
    for other in ({"modes": ("end_to_end",)}, {"rounds": 2}, {"batch_sizes": (2,)}, {"processes": 3}):
        assert not kept(grid=latency.grid_of(**({"modes": ("model_only",)} | QUICKEST | other))), other
    changed = {"commit": "other", "environment": {"threads": 99}, "size": [64, 96], "sources": "other"}
    for name, value in (changed | {"weights": "trained", "runtime": "onnxruntime", "dtype": "float16"}).items():
        run.file.write_text(of(row | {name: value} for row in rows))
        assert not kept(), name
    run.file.write_text(of(rows))
    monkeypatch.setattr(latency, "sources", lambda: CLEAN | {"dirty": True})
    assert not kept(), "as nobody knows which sources these are"
    monkeypatch.setattr(latency, "sources", lambda: CLEAN)
    run.file.write_text(of(row | {"protocol": row["protocol"] | {"sources": {"dirty": True}}} for row in rows))
    assert not kept(), "nor which those were"


def test_a_commit_is_told_by_the_sources_that_matter():
    here = latency._timed("HEAD")
    assert here is None or [len(line) for line in here.split()] == [40, 40]
    assert latency._timed("no commit") is None


def test_an_unknown_runtime_is_refused_before_anything_is_built(run):
    with pytest.raises(InputError, match="the runtime is other; known are eager"):
        run("--runtimes", "other")


def test_only_the_detectors_of_a_turn_are_made():
    asked = []

    class Asked(dict):
        def __getitem__(self, name):
            asked.append(name)
            return super().__getitem__(name)

    models = Asked({name: detector(small_spec()) for name in NAMES})
    grid = latency.grid_of(modes=("model_only",), **QUICKEST)
    found = latency.measured(models, latency.turns(models, grid), SIZE, "cpu", "random")
    next(found)
    assert asked == ["base", "base cut to 0.7"]
    assert [row["model"] for row in next(found)] == ["base", "base cut to 0.4"]
    assert asked == [*NAMES]


@pytest.mark.slow
@pytest.mark.usefixtures("when_asked")
@pytest.mark.parametrize(
    "name", ["faster_rcnn_r101_fpn", "faster_rcnn_r50_fpn", "retinanet_resnet50_fpn", "fcos_resnet50_fpn"]
)
def test_ladders_of_the_page_hit_their_rungs(name):
    size = (128, 208)
    models = Ladder(name, fresh(name, size), size)
    whole = profile_cost(models[name], size).gmacs
    for student, share in list(models._shares.items())[1:]:
        assert profile_cost(models[student], size).gmacs / whole == pytest.approx(share, abs=NEAR)


def test_trained_detectors_are_scored_as_they_are_timed(tmp_path):
    data = tmp_path / "data"
    write_digit_scenes(data, train=1, val=2, size=64, one_class=True)
    model = detector(small_spec(classes=("digit",)))
    with pytest.raises(InputError, match="and the dataset has 1; "):
        latency.scoring(data, {"base": model, "student": detector(small_spec())}, "cpu")
    grid = latency.grid_of(modes=("model_only",), **QUICKEST)
    score = latency.scoring(data, {"base": model}, "cpu")
    (rows,) = latency.measured({"base": model}, latency.turns({"base": model}, grid), SIZE, "cpu", "trained", (), score)
    assert [row["facts"]["map"] for row in rows] == [score(model.eval())]
    with pytest.raises(InputError, match="--data scores trained detectors"):
        latency.main(["--data", str(data)])


def test_arithmetic_of_trained_detectors_is_counted_of_the_images_that_are_given(tmp_path, monkeypatch):
    Image.new("RGB", (64, 48)).save(tmp_path / "photograph.png")
    seen = []
    monkeypatch.setattr(record, "require_published", lambda *given: None)
    for name in ("require_runnable", "trained"):
        monkeypatch.setattr(latency, name, lambda *given: {})
    monkeypatch.setattr(latency, "turns", lambda *given: [])
    monkeypatch.setattr(latency, "measured", lambda models, left, size, *rest: seen.append(size) or [])
    words = ["--images", str(tmp_path / "photograph.png"), "--device", "cpu", "--out", str(tmp_path / "rows.jsonl")]
    latency.main(["--detectors", "base", *words])
    assert seen == [(48, 64)]
