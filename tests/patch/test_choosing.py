"""What is equal and faster is kept, and nothing else."""

import torch
from torch import nn

from benchmarks import accelerate as benchmark
from benchmarks import record
from jdkd._tuned import machine
from jdkd.latency import Ratio
from jdkd.patch import accelerate, acceleration, convolutions
from tests.patch.test_accelerate import everything


class _Timed:
    """Stands for a report of latencies."""

    def __init__(self, ratio: Ratio) -> None:
        self._ratio = ratio

    def ratio(self, name: str) -> Ratio:
        assert name == "with"
        return self._ratio


def timed_as(monkeypatch, *ratios: tuple[float, float, float]) -> None:
    waiting = [Ratio(*each) for each in ratios]
    monkeypatch.setattr(acceleration, "measure_quick", lambda *_, **__: _Timed(waiting.pop(0)))


def test_the_clock_decides(model, images, monkeypatch):
    timed_as(monkeypatch, (0.9, 0.85, 0.95), (0.97, 0.9, 1.01), (1.2, 1.1, 1.3), (0.8, 0.7, 0.9))
    one = accelerate(model, images, ingredients=("folded", "channels_last", "grouped"))
    assert one.kept == ("folded",) and one.ratio.value == 0.8
    assert [trial.reason for trial in one.trials] == ["equal and faster", "no gain beyond noise", "slower"]
    assert "folded: 0.800 [0.700, 0.900] of the plain model's latency; checked and timed on " in str(one)


def test_what_was_not_timed_says_so_and_on_what_machine(model, images):
    one = accelerate(model, images, ingredients=("folded",), timed=False)
    assert one.source == f"checked on {machine(torch.device('cpu'))}"
    assert str(one).endswith(f"\nfolded; {one.source}")


def test_what_is_not_faster_together_is_not_kept_at_all(model, images, monkeypatch):
    timed_as(monkeypatch, (0.9, 0.85, 0.95), (0.99, 0.9, 1.1))
    before = everything(model)
    one = accelerate(model, images, ingredients=("folded",))
    assert one.kept == () and "0.990 [0.900, 1.100] of the plain model's time" in one.trials[0].reason
    assert everything(model) == before
    one.restore()
    assert everything(model) == before


def test_a_real_clock_tells_a_slow_ingredient(model, images, monkeypatch):
    run = convolutions.Aten.run

    def slow(self, x, *rest):
        torch.rand(300, 300) @ torch.rand(300, 300)
        return run(self, x, *rest)

    monkeypatch.setattr(convolutions.Aten, "run", slow)
    one = accelerate(model, images, ingredients=("channels_last",), rounds=3, max_seconds=0.5, warmup_limit=0.0)
    assert one.kept == () and one.trials[0].ratio.low > 1 and one.trials[0].reason == "slower"


def test_an_ingredient_that_is_wrong_is_left_out(model, images, monkeypatch):
    whole = convolutions.folded

    def off(conv, norm):
        weight, bias = whole(conv, norm)
        return weight, nn.Parameter(bias + 1e-3 * bias.abs().max())

    monkeypatch.setattr(convolutions, "folded", off)
    one = accelerate(model, images, ingredients=("folded", "packed"), timed=False)
    assert one.kept == ("packed",)
    assert "it is not equal: backbone" in one.trials[0].reason and "differs by" in one.trials[0].reason


def test_an_ingredient_that_raises_is_left_out(model, images, monkeypatch):
    def broken(*_):
        raise RuntimeError("could not create a primitive")

    monkeypatch.setattr(convolutions.Onednn, "run", broken)
    one = accelerate(model, images, ingredients=("folded", "packed"), timed=False)
    assert one.kept == ("folded",) and "it raises RuntimeError: could not create a primitive" in one.trials[1].reason


def test_a_torch_without_these_operators_goes_without(model, images, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    one = accelerate(model, images, timed=False)
    assert "packed" not in one.kept and "has no oneDNN operators" in str(one)


def test_the_committed_rows_hold_the_factor_on_one_thread():
    rows = record.load(sorted(record.RESULTS.glob("*/accelerate.jsonl")))
    latest = {(row["device"], row["case"]): row for row in rows if row["ingredient"] == benchmark.ALL}
    of_torchvision = {case: row for (_, case), row in latest.items() if case.endswith("R50")}
    assert len(of_torchvision) == 3
    for row in of_torchvision.values():
        assert row["alone"][2] < benchmark.COMMITTED and row["difference"]["reason"] is None
