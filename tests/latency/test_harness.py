"""The harness against itself: equals are found equal, and what is 5 % slower is found slower."""

import functools
import random
import time

import pytest
import torch

from benchmarks import itself
from jdkd.latency.clock import CudaClock
from jdkd.latency.protocol import AGAIN, Schedule, interleave
from jdkd.latency.report import LatencyReport, ModelLatency
from jdkd.latency.statistics import Latency
from tests.export.tiny import made

SLOWDOWN = 1.05


class NoisyClock:
    """A shared machine: it slows down and recovers over seconds, jitters by 2 %, and now and then a call takes twice as
    long; and a caller says how long its calls would take if it did not.
    """

    name = "noisy"

    def __init__(self, seed):
        self.random, self.load, self.ran = random.Random(seed), 1.0, 1.0

    def time(self, call):
        call()
        self.load = max(0.7, min(2.0, self.load * (1 + 0.01 * self.random.gauss(0, 1))))
        stalled = 2.0 if self.random.random() < 0.02 else 1.0
        return 10 * self.ran * self.load * stalled * (1 + 0.02 * self.random.gauss(0, 1))


@pytest.fixture(params=[3, pytest.param(20, marks=pytest.mark.slow)])
def count(request):
    """Of reports; many only where slow tests are asked for."""
    if request.param > 3:
        request.getfixturevalue("when_asked")
    return request.param


@functools.cache
def reports(count):
    """Reports of a base, the base again, and a student that is 5 % slower."""
    return [_report(seed) for seed in range(count)]


def _report(seed):
    clock = NoisyClock(seed)

    def taking(factor):
        return lambda index: setattr(clock, "ran", factor)

    calls = {"end_to_end": {"base": taking(1.0), "student": taking(SLOWDOWN), AGAIN: taking(1.0)}}
    schedule = Schedule(rounds=40, min_seconds=0, warmup_seconds=0, warmup_limit=0)
    samples, run = interleave(calls, 1, schedule, clock)
    models = {name: ModelLatency(Latency(tuple(taken))) for name, taken in samples["end_to_end"].items()}
    control = models.pop(AGAIN)
    return LatencyReport(models, {}, {"runs": [run | {"stable": True}]}, control)


def test_equals_are_found_equal_on_a_noisy_machine(count):
    assert sum(report.control_holds() for report in reports(count)) >= 0.95 * count


def test_a_planted_slowdown_of_5_percent_is_found_on_a_noisy_machine(count):
    assert sum(report.verdict("student") == "slower" for report in reports(count)) >= 0.9 * count
    assert all(abs(report.ratio("student").value / SLOWDOWN - 1) < 0.03 for report in reports(count))


def test_what_turns_do_not_cancel_fails_the_control():
    """Here the base's own calls are charged 5 % more, whenever they are made."""
    clock = NoisyClock(0)
    calls = {"end_to_end": {"base": lambda index: setattr(clock, "ran", SLOWDOWN)}}
    calls["end_to_end"][AGAIN] = lambda index: setattr(clock, "ran", 1.0)
    schedule = Schedule(rounds=100, min_seconds=0, warmup_seconds=0, warmup_limit=0)
    samples, run = interleave(calls, 1, schedule, clock)
    base, again = (ModelLatency(Latency(tuple(taken))) for taken in samples["end_to_end"].values())
    report = LatencyReport({"base": base}, {}, {"runs": [run]}, again)
    assert not report.control_holds() and report.warnings()[0].startswith("A/A fails")


@pytest.mark.slow
@pytest.mark.usefixtures("when_asked")
def test_equals_are_found_equal_and_a_slowdown_is_found_on_this_machine():
    found = list(itself.reports())
    ratios = [(str(report.control_ratio()), str(report.ratio("student"))) for report in found]
    assert sum(report.control_holds() for report in found) >= itself.HOLD, ratios
    assert sum(report.verdict("student") == "slower" for report in found) >= itself.FIND, ratios


@pytest.mark.parametrize(("holds", "finds", "said"), [(19, 17, "as"), (18, 20, "NOT as"), (20, 16, "NOT as")])
def test_the_verdict_is_of_both(holds, finds, said):
    rows = [{"holds": n < holds, "verdict": "slower" if n < finds else "not resolved"} for n in range(20)]
    assert itself.verdict(rows).startswith(f"{said} asked: A/A contains 1 in {holds} of 20")


def test_the_slower_one_finds_the_same_and_takes_so_much_longer(images):
    (report,) = itself.reports(1, rounds=2, warmup_limit=0)
    row = itself.row(report)
    assert {*report.models} == {"base", "student"} and row["holds"] is report.control_holds()
    assert row["control"][0] == report.control_ratio().value and row["verdict"] == report.verdict("student")
    assert f"| 2 | {2 * row['holds']} | {2 * (row['verdict'] == 'slower')} of 2 |" in itself.table([row, row])
    model, image = made("fcos"), images[0] / 255
    begin = time.thread_time()
    (slower,) = itself.Waiting(model, 0.05)([image])
    assert time.thread_time() - begin > 0.05 and slower["scores"].equal(model([image])[0]["scores"])


def test_events_are_recorded_where_the_timed_device_works(monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream=None):
            recorded.append(stream)

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 7.0

    recorded = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    assert CudaClock(torch.device("cuda:1")).time(lambda: recorded.append("call")) == 7.0
    assert recorded == ["stream of cuda:1", "call", "stream of cuda:1"]
