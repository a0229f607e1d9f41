"""Both variants of a step compute one loss, and what is said of them is read off their rows."""

from contextlib import contextmanager

import pytest
import torch

from benchmarks import distillation_cost as cost
from benchmarks.distillation_cost import ALONE, EAGER, OURS

COMMON = {"device": "Some CPU, 1 threads"}


@pytest.mark.parametrize(
    ("make", "how"),
    [(cost.training_step, {"size": (64, 64), "channels": 32}), (cost.loss_step, {"levels": ("P6", "P7"), "images": 1})],
)
def test_variants_compute_the_same_loss(make, how):
    losses = {}
    for variant in (EAGER, OURS):
        with make(variant, **how) as run:
            losses[variant] = [run() for _ in range(2)]  # the second, too: the gradients are the same
    assert losses[OURS] == pytest.approx(losses[EAGER], rel=1e-3)


def test_variants_take_turns():
    order = []
    runs = {name: lambda name=name: order.append(name) for name in (EAGER, OURS, ALONE)}
    seconds = cost.timed(runs, rounds=2)
    assert order[3 * cost.WARM_UP :] == [EAGER, OURS, ALONE, ALONE, OURS, EAGER]
    assert {name: len(own) for name, own in seconds.items()} == {EAGER: 2, OURS: 2, ALONE: 2}


def test_a_ratio_is_of_two_that_ran_in_one_round():
    seconds = {EAGER: [1.0, 2.0, 4.0], OURS: [0.5, 1.0, 3.0]}
    made = cost.rows("a step", seconds, {EAGER: 8_000_000, OURS: 2_000_000}, COMMON)
    assert [(row["variant"], row["ratio"], row["seconds"]) for row in made] == [(EAGER, 1, 2), (OURS, 0.5, 1)]
    assert made[1]["ratio_quartiles"] == [0.5, 0.625] and made[1]["rounds"] == 3
    assert made[1]["device"] == COMMON["device"]


def test_the_page_has_the_latest_of_each_variant():
    old, new = ({EAGER: [first], OURS: [0.25]} for first in (1.0, 0.5))
    kept = [row for own in (old, new) for row in cost.rows("a step", own, {EAGER: 8_000_000, OURS: 2_000_000}, COMMON)]
    assert cost.page(kept).splitlines() == [
        "Some CPU, 1 threads:",
        "",
        "| case | variant | a step (quartiles) | of eager's time (quartiles) | peak memory |",
        "| --- | --- | ---: | ---: | ---: |",
        "| a step | eager | 500 ms (500 ms to 500 ms) | 1 | 8 MB |",
        "| a step | jdkd | 250 ms (250 ms to 250 ms) | 0.500 (0.500 to 0.500) | 2 MB |",
    ]


def test_memory_is_what_a_step_takes(monkeypatch):
    """Here, as another process would cost seconds."""
    with_rows = {f"{count} MiB": (lambda variant, count=count: held(count), (EAGER,)) for count in (8, 128)}
    monkeypatch.setattr(cost, "CASES", with_rows)
    assert cost._peak_here("128 MiB", EAGER) - cost._peak_here("8 MiB", EAGER) == pytest.approx(120 * 2**20, rel=0.1)


@contextmanager
def held(mebibytes):
    yield lambda: float(torch.ones(mebibytes * 2**18).sum())
