"""How the benchmarks check, weigh and leave out."""

import dataclasses

import pytest
import torch

from benchmarks import harness
from benchmarks.cost import Step, cost

MEGABYTE = 1 << 20


def case_of(**providers):
    return harness.Case(
        op="twice",
        label="P7",
        mode="forward",
        dtype=torch.float32,
        layout="NCHW",
        make=lambda: torch.ones(8),
        exact=lambda given: [given * 2],
        providers=providers,
        least_bytes=64,
    )


def twice(given):
    return [given + given]


def fail(given):
    raise RuntimeError("no such kernel")


def test_what_computes_something_else_is_not_timed():
    case = case_of(eager=twice, ours=lambda given: [given * 2.01])
    with pytest.raises(harness.Disagreement, match="output 0 of ours errs by"):
        harness.measure(case, "cpu", 0)


def test_a_loose_provider_may_err_and_its_timing_says_by_how_much():
    case = dataclasses.replace(case_of(eager=twice, theirs=lambda given: [given * 2.2]), loose=("theirs",))
    eager, theirs = harness.measure(case, "cpu", 0)
    assert (eager.error, theirs.error) == (0, pytest.approx(0.1, rel=1e-5))


@pytest.mark.parametrize("wrong", [fail, lambda given: [given * 3], lambda given: []])
def test_a_loose_provider_that_fails_is_left_out_with_its_reason(wrong, capsys):
    case = dataclasses.replace(case_of(eager=twice, theirs=wrong, ours=twice), loose=("theirs",))
    assert [timing.provider for timing in harness.measure(case, "cpu", 0)] == ["eager", "ours"]
    assert "theirs is left out" in capsys.readouterr().err


def test_host_time_is_that_of_tiny_inputs():
    asked = []

    def provider(given):
        asked.append(given.numel())
        return [given * 2]

    case = dataclasses.replace(case_of(eager=provider), tiny=lambda: torch.ones(1))
    (timing,) = harness.measure(case, "cpu", 0)
    assert timing.host_seconds > 0 and asked.count(1) > harness.TINY_CALLS


def test_peak_memory_counts_what_is_released_again_and_no_inputs():
    def provider(given):
        work = given.new_empty(4 * MEGABYTE, dtype=torch.uint8)
        del work
        return [given.new_empty(MEGABYTE, dtype=torch.uint8)]

    given = torch.ones(8 * MEGABYTE, dtype=torch.uint8)
    found = cost(provider, given, "cpu")
    assert found.peak_bytes == 4 * MEGABYTE and found.kept_bytes is None and found.kernels is None


def test_peak_memory_sees_inside_an_operator():
    given = torch.ones(512, 512)
    found = cost(lambda given: [given.logsumexp(1)], given, "cpu")  # a row of results, and a whole image on the way
    assert found.peak_bytes > given.nbytes


def test_what_is_kept_for_the_backward_counts_once_and_without_inputs():
    def forward(given):
        # The product keeps the input, which does not count; the exponential and the sine both keep what lies between.
        return [(given * given).exp().sin().sum()]

    def backward(given, outputs):
        return torch.autograd.grad(outputs, [given])

    given = torch.ones(MEGABYTE, requires_grad=True)
    found = cost(Step(forward, backward), given, "cpu")
    assert found.kept_bytes == pytest.approx(given.nbytes, rel=1e-4)


def test_nothing_is_kept_without_a_graph():
    found = cost(Step(lambda given: [given * 2], lambda given, outputs: outputs), torch.ones(8), "cpu")
    assert found.kept_bytes is None


def test_an_operator_counts_once_whatever_it_calls():
    found = cost(lambda given: [torch.nn.functional.conv2d(given, given).relu()], torch.ones(1, 1, 2, 2), "cpu")
    assert found.dispatched_ops == 2


def test_bytes_of_inputs_count_every_tensor_once():
    image, norm = torch.ones(8), torch.nn.BatchNorm1d(2)
    norm.inside = [norm]  # a module may lead back to itself, as packed layers do
    own = 2 * (2 * 4) + 2 * (2 * 4) + 8  # weight and bias, running mean and variance, and how many batches
    assert harness._nbytes({"a": [image, (image, "P3", 2, None)], "net": norm, "again": norm}) == 32 + own
