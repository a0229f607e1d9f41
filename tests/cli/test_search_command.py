import json
from contextlib import closing

import pytest

from jdkd.detect import load
from jdkd.search.archive import Archive, Candidate

ENTRY = {
    "map": 0.4,
    "map50": 0.6,
    "latency_ms": {"p50": 10.0, "p90": 11.0, "p99": 12.0},
    "latency_ratio_interval": [0.49, 0.51],
    "params": 1000,
    "gmacs": 0.1,
    "train_steps": 3,
}


@pytest.fixture
def pretend(monkeypatch):
    """A search that ends at once: `pretend(ratio)` or `pretend(error)`; returns the configurations it was given."""
    configs = []

    def as_found(outcome):
        def search(config, progress):
            configs.append(config)
            spec = load(config.base).spec
            base = Candidate(
                number=0,
                id="000",
                parent=None,
                kind="base",
                action="base",
                teacher=None,
                spec=spec,
                feature_channels=(0,),
                map=0.4,
                map50=0.6,
                latency_p50=20.0,
                latency_ratio=1.0,
                latency_samples=(20.0,),
                steps=0,
                lineage_steps=0,
                cycles=(),
                params=1000,
                gmacs=0.1,
                seconds=1.0,
            )
            with closing(Archive(config.out / "archive.sqlite")) as archive:
                if not archive.candidates:
                    archive.add(base)
            progress("candidates", 1, 1, {"mAP": 0.4})
            if isinstance(outcome, BaseException):
                raise outcome
            result = {
                "base": {**ENTRY, "latency_ratio": 1.0},
                "student": {**ENTRY, "latency_ratio": outcome},
                "target_latency": config.target_latency,
                "target_met": outcome <= config.target_latency,
                "student_id": "000",
            }
            (config.out / "result.json").write_text(json.dumps(result))
            return result

        monkeypatch.setattr("jdkd.search.search", search)
        return configs

    return as_found


@pytest.fixture
def arguments(trained, squares, tmp_path):
    return ["search", "--base", trained, "--data", squares, "--out", tmp_path / "out", "--steps", 40]


def test_ends_with_a_table_a_report_and_the_paths(jdkd, pretend, arguments, tmp_path):
    configs = pretend(0.5)
    answer = jdkd(*arguments, "--seed", 3, "--device", "cpu")
    assert answer.code == 0, answer.err
    (config,) = configs
    assert (config.steps, config.seed, config.device, config.target_latency) == (40, 3, "cpu", 0.53)
    for name in ("student", "result.json", "archive.sqlite", "pareto.png", "report.html"):
        assert str(tmp_path / "out" / name) in answer.out
    assert (tmp_path / "out" / "pareto.png").is_file() and (tmp_path / "out" / "report.html").is_file()
    assert "0.500 (0.490–0.510)" in answer.out
    assert json.loads((tmp_path / "out" / "run.json").read_text())["finished"]


def test_a_target_that_is_missed_is_said_after_everything_is_written(jdkd, pretend, arguments, tmp_path):
    pretend(0.7)
    answer = jdkd(*arguments)
    assert answer.code == 2
    assert "takes 0.700 of the base's time and misses --target-latency 0.53" in answer.err
    assert (tmp_path / "out" / "report.html").is_file()


def test_ctrl_c_keeps_the_archive_and_gives_the_command_to_carry_on(jdkd, pretend, arguments, tmp_path):
    pretend(KeyboardInterrupt())
    answer = jdkd(*arguments)
    assert answer.code == 2 and "Traceback" not in answer.err
    command = " ".join(map(str, ["jdkd", *arguments, "--resume"]))
    assert answer.err.strip().endswith(
        f"keeps every finished candidate and the last checkpoint; carry on with: {command}"
    )
    pretend(0.5)
    assert jdkd(*arguments).code == 2
    assert jdkd(*arguments, "--resume").code == 0


def test_a_full_disk_in_the_middle(jdkd, pretend, arguments, tmp_path):
    import sqlite3

    pretend(sqlite3.OperationalError("database or disk is full"))
    answer = jdkd(*arguments)
    assert answer.code == 2 and "disk is full" in answer.err and str(tmp_path / "out") in answer.err
