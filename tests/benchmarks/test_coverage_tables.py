"""The tables of what is tested: with which detector, and of which kernel."""

import pytest

from benchmarks import backends, support
from benchmarks.support import Source
from jdkd.detect import FAMILIES


def row(table: str, name: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {name} |")]
    return line.strip("| ").split(" | ")[1:]


def test_every_family_has_a_row():
    assert set(support.NAMES) == {*FAMILIES, support.OWN}


def test_a_cell_says_what_the_first_test_says_that_has_the_family():
    sources = (
        Source("search.test_any_detector", "ASKED", support.ASKED),
        Source("search.test_any_detector", "FAMILIES"),
        Source("export.test_families", "REFUSED", support.REFUSED),
    )
    table = support.table({"a": sources, "b": sources[1:2]})
    assert row(table, "FCOS") == ["tested (slow)", "tested"] and row(table, "RetinaNet") == ["tested"] * 2
    assert row(table, "Keypoint R-CNN") == ["refused", "not tested"] and row(table, "GFL") == ["not tested"] * 2


def test_a_family_without_a_row_is_an_error(monkeypatch):
    monkeypatch.setattr("tests.search.test_any_detector.FAMILIES", {"DETR": None})
    with pytest.raises(ValueError, match="tests speak of 'DETR'"):
        support.table()


def test_a_test_of_a_kernel_that_is_gone_is_an_error(monkeypatch):
    monkeypatch.setitem(backends.TESTS, ("pearson", "cuda"), ("ops/test_nothing_aot",))
    with pytest.raises(ValueError, match=r"pearson / cuda is said to be tested by .*test_nothing_aot"):
        backends.table()


def test_a_kernel_was_measured_and_tuned_where_its_rows_were_made(monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.record.RESULTS", tmp_path)
    file = tmp_path / "a" / "pearson.jsonl"
    rows = [{"op": "pearson", "provider": "jdkd triton", "device": "A GPU", "cuda": "13.0"}]
    rows += [{"op": "pearson", "provider": "jdkd cpu", "device": "A CPU", "cuda": None}]
    backends.record.append(file, [*rows, {"op": "pearson", "provider": "eager", "device": "Another", "cuda": None}])
    region = {"table": "pearson", "region": "loss", "default": "cpu", "device": "A CPU", "cuda": None}
    timed = {**region, "measured": []}
    tuned = [{**timed, "path": "cpu"}, {**timed, "region": "tap", "path": "reference"}, {**region, "path": "cpu"}]
    tuned += [{**timed, "table": "pearson forms", "path": "single pass", "device": "A GPU", "cuda": "13.0"}]
    backends.record.append(file.with_name("tuned.jsonl"), tuned)
    lines = [line.strip("| ").split(" | ") for line in backends.table().splitlines()]
    assert {cells[1]: cells[6] for cells in lines if cells[0] == "`pearson`"} == {
        "triton": "A GPU", "cuda": "not measured", "cpu": "A CPU"
    }  # fmt: skip
    (tuned_on,) = [cells[7] for cells in lines if cells[:2] == ["`pearson`", "cpu"]]
    assert tuned_on == "A CPU: 1 of 2 regions changed"
    assert [cells[1:8:6] for cells in lines if cells[0] == "`pearson_single`"] == [
        ["cuda", "A GPU: 1 of 1 regions changed"],
        ["cpu", "not tuned"],
    ]
