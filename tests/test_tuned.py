"""What was measured is kept whole, is read once, and counts only where it was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from jdkd import _backend, _dispatch, _tuned, _verdicts, env
from jdkd._tuned import Measured, Region
from jdkd.notices import Notice
from tests.tuned import tuned

CPU = torch.device("cpu")
MEASURED = (Measured("fast", "a shape", 0.5, 0.4, 0.6), Measured("fast", "another", 0.8, 0.7, 0.9))
FOUND = Region("fast", "slow", "2026-11-29", MEASURED)


@pytest.fixture(autouse=True)
def nothing_measured(monkeypatch, tmp_path):
    """A cache of its own, in which nothing was measured."""
    monkeypatch.setenv("JDKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("JDKD_BACKEND", raising=False)
    _dispatch.forget()
    yield
    _dispatch.forget()


def written() -> Path:
    file = _tuned.file_of(CPU)
    file.parent.mkdir(parents=True, exist_ok=True)
    _tuned.write(CPU, {"toy": {"small": FOUND, "large": FOUND._replace(path="slow", measured=())}})
    return file


def test_what_is_kept_is_read_again():
    written()
    assert _tuned.regions(CPU)["toy"] == {"small": FOUND, "large": FOUND._replace(path="slow", measured=())}
    assert _tuned.path("toy", "small", CPU) == "fast" and _tuned.path("toy", "large", CPU) is None
    assert _tuned.has_winners("toy", CPU) and not _tuned.has_winners("other", CPU)
    assert _tuned.told("toy", "small", CPU).endswith("2026-11-29: 1.25 to 2.00 times as fast as slow")
    assert not _tuned.has_winners("toy", torch.device("meta"))


def test_the_key_is_that_of_verdicts_and_the_number_of_threads(monkeypatch):
    assert {**_verdicts.environment(CPU), "threads": str(torch.get_num_threads())} == _tuned.environment(CPU)
    written()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    _tuned.forget()
    assert not _tuned.has_winners("toy", CPU)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: "",
        lambda content: "[]",
        lambda content: "null",
        lambda content: content.replace('"regions"', '"other"'),
        lambda content: content.replace('"ratio": 0.5', '"ratio": "fast"'),
        lambda content: content.replace('"ratio": 0.5', '"ratio": NaN'),
        lambda content: content.replace('"ratio": 0.5', '"ratio": -1'),
        lambda content: content.replace('"path": "fast",\n', ""),
        lambda content: "[" * 100_000,
    ],
)
def test_a_damaged_file_is_ignored_with_one_sentence(damage):
    file = written()
    file.write_text(damage(file.read_text()))
    with pytest.warns(Notice, match="cannot be read .* and is ignored.*`jdkd tune` writes it anew") as told:
        assert not _tuned.has_winners("toy", CPU) and not _tuned.has_winners("toy", CPU)
    assert len(told) == 1 and str(file) in str(told[0].message)


def test_bytes_that_are_no_text_and_a_folder_in_its_place_are_ignored():
    file = written()
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.warns(Notice, match="cannot be read"):
        assert _tuned.regions(CPU) == {}
    file.unlink()
    file.mkdir()
    _tuned.forget()
    with pytest.warns(Notice, match="cannot be read"):
        assert _tuned.regions(CPU) == {}


@pytest.mark.parametrize("changed", ["device", "sources", "threads", "torch"])
def test_a_file_of_another_machine_is_ignored_with_one_sentence(changed):
    file = written()
    content = json.loads(file.read_text())
    content["environment"][changed] = "another"
    file.write_text(json.dumps(content))
    with pytest.warns(Notice, match="is about another machine, or other versions, and is ignored"):
        assert not _tuned.has_winners("toy", CPU)


def test_a_write_leaves_nothing_beside_the_file():
    file = written()
    assert list(file.parent.iterdir()) == [file]


def test_the_backend_that_measured_faster_runs_in_its_region_alone(monkeypatch):
    env.load_operators()
    small, large = (torch.zeros(1, 2, side, side) for side in (4, 512))
    if _backend.available("pearson")["cpu"] is not None:
        pytest.skip("jdkd._C is not built")
    default = _backend.select("pearson", small, "loss")
    region = "loss, float32, contiguous, <1 MiB a level"
    with tuned("pearson", **{region: "reference"}):
        assert [_backend.select("pearson", small, "loss") for _ in range(2)] == ["reference"] * 2
        last = small.contiguous(memory_format=torch.channels_last)
        for tensor, form in ((large, "loss"), (small, "gradient"), (last, "loss"), (small.half(), "loss")):
            assert _backend.select("pearson", tensor, form) == default == "cpu"
        with _backend.use_backend("cpu"):
            assert _backend.select("pearson", small, "loss") == "cpu"
        monkeypatch.setenv("JDKD_BACKEND", "cpu")
        assert _backend.select("pearson", small, "loss") == "cpu"
        monkeypatch.delenv("JDKD_BACKEND")
        assert f"reference for {region}, tuned on" in env.report()
    assert _backend.select("pearson", small, "loss") == "cpu" and "nothing was timed" in env.report()
