import json

import pytest

from jdkd.latency.report import LatencyReport, ModelLatency, pooled
from jdkd.latency.statistics import Latency

RUN = {"stable": True, "warmup_seconds": 1.0, "readings": [], "rounds": 20}


def _samples(middle, spread=0.02, rounds=20):
    return Latency(tuple(middle * (1 + spread * (((7 * k) % 11) / 5 - 1)) for k in range(2 * rounds)))


def report(student=0.8, again=1.0, run=RUN):
    models = {"base": ModelLatency(_samples(10.0)), "student": ModelLatency(_samples(10.0 * student, 0.03))}
    control = ModelLatency(_samples(10.0 * again, 0.021))
    return LatencyReport(models, {"threads": 1}, {"runs": [run]}, control)


def test_a_verdict_is_given_where_the_interval_does_not_span_one():
    assert report(0.8).verdict("student") == "faster" and report(1.2).verdict("student") == "slower"
    assert report(1.0).verdict("student") == "not resolved"


def test_nothing_is_resolved_where_the_base_against_itself_does_not_contain_one():
    failed = report(0.8, again=1.1)
    assert not failed.control_holds() and failed.verdict("student") == "not resolved"
    (warning,) = failed.warnings()
    assert (
        warning.startswith("A/A fails in end_to_end: the base against itself is 1.100 [")
        and "measure longer" in warning
    )
    stored = failed.to_json()
    assert stored["control"]["end_to_end"]["holds"] is False and stored["control"]["end_to_end"]["ratio_level"] == 0.99
    assert report(0.8).to_json()["control"]["end_to_end"]["holds"] and report(0.8).warnings() == []


def test_a_cold_machine_is_said():
    (warning,) = report(run=RUN | {"stable": False}).warnings()
    assert warning == "NOT stable after 1.0 s of warm-up"


def test_processes_are_pooled_with_an_interval_over_them():
    both = pooled([report(0.80), report(0.82), report(0.84)])
    ratio = both.ratio("student")
    assert both.processes == (20, 20, 20) and both.models["student"].end_to_end.n == 120
    assert ratio.value == pytest.approx((0.80 * 0.82 * 0.84) ** (1 / 3), rel=0.01)
    entry = both.to_json()["models"]["student"]["end_to_end"]
    assert entry["ratio_of_process"] == pytest.approx([0.80, 0.82, 0.84], rel=0.01)
    within = entry["ratio_interval_within"]
    assert ratio.low < within[0] < within[1] < ratio.high  # rounds of a process agree better than processes do
    assert both.verdict("student") == "faster" and both.control_holds()


def test_what_one_process_finds_and_others_do_not_is_not_resolved():
    assert report(0.9).verdict("student") == "faster"
    assert pooled([report(0.9), report(1.02), report(1.0)]).verdict("student") == "not resolved"


def test_a_report_survives_json_with_its_control_and_processes():
    both = pooled([report(0.8), report(0.9)])
    assert LatencyReport.from_json(json.loads(json.dumps(both.to_json(), sort_keys=True))) == both
