"""The checks that a kernel has to pass: a device on which kernels are wrong, and planted bugs."""

from __future__ import annotations

import pytest
import torch

from jdkd import _backend, _verdicts
from jdkd.functional import pkd_loss
from jdkd.notices import Notice
from jdkd.ops import elastic_check, elastic_pointwise, pack_operators, pearson, pearson_check, pearson_single
from jdkd.reference import pearson as reference

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("nothing_known")


def levels(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    student, teacher = (torch.randn(2, 3, 9, 7).to(dtype) for _ in range(2))
    return student.requires_grad_(), teacher


@pytest.fixture
def wrong_device(monkeypatch):
    """A device on which the compiled Pearson kernels err by a thousandth."""
    if "cpu" not in _backend.available("pearson") or _backend.available("pearson")["cpu"] is not None:
        pytest.skip("jdkd._C is not built")
    forward, backward = pearson._FORWARD["cpu"], pearson._BACKWARD["cpu"]
    runs: list[str] = []

    def wrong_fwd(students, *given):
        runs.append("loss")
        loss, *rest = forward(students, *given)
        return loss * 1.001, *rest

    def wrong_bwd(*given):
        runs.append("gradient")
        return [dx * 1.001 for dx in backward(*given)]

    monkeypatch.setitem(pearson._FORWARD, "cpu", wrong_fwd)
    monkeypatch.setitem(pearson._BACKWARD, "cpu", wrong_bwd)
    return runs


def test_on_a_device_whose_kernels_are_wrong_the_reference_runs(wrong_device):
    student, teacher = levels()

    def step() -> torch.Tensor:
        student.grad = None
        loss = pkd_loss(student, teacher)
        loss.backward()
        return loss

    with pytest.warns(Notice) as told:
        step()
    loss = step()
    assert sorted(str(line.message).partition(" is left out")[0] for line in told) == [
        "cpu pearson (gradient, float32)", "cpu pearson (loss, float32)",
    ]  # fmt: skip
    assert wrong_device == ["loss", "gradient"]  # one run of each, by its check
    exact_student = student.detach().double().requires_grad_()
    exact = reference.pkd_loss([exact_student], [teacher.double()])
    exact.backward()
    torch.testing.assert_close(loss, exact.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(student.grad, exact_student.grad.float(), rtol=1e-5, atol=1e-8)


def test_a_wrong_kernel_is_caught_at_run_time_of_a_compiled_program_too(wrong_device):
    student, teacher = levels()
    torch._dynamo.reset()
    with pytest.warns(Notice):
        loss = torch.compile(pkd_loss, backend="aot_eager", fullgraph=True)(student, teacher)
    torch.testing.assert_close(loss, reference.pkd_loss([student], [teacher]), rtol=1e-6, atol=0)


def test_the_command_line_checks_all_and_says_wrong_with_its_exit_code(wrong_device, capsys, monkeypatch):
    pytest.importorskip("tyro")
    from jdkd.cli import main

    monkeypatch.setenv("COLUMNS", "220")
    monkeypatch.setattr(
        _backend, "subjects", lambda op, backend, device, of=_backend.subjects: of(op, backend, device)[:1]
    )
    assert main(["check"]) == 1
    (row,) = (line for line in capsys.readouterr().out.splitlines() if " pearson " in line and " cpu " in line)
    assert "wrong" in row and "1.0e-03 of 1.5e-05" in row and "loss" in row


def test_every_planted_bug_is_caught():
    def forward(students, *given):
        return reference.pearson_fwd(students, *given)

    def without_a_tail(students, teachers, *given):
        cut = [[level[..., :-1, :] if level.shape[2] > 1 else level for level in side] for side in (students, teachers)]
        return reference.pearson_fwd(*cut, *given)

    def of_another_layout(*given):
        dx = reference.pearson_bwd(*given)
        return [d if d.is_contiguous() else torch.empty_like(d).copy_(d.flip(0)) for d in dx]

    def of_unaligned_levels(dloss, x, y, *given):
        dx = reference.pearson_bwd(dloss, x, y, *given)
        return [d if level.data_ptr() % 16 == 0 else d.roll(1, -1) for d, level in zip(dx, x, strict=True)]

    def without_heads(dloss, x, y, table, dout):
        return reference.pearson_bwd(dloss, x, y, table)

    def judge(kind, run, dtype=torch.float32):
        return _verdicts.judged(kind(run, CPU, dtype)).state

    for dtype in pearson._DTYPES:
        assert (
            judge(pearson_check.loss, forward, dtype)
            == judge(pearson_check.tap, reference.pearson_bwd, dtype)
            == "right"
        )
        assert judge(pearson_check.loss, without_a_tail, dtype) == "wrong"
        assert judge(pearson_check.gradient, of_another_layout, dtype) == "wrong"
        assert judge(pearson_check.gradient, of_unaligned_levels, dtype) == "wrong"
        assert judge(pearson_check.tap, without_heads, dtype) == "wrong"
    single = pearson_single._reference_single
    assert judge(pearson_check.single_pass, single) == "right"
    assert judge(pearson_check.single_pass, lambda *given: (*single(*given)[:3], given[0])) == "wrong"
    assert judge(pearson_check.scale, lambda gradients, dloss: None) == "wrong"


@pytest.mark.parametrize("form", ["pack", "unpack", "unpack_add_"])
def test_a_pack_kernel_that_moves_a_part_elsewhere_is_caught(monkeypatch, form):
    run = pack_operators._CHECKS[form]
    assert _verdicts.judged(run("reference", CPU, torch.float32)).state == "right"
    right = pack_operators._plain
    monkeypatch.setattr(
        pack_operators,
        "_plain",
        lambda rows, columns, *rest: right(rows, [i if i is None else i.flip(0) for i in columns], *rest),
    )
    assert _verdicts.judged(run("reference", CPU, torch.float32)).state == "wrong"


def test_a_convolution_kernel_that_skips_its_last_channel_is_caught():
    def run(x, weight, bias, shape, in_index, out_index, *window, skipped=0):
        rows, columns = ([*range(n)] if i is None else i for i, n in ((out_index, shape[1]), (in_index, x.shape[1])))
        part = weight[rows][:, columns].clone()
        part[:, part.shape[1] - skipped :] = 0
        return torch.nn.functional.conv2d(x, part, bias[rows], *window[:3])

    assert _verdicts.judged(elastic_check.convolution(run, CPU, torch.float32)).state == "right"
    wrong = elastic_check.convolution(lambda *given: run(*given, skipped=1), CPU, torch.float32)
    assert _verdicts.judged(wrong).state == "wrong"


def test_a_1x1_kernel_whose_gradient_leaves_the_active_part_is_caught():
    def run(dout, x, weight, stride, wanted, allow_tf32):
        with _backend.use_backend("reference"):
            return elastic_pointwise._backward(dout, x, weight, stride, wanted)

    def spilling(*given):
        dx, dweight = run(*given)
        return dx, dweight + (dweight == 0)

    assert _verdicts.judged(elastic_check.pointwise_gradient(run, CPU, torch.float32)).state == "right"
    assert _verdicts.judged(elastic_check.pointwise_gradient(spilling, CPU, torch.float32)).state == "wrong"
