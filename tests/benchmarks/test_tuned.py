"""The page of what `jdkd tune` found says what changed, and whether anything is slower for it."""

import itertools

import pytest
import torch

from benchmarks import tuned
from jdkd import _backend, _verdicts
from jdkd.ops import elastic_kernels, pearson_forms
from jdkd.tune import pearson
from jdkd.tune.shapes import DTYPES
from tests.tuned import CPU
from tests.tuned import tuned as planted

FAST = ["fast", "a shape", 0.5, 0.4, 0.6]


def test_the_page_says_what_changed_and_what_is_slower():
    toy = {"table": "toy", "default": "slow"}
    found = [
        {**toy, "region": "small", "path": "fast", "measured": [FAST, ["fast", "another", 0.8, 0.7, 0.9]]},
        {**toy, "region": "large", "path": "slow", "measured": [FAST]},
        {**toy, "table": "other", "region": "all", "path": "slow", "measured": []},
        {**toy, "shapes": 3, "path": "the default"},
        {**toy, "case": "P4", "shape": "b", "region": "bfloat16", "path": "fast", "ratio": [0.9, 0.8, 1.02]},
    ]
    lines = list(tuned.page(found))
    assert lines[0] == "toy: 2 regions timed, 1 changed for the better"
    assert lines[1] == "  small: fast, 1.25 to 2.00 times as fast as slow"
    assert lines[2] == "other: 1 regions timed, none changed for the better"
    assert lines[3] == "4 shapes of the cases: 1 take another way than the default, none slower"
    assert lines[4] == "  P4, b (bfloat16): fast takes 0.900 [0.800, 1.020] of the time"
    found[-1]["ratio"] = [1.1, 1.05, 1.2]
    assert list(tuned.page(found))[3].endswith("1 slower")


def test_only_shapes_that_take_another_way_are_timed_again(monkeypatch):
    if _backend.available("pearson")["cpu"] is not None:
        pytest.skip("jdkd._C is not built")
    given = torch.device("cpu"), torch.float32, torch.contiguous_format
    shapes = [(side, pearson.of_backends(*given, [(1, 2, side, side)], "loss")) for side in (3, 512)]
    monkeypatch.setattr(tuned, "shapes", lambda device: iter(shapes))
    monkeypatch.setattr(tuned, "SECONDS", 0.01)
    monkeypatch.delenv("JDKD_BACKEND", raising=False)
    with planted("pearson", default="reference", **{"loss, float32, contiguous, <1 MiB a level": "cpu"}):
        region, small, others = tuned.rows(torch.device("cpu"))
    assert region["path"] == "cpu" and (others["path"], others["shapes"]) == ("the default", 1)
    assert small["path"] == "cpu" and small["case"] == 3 and small["ratio"][1] > 0


def test_a_gpu_is_asked_for_by_name(monkeypatch, capsys):
    gpu, cpu = torch.device("cuda", 1), torch.device("cpu")
    asked, rows = [], {"table": "toy", "region": "all", "path": "slow", "default": "slow", "measured": []}
    monkeypatch.setattr(tuned.record, "environment", lambda device, copied: {"device": device})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(tuned, "rows", lambda device: asked.append(device) or [rows])
    tuned.main(["--device", "cuda"])
    tuned.main([])
    assert asked == [gpu, cpu] and "toy: 1 regions timed" in capsys.readouterr().out


def test_every_table_and_dtype_that_is_tuned_has_shapes_of_the_cases():
    """Or what `jdkd tune` chose there would be slower unseen."""
    found = set()
    for _, shape in tuned.shapes(CPU):
        call = shape.call.students[0] if shape.table is pearson_forms.TABLE else shape.call
        found.add((shape.table.name, call.dtype))
    assert found == set(itertools.product(("pearson", pearson_forms.NAME, elastic_kernels.NAME), DTYPES["cpu"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_form_that_is_taken_for_a_case_is_timed_again(monkeypatch, dtype):
    if _backend.available("pearson_single")["cpu"] is not None:
        pytest.skip("jdkd._C is not built")
    monkeypatch.setattr(tuned, "shapes", lambda device: iter([("P7", pearson.of_forms(CPU, dtype, [(1, 8, 7, 11)]))]))
    monkeypatch.setattr(tuned, "SECONDS", 0.01)
    monkeypatch.delenv("JDKD_BACKEND", raising=False)
    region = f"{_verdicts.dtype_name(dtype)}, <1 MiB"
    with planted(pearson_forms.NAME, default="split", **{region: "single pass"}):
        _, row = tuned.rows(CPU)
    assert (row["case"], row["path"], row["default"]) == ("P7", "single pass", "split") and row["ratio"][1] > 0
