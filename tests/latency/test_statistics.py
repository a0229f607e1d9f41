import math

import pytest
import torch

from jdkd.errors import InputError
from jdkd.latency import Latency, Ratio, bootstrap_ratio
from jdkd.latency.protocol import LEAST_ROUNDS
from jdkd.latency.statistics import kendall, medians, ratio_over_processes


def _drifting(rounds, factor, noise, seed):
    """Samples of two models on a machine that slows down threefold while they are timed."""
    generator = torch.Generator().manual_seed(seed)
    base, model = [], []
    for index in range(rounds):
        load = 10 * (1 + 2 * index / rounds)
        for times, scale in ((base, 1.0), (model, factor)):
            jitter = 1 + noise * torch.randn(2, generator=generator)
            times += (load * scale * jitter).tolist()
    return model, base


def test_percentiles_of_known_samples():
    latency = Latency(tuple(float(value) for value in range(101)))
    assert (latency.p50, latency.p90, latency.p99, latency.iqr, latency.n) == (50, 90, 99, 50, 101)
    assert Latency.from_json(latency.to_json()) == latency


def test_ratio_of_a_machine_that_drifts():
    ratio = bootstrap_ratio(*_drifting(100, 0.5, 0.02, seed=0))
    assert ratio.low <= ratio.value <= ratio.high
    assert ratio.value == pytest.approx(0.5, rel=0.02)
    assert ratio.high - ratio.low < 0.05  # the threefold drift, shared by both, does not widen it


def test_interval_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for seed in range(100):
        ratio = bootstrap_ratio(*_drifting(30, 0.8, 0.05, seed=seed), resamples=300)
        covered += ratio.low <= 0.8 <= ratio.high
    assert covered >= 88


def test_the_least_rounds_of_a_measurement_are_enough_for_an_interval_that_covers():
    covered = 0
    for seed in range(300):
        jitter = 1 + 0.05 * torch.randn(2, 2 * LEAST_ROUNDS, generator=torch.Generator().manual_seed(seed))
        covered += bootstrap_ratio(*jitter.tolist(), resamples=300).spans_one
    assert covered >= 0.9 * 300  # of 5 rounds it is 0.83


def test_an_interval_of_medians_is_that_of_the_order_statistics_of_whole_rounds():
    """Of 25 rounds, k are below the k-th, so a draw's median is at most that where 13 of 25 draws are among them."""
    below = [sum(math.comb(25, n) * (k / 25) ** n * (1 - k / 25) ** (25 - n) for n in range(13, 26)) for k in range(26)]
    low = next(k for k in range(26) if below[k] >= 0.025)
    rounds = [float(k) for k in range(1, 26) for _ in range(2)]  # both samples of a round are alike
    ratio = bootstrap_ratio(rounds, [1.0] * 50, resamples=20_000)
    assert (ratio.low, ratio.value, ratio.high) == (low, 13, 26 - low) == (8, 13, 18)


def test_equal_samples_give_equal_intervals_and_more_rounds_narrower_ones():
    few, many = (_drifting(rounds, 0.8, 0.1, seed=1) for rounds in (20, 500))
    assert bootstrap_ratio(*few) == bootstrap_ratio(*few)
    widths = [ratio.high - ratio.low for ratio in (bootstrap_ratio(*few), bootstrap_ratio(*many))]
    assert widths[1] < widths[0] / 2


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_medians_are_quantiles_bit_for_bit(count):
    samples = torch.rand(2, 50, count, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    assert torch.equal(medians(samples), samples.quantile(0.5, dim=2))


def test_long_runs_fit_in_memory():
    ratio = bootstrap_ratio([1.0, 3.0] * 10_000, [2.0, 2.0] * 10_000, resamples=100)
    assert ratio.value == 1.0


@pytest.mark.parametrize(("model", "base"), [([], []), ([1.0, 2.0], [1.0]), ([1.0], [1.0])])
def test_refuses_samples_that_are_not_the_same_rounds(model, base):
    with pytest.raises(ValueError, match="rounds of 2"):
        bootstrap_ratio(model, base)


def test_an_interval_over_processes_is_students():
    ratio = ratio_over_processes([0.9, 1.0, 1.1])
    assert ratio.value == pytest.approx(0.9966, abs=1e-4)  # the geometric mean
    assert ratio.interval == pytest.approx((0.7763, 1.2795), abs=1e-3)  # of the logarithms, t = 4.303
    assert ratio_over_processes([0.9, 1.0, 1.1], level=0.99).low < ratio.low
    with pytest.raises(InputError, match="at least 2 of them, got 1"):
        ratio_over_processes([0.9])


def test_a_higher_level_gives_a_wider_interval():
    samples = _drifting(50, 0.99, 0.1, seed=3)
    ordinary, careful = (bootstrap_ratio(*samples, level=level) for level in (0.95, 0.99))
    assert careful.low < ordinary.low < ordinary.high < careful.high and careful.level == 0.99


def test_an_interval_spans_one_at_its_ends_too():
    assert (
        Ratio(0.9, 0.8, 1.0).spans_one and not Ratio(0.9, 0.8, 0.99).spans_one and not Ratio(1.1, 1.01, 1.2).spans_one
    )


def test_kendalls_tau_is_1_of_one_order_and_less_by_two_thirds_of_a_swap_in_three():
    assert kendall([(1, 10), (2, 20), (3, 30)]) == 1 and kendall([(1, 3), (2, 2), (3, 1)]) == -1
    assert kendall([(1, 10), (2, 30), (3, 20)]) == pytest.approx(1 / 3) and math.isnan(kendall([(1, 1)]))
    assert kendall([(1, 10), (1, 20), (2, 30)]) == pytest.approx(2 / 3), "a tie neither agrees nor disagrees"
