"""The settings: what they refuse, and the learning rate they give."""

import dataclasses
import itertools
import json
import math

import pytest

from jdkd.errors import InputError
from jdkd.train import TrainConfig


def test_goes_to_json_and_back():
    config = TrainConfig(steps=7, lr=3e-4, cycle_start=2, cycle_steps=20)
    assert TrainConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


def test_the_rate_rises_linearly_then_falls_as_a_cosine():
    config = TrainConfig(steps=100, lr=1.0, warmup=0.1, lr_end=0.01)
    rates = [config.lr_at(step) for step in range(100)]
    rises = [after - before for before, after in itertools.pairwise(rates[:11])]
    assert rises == pytest.approx([1 / 11] * 10)
    assert rates[10] == 1.0 == max(rates)
    assert rates[99] == pytest.approx(0.01)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    middle = config.lr_at(10 + 89 // 2)
    assert middle == pytest.approx(0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * 44 / 89)))


def test_trainings_of_one_lineage_can_share_a_cycle():
    whole = TrainConfig(steps=30, lr=1.0)
    parts = [TrainConfig(steps=10, lr=1.0, cycle_start=start, cycle_steps=30) for start in (0, 10, 20)]
    assert [part.lr_at(step) for part in parts for step in range(10)] == [whole.lr_at(s) for s in range(30)]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_very_short_cycles_have_positive_finite_rates(steps):
    config = TrainConfig(steps=steps, lr=1.0, warmup=0.5)
    assert all(0 < config.lr_at(step) <= 1 for step in range(steps))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("steps", -1),
        ("steps", 2.5),
        ("lr", float("nan")),
        ("batch_size", 0),
        ("batch_size", 2.0),
        ("flip", 1.5),
        ("amp", "fp8"),
        ("optimizer", "lion"),
    ],
)
def test_names_the_setting_and_the_value_it_refuses(setting, value):
    with pytest.raises(InputError, match=rf"^{setting} .*{value}"):
        TrainConfig(**{"steps": 10, setting: value})


def test_refuses_to_run_past_the_end_of_a_cycle():
    with pytest.raises(InputError, match="cycle_steps is 20, but steps 15 to 25"):
        TrainConfig(steps=10, cycle_start=15, cycle_steps=20)
