"""Rows and table of exported files against their detectors; what stands for a file here is its function of tensors."""

import pytest

from benchmarks import parity
from tests.export.tiny import formed, pictures


@pytest.fixture
def rows(monkeypatch):
    monkeypatch.setattr(parity, "exported", lambda model, form: model)
    opened = lambda model, device: formed(model)  # noqa: E731
    monkeypatch.setattr(parity, "checking", lambda form: {"onnxruntime": opened, "openvino": opened})
    return [*parity.rows(["fcos"], ["onnx"], [(image, {}) for image in pictures((60, 90), (120, 77))])]


def test_a_family_is_compared_whole_and_with_half_of_its_channels(rows):
    whole, _, half, _ = rows
    assert [row["shape"] for row in rows] == [*["whole"] * 2, *["half of its channels"] * 2]
    assert [row["runtime"] for row in rows] == ["onnxruntime", "openvino"] * 2
    assert half["parameters"] < 0.7 * whole["parameters"]
    for row in rows:
        assert row["images"] == 2 and row["same"] == row["detections"] > 10 and row["complaint"] is None


def test_a_line_of_the_table_is_the_last_comparison(rows):
    again = {**rows[0], "same": 1, "detections": 2}
    again.pop("runtime")  # as of earlier rows, which were made in onnxruntime alone
    head, _, whole, other, half, _ = parity.table([*rows, again]).splitlines()
    assert "| fcos | whole | onnx | onnxruntime | 2 | 1 of 2 |" in whole and "| openvino | 2 |" in other
    assert "half" in half and head.count("|") == whole.count("|")
