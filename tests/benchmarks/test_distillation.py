"""Rows of distillation and of the swap: whom a way is compared with, and by how much it is ahead."""

import json
from types import SimpleNamespace

import pytest

from benchmarks import distillation

MAPS = {"none": 0.2, "pkd": 0.3, "none_inherit": 0.4, "pkd_inherit": 0.5}


class Bench:
    """Students that are finished: mAP depends on the loss and the seed alone."""

    name, steps = "digit_scenes", 800

    def __init__(self, folder):
        self.folder, self.asked = folder, []
        (folder / "teacher-fasterrcnn").mkdir()
        (folder / "teacher-fasterrcnn" / "scores.json").write_text(json.dumps({"map": 0.6}))

    def student(self, teacher, family, loss, seed, weight="auto"):
        self.asked.append((teacher, family, loss, seed))
        curve = [{"step": 400 * part, "map": part / 2 * (MAPS[loss] + seed / 100)} for part in (1, 2)]
        return {"curve": curve, "found": (loss, seed)}

    def swapped(self, teacher, family, loss, seed):
        self.asked.append((teacher, family, loss, seed))
        return loss, seed

    def judged(self, found):
        loss, seed = found
        return SimpleNamespace(count=5, map=lambda times=None: MAPS[loss] + seed / 100)


def test_a_taught_student_is_compared_with_the_same_one_alone_seed_by_seed(tmp_path):
    bench = Bench(tmp_path)
    ways = [("nobody", "fcos", "none", "auto"), ("fasterrcnn", "fcos", "pkd", 2.0)]
    alone, taught = distillation.rows(bench, ways, (0, 1))
    assert alone["maps"] == pytest.approx([0.2, 0.21]) and "gain" not in alone and "teacher_map" not in alone
    assert (taught["weight"], taught["teacher_map"]) == (2.0, 0.6) and taught["maps"] == pytest.approx([0.3, 0.31])
    assert taught["curves"] == [pytest.approx([0.15, 0.3]), pytest.approx([0.155, 0.31])]
    assert [taught["gain"], *taught["gain_interval"]] == pytest.approx([0.1] * 3), "neither seeds nor images differ"


def test_what_inherits_and_is_taught_is_compared_with_what_inherits(tmp_path):
    bench = Bench(tmp_path)
    ways = [("fasterrcnn", "fcos", loss, "auto") for loss in distillation.INHERITED]
    inherits, both = distillation.rows(bench, ways, (0, 1))
    assert (inherits["gain"], both["gain"]) == (pytest.approx(0.2), pytest.approx(0.1))
    assert ("nobody", "fcos", "none", 0) in bench.asked and both["steps"] == 800


@pytest.mark.parametrize(
    ("loss", "taught"),
    [
        *(("none", []), ("pkd", ["pkd"] * 4), ("mse", ["mse"] * 4), ("pkd_half", ["pkd"] * 2)),
        *(("pkd_linear", ["pkd"] * 4), ("none_inherit", []), ("pkd_inherit", ["pkd"] * 4)),
    ],
)
def test_who_is_taught_in_which_quarter(loss, taught, tmp_path, monkeypatch):
    trained, took = [], []
    monkeypatch.setattr(distillation, "take_neck_and_heads", lambda own, teacher: took.append(own))
    taught_by = lambda own, who, data, part, method, **how: trained.append(method.loss)  # noqa: E731
    monkeypatch.setattr(distillation, "distill", taught_by)
    monkeypatch.setattr(distillation, "fit", lambda *given, **how: trained.append("none"))
    bench = distillation.Bench.__new__(distillation.Bench)
    bench.folder, bench.train, bench.training, bench.steps = tmp_path, None, distillation.TRAINING, 800
    (tmp_path / f"fcos-fcos-{loss}-0").mkdir()
    monkeypatch.setattr(bench, "_new", lambda *given: None)
    monkeypatch.setattr(bench, "teacher", lambda family: None)
    monkeypatch.setattr(bench, "_judged", lambda own: ([], SimpleNamespace(map=lambda: 0.5)))
    assert [point["step"] for point in bench.student("fcos", "fcos", loss, 0)["curve"]] == [200, 400, 600, 800]
    assert trained == taught + ["none"] * (4 - len(taught)) and len(took) == (loss in distillation.INHERITED)


def test_channels_are_brought_together_where_that_is_asked_for():
    ways = {loss: distillation.method_of(loss, 2.0) for loss in ("pkd", "cwd", "pkd_half", *distillation.ALIGNED)}
    assert [(way.loss, way.align) for way in ways.values()] == [
        ("pkd", "none"), ("cwd", "none"), ("pkd", "none"), ("pkd", "permute"), ("pkd", "linear")
    ]  # fmt: skip
    assert {way.loss_weight for way in ways.values()} == {2.0}


def test_a_swap_is_of_the_taught_and_the_untaught_under_one_other_head(tmp_path):
    bench = Bench(tmp_path)
    alone, taught = distillation.swap_rows(bench, [("fasterrcnn", "fcos")], (0, 1))
    assert bench.asked == [("nobody", "fcos", "none", 0), ("nobody", "fcos", "none", 1)] + [
        ("fasterrcnn", "fcos", "pkd", seed) for seed in (0, 1)
    ]
    assert alone["head"] == taught["head"] == "retinanet_v2" and alone["op"] == "distillation_swap"
    assert "gain" not in alone and taught["gain"] == pytest.approx(0.1) and taught["maps"] == pytest.approx([0.3, 0.31])
    assert {student for _, student in distillation.PAIRS} <= distillation.OTHER_HEAD.keys()
