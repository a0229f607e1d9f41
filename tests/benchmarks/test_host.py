"""What the host does for a call of the Pearson loss, layer by layer."""

from __future__ import annotations

from benchmarks import host, record
from tests.dispatched import Dispatched


def operators(call, inputs, device: str) -> list[int]:
    """How many a call runs, in place of seconds, which on a busy machine have no order."""
    with Dispatched() as dispatched:
        call(inputs)
    return [len(dispatched.names)]


def test_every_layer_is_timed_and_shown(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "require_published", lambda file: None)
    monkeypatch.setattr(host, "seconds", operators)
    host.main(["--backend", "reference", "--rounds", "2", "--save"])
    kept = record.load([record.result_file("cpu", host.OP)])
    assert [row["layer"] for row in kept] == [*host.layers("reference")]
    assert all(0 < row["forward"] < row["both"] for row in kept)
    shown = capsys.readouterr().out
    assert all(f"| reference | {layer} | " in shown for layer in host.layers("reference"))


def test_every_call_is_timed_by_itself():
    given = []
    samples = host.seconds(given.append, "inputs", "cpu")
    assert given == ["inputs"] * host.CALLS and len(samples) == host.CALLS and all(sample > 0 for sample in samples)


def test_the_last_row_of_a_layer_counts():
    row = {"device": "A CPU", "backend": "cpu", "layer": "kernel", "forward": 3.0, "both": 5.0}
    assert host.table([row, row | {"both": 7.4}]).splitlines()[2:] == ["| A CPU | cpu | kernel | 3 µs | 7 µs |"]
