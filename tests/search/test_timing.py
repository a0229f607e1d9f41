"""One estimator of latency: pooled by architecture, unmoved by drift."""

import random
from dataclasses import replace

import pytest
import torch

from jdkd.detect.architecture import identity
from jdkd.errors import InputError
from jdkd.latency import QUICK, REPORTED, Latency, LatencyReport, ModelLatency, percentile
from jdkd.search import search
from jdkd.search.timing import BRIEF, LONG, pooled
from tests.detectors import detector, small_spec
from tests.search.rows import timing


def noisy(rng: random.Random, rounds=20, ratio=0.6, speed=1.0):
    """A measurement under other work: now and then a call takes longer."""
    base = [speed * 10 * (1 + rng.random() * (3 if rng.random() < 0.3 else 0.05)) for _ in range(2 * rounds)]
    own = [speed * 10 * ratio * (1 + rng.random() * (3 if rng.random() < 0.3 else 0.05)) for _ in range(2 * rounds)]
    return timing(own, base)


def test_one_measurement_gives_the_ratio_that_is_published():
    one = noisy(random.Random(0))
    models = {"base": one.base_samples, "student": one.samples}
    report = LatencyReport({n: ModelLatency(end_to_end=Latency(t)) for n, t in models.items()}, {}, {})
    assert pooled([one]).ratio == report.ratio("student")


def test_a_machine_that_is_slower_the_second_time_does_not_move_the_ratio():
    slow, fast = timing((16.0,) * 6, (20.0,) * 6), timing((*[8.0] * 5, 17.0), (10.0,) * 6)
    for order in ([slow, fast], [fast, slow]):  # as they stand, the medians of both together are 16 and 15
        assert pooled(order).ratio.value == pytest.approx(0.8) == pooled(order).ratio.low
        assert pooled(order).base.p50 == percentile(order[-1].base_samples, 50), "in ms of the latest measurement"
    latency = pooled([slow, timing((9.0,) * 6, (10.0,) * 6)])  # by the base's median alone, whatever else was found
    assert set(latency.base.samples) == {10.0} and latency.ratio.value == pytest.approx(0.85)


def test_the_ratio_is_that_of_the_medians_that_stand_beside_it():
    rng = random.Random(1)
    latency = pooled([noisy(rng), noisy(rng, speed=2.5), noisy(rng, rounds=60)])
    assert latency.own.n == latency.base.n == 200
    assert latency.ratio.value == latency.value == latency.own.p50 / latency.base.p50


def test_rows_that_were_timed_at_different_speeds_stand_beside_each_other():
    rng = random.Random(3)
    base, latency = pooled([noisy(rng, ratio=1)]), pooled([noisy(rng, speed=2.5)])
    shown = latency.milliseconds(base)
    assert latency.own.p50 > base.base.p50 > shown["p50"], "as they were timed, the faster one would seem slower"
    assert shown["p50"] / base.base.p50 == pytest.approx(latency.ratio.value, rel=1e-12)
    assert shown["p99"] / shown["p50"] == pytest.approx(latency.own.p99 / latency.own.p50, rel=1e-12)


def test_pooling_narrows_the_spread():
    rng, spread = random.Random(2), {}
    for count in (1, 4):
        found = [pooled([noisy(rng, speed=1 + rng.random()) for _ in range(count)]) for _ in range(40)]
        spread[count] = torch.tensor([latency.own.p50 / latency.base.p50 for latency in found]).std()
    assert spread[4] < 0.7 * spread[1]


def test_what_is_timed_is_each_architecture_once_and_the_base_only_with_itself(context, monkeypatch):
    for schedule in (QUICK, REPORTED):
        name = "QUICK" if schedule is QUICK else "REPORTED"
        monkeypatch.setattr(f"jdkd.search.context.{name}", replace(schedule, warmup_limit=0))
    base, model = context.base_id, detector(small_spec(fpn=8))
    other = identity(model)
    timings = context.timed({base: context.base, other: model})
    assert timings.keys() == {base, other} and {t.stage for t in timings.values()} == {BRIEF}
    assert timings[base].samples == timings[base].base_samples == timings[other].base_samples
    assert len(timings[other].samples) == 2 * context.config.latency_rounds
    assert pooled([timings[base]]).ratio.interval == (1.0, 1.0)
    assert {t.machine for t in timings.values()} == {context.machine}
    at_length = context.timed({other: model}, LONG)[other]
    assert at_length.stage == LONG and len(at_length.samples) == 5 * len(timings[other].samples)


def test_a_long_timing_lasts_as_long_as_it_was_asked_to(context, monkeypatch):
    asked = {}

    def measure(*models, **how):
        asked.update(how)
        raise InterruptedError

    monkeypatch.setattr("jdkd.search.context.measure", measure)
    for seconds in (1.0, 300.0):
        with pytest.raises(InterruptedError):
            replace(context, config=replace(context.config, latency_seconds=seconds)).timed({}, LONG)
        assert asked["min_seconds"] == seconds <= asked["max_seconds"]


def test_students_are_timed_in_the_runtime_that_will_run_them(context):
    pytest.importorskip("onnxruntime")
    there = replace(context, config=replace(context.config, runtime="onnxruntime"))
    model = detector(small_spec(fpn=8))
    timing = there.timed({"child": model}, kept=(5,))["child"]
    assert timing.machine == there.machine != context.machine and "onnxruntime" in timing.machine
    assert len(timing.samples) == 2 * context.config.latency_rounds


def test_a_runtime_that_cannot_run_here_is_refused_before_anything_is_opened(context, tmp_path):
    asked = replace(context.config, base=tmp_path / "none", out=tmp_path / "out")
    for runtime, why in (("cudagraph", "it captures work of an NVIDIA GPU"), ("tflite", "known are eager, compile")):
        with pytest.raises(InputError, match=f"{runtime}.*{why}"):
            search(replace(asked, runtime=runtime))
    assert not (tmp_path / "out").exists()
