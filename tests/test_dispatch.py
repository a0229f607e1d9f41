"""One rule picks among several ways to compute something: asked for, measured faster here, or the first that may."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from jdkd import _backend, _dispatch
from jdkd._dispatch import Candidate, Table, use_backend
from jdkd.functional import elastic_conv2d, pkd_loss
from jdkd.ops import elastic_kernels, elastic_levels_kernels, pearson, pearson_forms, pearson_single
from jdkd.ops.active_channels import Channels
from tests.dispatched import Dispatched
from tests.tuned import tuned

CPU = torch.device("cpu")


class Call(NamedTuple):
    size: int
    device: torch.device = CPU


class Kernel(NamedTuple):
    """A kernel of the backend ``triton``, which is asked for by name, and what is known of it."""

    reason: str | None = None
    backend: str = "triton"

    def asked(self, call: Call) -> str | None:
        return _dispatch.requested()

    def unseen(self, call: Call, check: bool) -> str | None:
        return self.reason if check else None


def row(name: str, can_run: Callable[[Call], str | None] = lambda call: None, **more) -> Candidate:
    return Candidate(name, "", "", can_run, **more)


def waits(call: Call) -> str:
    return "it waits"


SMALL = row("small", lambda call: None if call.size < 10 else "it takes less than 10")
ANY = row("any")
UNCHECKED = row("unchecked", kernel=Kernel(_dispatch.NOT_YET))
WRONG = row("wrong", kernel=Kernel("it is wrong"))
WAITING = row("waiting", kernel=Kernel(), waits=waits)


def table(*candidates: Candidate) -> Table:
    return Table("toy", candidates, lambda call: "small" if call.size < 10 else "large")


@pytest.fixture(autouse=True)
def nobody_asks(monkeypatch, tmp_path):
    """No backend is asked for, and nothing was measured."""
    monkeypatch.delenv("JDKD_BACKEND", raising=False)
    monkeypatch.setenv("JDKD_CACHE", str(tmp_path / "cache"))
    _dispatch.forget()
    yield
    _dispatch.forget()


def test_the_first_candidate_that_takes_a_call_is_picked():
    assert table(SMALL, ANY).choose(Call(9)) == (SMALL, True)
    assert table(SMALL, ANY).choose(Call(10)) == (ANY, True)
    assert table(SMALL).choose(Call(10)) == (None, True)


def test_a_kernel_that_is_not_seen_right_is_passed_by_and_an_unchecked_one_is_asked_again():
    assert table(UNCHECKED, SMALL, ANY).choose(Call(10)) == (ANY, False)
    assert table(SMALL, UNCHECKED, ANY).choose(Call(9)) == (SMALL, True)
    assert table(WRONG, ANY).choose(Call(9)) == (ANY, True)
    assert table(UNCHECKED, ANY).choose(Call(9), check=False) == (UNCHECKED, True)


def test_a_candidate_waits_until_it_is_asked_for_or_was_faster():
    waiting = table(WAITING, ANY)
    assert waiting.choose(Call(1)) == (ANY, True)
    with use_backend("triton"):
        assert waiting.choose(Call(1)) == (WAITING, True)
    with use_backend("reference"):
        assert waiting.explain(Call(1)).others == (("waiting", "the backend reference was asked for"),)
    with tuned("toy", small="waiting"):
        assert [waiting.choose(Call(size))[0].name for size in (1, 10)] == ["waiting", "any"]
        with use_backend("reference"):
            assert waiting.choose(Call(1)) == (ANY, True)


def test_what_is_asked_for_runs_unchecked():
    with use_backend("triton"):
        assert table(WRONG, ANY).choose(Call(1)) == (WRONG, True)


def test_what_was_faster_goes_first_where_it_can_run_and_is_right():
    with tuned("toy", small="any", large="small"):
        assert table(SMALL, ANY).choose(Call(1))[0] is ANY
        assert table(SMALL, ANY).choose(Call(10))[0] is ANY  # small takes no such call
    with tuned("toy", small="wrong"):
        assert table(ANY, WRONG).choose(Call(1))[0] is ANY


def test_every_choice_says_from_where_it_comes():
    assert table(SMALL, ANY).explain(Call(1)) == (SMALL, "default", (("any", "small comes first"),))
    assert table(SMALL, ANY).explain(Call(10)).others == (("small", "it takes less than 10"),)
    assert table(row("kernel", kernel=Kernel()), ANY).explain(Call(1)).source == "checked on this device"
    with use_backend("triton"):
        assert table(WAITING, ANY).explain(Call(1)).source == "it was asked for"
    with tuned("toy", small="waiting"):
        source = table(ANY, WAITING).explain(Call(1)).source
    assert source.startswith("tuned on ") and source.endswith(", 2026-11-29: 2.00 times as fast as default")


@pytest.mark.parametrize(
    "table",
    [elastic_kernels.TABLE, elastic_levels_kernels.TABLE, pearson_forms.TABLE],
    ids=["conv", "levels", "pearson"],
)
def test_the_tables_name_each_row_once_and_say_why(table):
    rows = table.candidates
    assert len({row.name for row in rows}) == len(rows) and all(row.why and row.when for row in rows)


def test_a_form_says_why_it_does_not_compute_a_call():
    levels = [torch.zeros(1, 2, 3, 3)]
    row, _, others = pearson_forms.TABLE.explain(pearson_forms.LossCall(levels, levels, tap=True))
    assert row.name == "tap" and others[-1] == ("split", "it takes features that go nowhere else")
    assert dict(others)["moments"] == "it takes a padding mask, or statistics over several processes"


def test_the_single_pass_runs_where_it_was_faster_and_seen_right(monkeypatch):
    monkeypatch.setattr(pearson_single, "fits", lambda students, teachers: True)
    levels = [torch.zeros(1, 2, 3, 3)]
    call, reasons = pearson_forms.LossCall(levels, levels, "students"), [None, "it is wrong"]
    monkeypatch.setattr(pearson_single, "unseen", lambda device, dtype, check: reasons.pop(0))
    assert pearson_forms.select(call) == "split"
    with tuned("pearson forms", **{"float32, <1 MiB": "single pass"}):
        assert pearson_forms.select(call) == "single pass"
        _dispatch.settled.clear()
        assert pearson_forms.select(call) == "split"


def test_a_form_that_was_faster_costs_a_lookup_and_is_looked_up_anew_for_another_call(monkeypatch):
    if _backend.available("pearson_single")["cpu"] is not None:
        pytest.skip("jdkd._C is not built")
    asked, fits = [], pearson_single.fits
    monkeypatch.setattr(pearson_single, "fits", lambda *levels: asked.append(levels) or fits(*levels))

    def form(teacher: torch.Tensor) -> str:
        return pearson_forms.select(pearson_forms.LossCall([torch.zeros(1, 4, 3, 3)], [teacher], "students"))

    with tuned("pearson forms", **{"float32, <1 MiB": "single pass"}):
        teacher = torch.zeros(1, 4, 3, 3)
        assert [form(teacher) for _ in range(3)] == ["single pass"] * 3 and len(asked) == 1
        assert form(teacher.to(memory_format=torch.channels_last)) == "split"
        assert form(teacher.half()) == form(teacher.to("meta")) == "split" and len(asked) == 4
        monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
        assert form(teacher) == "split" and len(asked) == 5  # too few channels to share out
        with use_backend("cpu"):
            assert form(teacher) == "split"


@pytest.mark.parametrize("path", ["aten", "matmul"])
def test_a_choice_is_the_same_in_eager_and_compiled_calls(path):
    x = torch.randn(1, 4, 5, 5).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(6, 8, 1, 1)

    def run(x, weight):
        return elastic_conv2d(x, weight, in_channels=4, out_channels=3)

    def operators(run) -> set[str]:
        with torch.no_grad(), Dispatched() as dispatched:
            torch.testing.assert_close(run(x, weight), torch.nn.functional.conv2d(x, weight[:3, :4]))
        return {"matmul" if "mm" in name else "aten" for name in dispatched.names if "mm" in name or "conv" in name}

    region = elastic_kernels.region(elastic_kernels.call_of(x, Channels(4), Channels(3), (1, 1), 1, 0, 1, 1))
    with tuned(elastic_kernels.NAME, **{region: path}):
        torch._dynamo.reset()
        compiled = torch.compile(run, backend="eager", fullgraph=True)
        compiled(x, weight)
        assert operators(run) == operators(compiled) == {path, "aten"}  # the conv2d that it is compared with


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_backend_is_the_same_in_eager_and_compiled_calls(monkeypatch, name):
    if _backend.available("pearson")["cpu"] is not None:
        pytest.skip("jdkd._C is not built")
    ran = []

    def noted(backend: str, run: Callable) -> Callable:
        return lambda *given: (ran.append(backend), run(*given))[1]

    for backend, run in pearson._FORWARD.items():
        monkeypatch.setitem(pearson._FORWARD, backend, noted(backend, run))
    levels = [torch.randn(1, 4, 5, 5) for _ in range(2)]
    with tuned("pearson", **{"loss, float32, contiguous, <1 MiB a level": name}):
        pkd_loss(*levels)
        ran.clear()  # a check runs it too
        torch._dynamo.reset()
        compiled = torch.compile(pkd_loss, backend="eager", fullgraph=True)
        for run in (pkd_loss, compiled, compiled):
            run(*levels)
    assert ran == [name] * 3


def test_no_measurement_sends_a_call_to_a_form_that_does_not_take_it():
    levels = [torch.zeros(1, 2, 3, 3)]
    changes = (({"masked": True}, "moments"), ({"tap": True}, "tap"), ({"grouped": True}, "moments"))
    alike = pearson_forms.TABLE._replace(region=lambda call: "float32, <1 MiB")
    for name in ("single pass", "split", "tap"):
        with tuned("pearson forms", **{"float32, <1 MiB": name}):
            for change, form in changes:
                call = pearson_forms.LossCall(levels, levels, "students")._replace(**change)
                assert pearson_forms.select(call) == alike.choose(call)[0].name == form
