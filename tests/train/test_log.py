"""The log of a training is JSON that any tool reads, however the training before ended."""

import json

import pytest

from jdkd.train.log import Log


def rows(file):
    return [json.loads(line, parse_constant=pytest.fail) for line in file.read_text().splitlines()]


def test_what_json_has_no_number_for_is_null(tmp_path):
    log = Log(tmp_path / "log.jsonl", 0)
    log.add(
        {"step": 1, "grad_norm": float("inf"), "losses": {"a": float("nan"), "b": 0.5}, "sizes": (-float("inf"), 3)}
    )
    assert rows(log.file) == [{"step": 1, "grad_norm": None, "losses": {"a": None, "b": 0.5}, "sizes": [None, 3]}]


def test_a_run_that_goes_on_mends_the_lines_before(tmp_path):
    file = tmp_path / "log.jsonl"
    kept = '{"step": 1, "lr": 0.1}\n{"step": 2, "lr": 1e-05, "losses": {"a": 0.30000000000000004}}\n'
    file.write_text(kept + '{"step": 3, "grad_norm": Infinity}\n{"step": NaN}\n{"step": 5}\n')
    Log(file, 3)
    assert file.read_text() == kept + '{"step": 3, "grad_norm": null}\n'


def test_a_line_whose_end_a_full_disk_cut_off_stays_a_line(tmp_path):
    file = tmp_path / "log.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}')
    Log(file, 2).add({"step": 3})
    assert [row["step"] for row in rows(file)] == [1, 2, 3]


def test_a_run_without_a_first_line_leaves_no_folder(tmp_path):
    log = Log(tmp_path / "run" / "teacher" / "log.jsonl", 0)
    assert not [*tmp_path.iterdir()]
    log.add({"step": 1})
    assert rows(log.file) == [{"step": 1}]
