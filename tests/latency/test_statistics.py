import pytest
import torch

from jdkd.latency import Latency, bootstrap_ratio


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


def test_equal_samples_give_equal_intervals_and_more_rounds_narrower_ones():
    few, many = (_drifting(rounds, 0.8, 0.1, seed=1) for rounds in (20, 500))
    assert bootstrap_ratio(*few) == bootstrap_ratio(*few)
    widths = [ratio.high - ratio.low for ratio in (bootstrap_ratio(*few), bootstrap_ratio(*many))]
    assert widths[1] < widths[0] / 2


def test_long_runs_fit_in_memory():
    ratio = bootstrap_ratio([1.0, 3.0] * 10_000, [2.0, 2.0] * 10_000, resamples=100)
    assert ratio.value == 1.0


@pytest.mark.parametrize(("model", "base"), [([], []), ([1.0, 2.0], [1.0]), ([1.0], [1.0])])
def test_refuses_samples_that_are_not_the_same_rounds(model, base):
    with pytest.raises(ValueError, match="rounds of 2"):
        bootstrap_ratio(model, base)
