"""How a budget of training steps is spent."""

from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import pytest

from jdkd.data import Split
from jdkd.errors import InputError
from jdkd.search import Method, SearchConfig, plan
from jdkd.search.budget import EXPLORING_SHARE, HALVING_SHARE, LEAST_POOL, MARGIN, MOST_CUT, ROOM, steps_of

SPLIT = Split(Path("images"), Path("boxes.json"))
CONFIG = SearchConfig(Path("base"), SPLIT, SPLIT, Path("out"))


def aims(config, steps=10_000) -> list[float]:
    return [rung.aims[0] for rung in plan(config, steps).rungs if rung.explores]


def test_the_budget_goes_to_the_pool_to_many_short_and_to_few_long_trainings():
    budget = plan(CONFIG, 10_000)
    assert budget.pool == 1200 and 9900 <= budget.total <= 10_000
    exploring = [rung for rung in budget.rungs if rung.explores]
    halving, trial, last = [rung for rung in budget.rungs if not rung.explores]
    assert [rung.candidates for rung in (*exploring, halving, trial, last)] == [3, 3, 2, 2, 1]
    assert [rung.alone for rung in (*exploring, halving, trial, last)] == [False, False, False, True, True]
    assert trial.trial and trial.steps == last.steps > 2 * max(halving.steps, exploring[0].steps)
    assert sum(rung.cost for rung in exploring) == pytest.approx(EXPLORING_SHARE * 8800, rel=0.01)
    assert budget.lineage == sum(rung.steps for rung in budget.rungs) > budget.total / 2, "most goes to who ships"
    assert str(budget.total) in str(budget) and "11 candidates in 5 generations" in str(budget)


def test_where_the_teacher_is_settled_none_is_tried():
    for teaching in ("base", "none", "fixed"):
        one, two = plan(replace(CONFIG, method=Method(teaching=teaching)), 10_000).rungs[-2:]
        assert one == two and one.candidates == 1 and one.alone and not one.trial


def test_no_generation_leaves_less_than_a_share_and_the_last_leaves_a_little_to_cut():
    for target in (1.0, 0.97, 0.75, 0.53, 0.35, 0.1):
        path = [1.0, *aims(replace(CONFIG, targets=(target,)))]
        assert path[-1] == pytest.approx(min(ROOM * target, MARGIN))
        steps = [after / before for before, after in pairwise(path)]
        assert all(MOST_CUT - 1e-9 <= step < 1 for step in steps)
        assert max(steps) == pytest.approx(min(steps)), "all are as large"
    whole = replace(CONFIG, targets=(0.8, 0.8 * MOST_CUT))
    assert len(aims(whole)) == 2, "a cut by just as much takes no generation more, however it is rounded"


def test_a_large_cut_in_one_goes_to_the_target_at_once():
    at_once = replace(CONFIG, targets=(0.35,), method=Method(gradual=False))
    assert aims(at_once) == [pytest.approx(ROOM * 0.35)] and len(aims(replace(at_once, method=Method()))) == 2
    several = replace(CONFIG, targets=(0.35, 0.8), method=Method(gradual=False))
    assert aims(several) == [pytest.approx(ROOM * 0.8), pytest.approx(ROOM * 0.35)]


def test_several_targets_lie_on_one_path_and_each_is_trained_on():
    config = replace(CONFIG, targets=(0.35, 0.75, 0.53, 0.75))
    assert config.targets == (0.75, 0.53, 0.35), "each once, the slowest first"
    path = aims(config)
    assert path == sorted(path, reverse=True)
    assert {round(ROOM * target, 6) for target in config.targets} <= {round(aim, 6) for aim in path}
    budget = plan(config, 10_000)
    assert all(rung.aims == config.targets for rung in budget.rungs if not rung.explores)
    assert 9900 <= budget.total <= 10_000
    (halving,) = [rung for rung in budget.rungs if not rung.explores and not rung.alone]
    left = budget.total - budget.pool - sum(rung.cost for rung in budget.rungs if rung.explores)
    assert halving.cost == pytest.approx(halving.candidates * HALVING_SHARE * left, rel=0.02), "all targets together"
    assert aims(replace(CONFIG, targets=(0.97, 0.96))) == [MARGIN], "near to 1 one generation is for both"


@pytest.mark.parametrize("teaching", ["base", "none"])
def test_a_pool_that_nobody_asks_or_that_is_there_costs_nothing(teaching):
    assert plan(replace(CONFIG, method=Method(teaching=teaching)), 1000).pool == 0
    assert plan(replace(CONFIG, teacher_pool=Path("pool")), 1000).pool == 0


def test_a_small_pool_has_a_step_for_each_pass_of_its_phases():
    assert plan(replace(CONFIG, candidates=1), 45).pool == LEAST_POOL


def test_one_candidate_a_generation_needs_no_halving():
    budget = plan(replace(CONFIG, candidates=1), 1000)
    assert [rung.candidates for rung in budget.rungs] == [1, 1, 2, 1], "but one is trained with a teacher and without"


def test_a_budget_that_is_too_small_says_what_is_enough():
    cases = product(((0.53,), (0.9,), (0.75, 0.53, 0.35)), (1, 3, 8), ("dynamic", "none"), (None, Path("pool")))
    for targets, candidates, teaching, pool in cases:
        config = replace(CONFIG, targets=targets, candidates=candidates, teacher_pool=pool)
        config = replace(config, method=Method(teaching=teaching))
        says = r"the budget is 3 steps, too few.*give about \d+ steps or more"
        with pytest.raises(InputError, match=says) as refused:
            plan(config, 3)
        enough = int(str(refused.value).rpartition("about ")[2].split()[0])
        assert 3 < plan(config, enough).total <= enough, (targets, candidates, teaching)


def test_a_budget_that_is_too_small_says_what_is_enough_in_its_own_unit():
    with pytest.raises(InputError, match=r"the budget is 4 steps.* steps or more, \d+ epochs\."):
        plan(replace(CONFIG, epochs=2.0), 4)
    with pytest.raises(InputError, match=r"the budget is 4 steps.* steps or more, \d+ minutes\."):
        plan(replace(CONFIG, minutes=2.0), 4)


def test_steps_epochs_and_minutes_are_one_budget():
    assert steps_of(CONFIG, images=100) == 24 * 100 // 8
    assert steps_of(replace(CONFIG, epochs=2.0), images=100) == 25
    assert steps_of(replace(CONFIG, steps=77), images=100) == 77
    assert steps_of(replace(CONFIG, minutes=2.0), images=100, step_seconds=0.5) == 240


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"targets": (0.0,)}, r"targets are fractions .* in \(0, 1\], got \[0.0\]"),
        ({"targets": (0.5, 1.5)}, r"got \[0.5, 1.5\]"),
        ({"targets": (float("nan"),)}, r"got \[nan\]"),
        ({"targets": ()}, r"at least one.*got \[\]"),
        ({"target_map": 40.0}, r"target_map is an mAP and must be in \(0, 1\), got 40.0"),
        ({"steps": 9, "epochs": 1.0}, "steps and epochs are given; give the budget in one of"),
        ({"targets": (0.9, 0.8999999)}, r"some are the same in six digits; give 1 that differ, as 0\.9\."),
        ({"minutes": 0.0}, "minutes must be a number above 0, at most 1e\\+09, got 0.0"),
        ({"minutes": float("nan")}, "minutes must be a number above 0, .* got nan"),
        ({"steps": -5}, "steps must be a number above 0, .* got -5"),
        ({"epochs": float("inf")}, "epochs must be a number above 0, .* got inf"),
        ({"epochs": 1e308}, r"epochs must be .* at most 1e\+09, got 1e\+308"),
        ({"seed": 10**30}, "seed must be at most 281474976710656, got 1000"),
        ({"candidates": 0}, "candidates must be at least 1, got 0"),
        ({"proposals": 0}, "proposals must be at least 1, got 0"),
        ({"latency_rounds": 0}, "latency_rounds must be at least 1, got 0"),
        ({"latency_seconds": float("nan")}, "latency_seconds must be a number of at least 0, got nan"),
        ({"feature_weight": float("inf")}, "feature_weight must be"),
        ({"lr": -1.0}, r"lr must be a number of at least 0\.0, got -1\.0"),
        ({"seed": -1}, "seed must be a number of at least 0, got -1"),
        ({"workers": -1}, "workers must be a number of at least 0, got -1"),
        ({"loaders": -1}, "loaders must be a number of at least 0, got -1"),
        ({"workers": 2, "ray": "auto"}, "workers and ray are both given"),
        ({"amp": "int8"}, "amp must be one of"),
    ],
)
def test_a_setting_that_is_out_of_range_is_named(changes, says):
    with pytest.raises(InputError, match=says):
        replace(CONFIG, **changes)


def test_where_data_lie_is_said_from_everywhere(monkeypatch, tmp_path):
    """Workers of a cluster run in another folder, and a report is written from any."""
    monkeypatch.chdir(tmp_path)
    config = replace(CONFIG, train=SPLIT, selection=SPLIT)
    monkeypatch.chdir("/")
    for split in (config.train, config.selection):
        assert (split.images, split.annotations) == (tmp_path / "images", tmp_path / "boxes.json")


@pytest.mark.parametrize("name", ["order", "teaching", "imitation", "criterion"])
def test_a_method_that_does_not_exist_is_refused_with_those_that_do(name):
    with pytest.raises(InputError, match=f"{name} is 'magic'; give one of {getattr(Method(), name)}|, "):
        Method(**{name: "magic"})
