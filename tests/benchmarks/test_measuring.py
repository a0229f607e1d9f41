"""How the benchmarks check, weigh and leave out."""

import dataclasses

import pytest
import torch

from benchmarks import harness
from benchmarks.cost import Step, cost
from jdkd.ops.active_channels import Channels
from jdkd.ops.pack import Part, pack

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


def test_peak_memory_counts_buffers_that_are_mapped_otherwise():
    weight = torch.ones(1024, 2048)
    found = cost(lambda given: pack([given], [Part(Channels(512))], torch.float32), weight, "cpu")
    assert found.peak_bytes >= 512 * 2048 * 4


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


def test_as_many_sets_as_make_what_a_provider_touches_three_times_the_cache():
    image, exact = torch.ones(MEGABYTE), [torch.ones(MEGABYTE)]  # 4 MB each; least_bytes is what a slim one touches
    case = dataclasses.replace(case_of(eager=twice, ours=twice), least_bytes=MEGABYTE)
    assert harness._number_of_sets(case, image, exact, 50 * MEGABYTE, 1 << 40) == 150
    assert harness._number_of_sets(case, image, exact, 50 * MEGABYTE, 16 * 2 * 10 * MEGABYTE) == 10, "half the memory"
    assert harness._number_of_sets(case, image, exact, 50 * MEGABYTE, 0) == 2
    whole = dataclasses.replace(case, least_bytes=1 << 30)
    assert harness._number_of_sets(whole, image, exact, 50 * MEGABYTE, 1 << 40) == 38, "inputs count once"


class Gpu:
    """Stands in for a GPU; a launch keeps the host busy for ``hosts`` cycles."""

    def __init__(self, monkeypatch, hosts):
        self.asked, self.asleep, self.hosts = [], 0, hosts
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(self))

    def sleep(self, cycles):
        self.asleep = cycles
        self.asked.append(cycles)

    def launch(self):
        self.asleep -= self.hosts
        self.asked.append("launch")


class Event:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.gpu.asked.append("event")

    def query(self):
        return self.gpu.asleep <= 0

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 7.0


def test_a_launch_is_queued_behind_a_sleep_that_outlasts_it(monkeypatch):
    gpu = Gpu(monkeypatch, hosts=150_000)
    watch = harness.Stopwatch()
    assert watch(gpu.launch) == 7e-3
    behind = ["event", "launch", "event"]
    assert gpu.asked == [100_000, *behind, 200_000, *behind]
    watch(gpu.launch)
    assert gpu.asked[8:] == [200_000, *behind], "the next launch knows how long"


@pytest.mark.parametrize("waits", [False, True])
def test_a_launch_that_no_sleep_outlasts_is_timed_all_the_same(waits, monkeypatch):
    gpu = Gpu(monkeypatch, hosts=1 << 60)
    assert harness.Stopwatch()(gpu.launch, waits) == 7e-3
    assert len(gpu.asked) == (4 if waits else 4 * 12)


def test_bytes_of_inputs_count_every_tensor_once():
    image, norm = torch.ones(8), torch.nn.BatchNorm1d(2)
    norm.inside = [norm]  # a module may lead back to itself, as packed layers do
    own = 2 * (2 * 4) + 2 * (2 * 4) + 8  # weight and bias, running mean and variance, and how many batches
    assert harness._nbytes({"a": [image, (image, "P3", 2, None)], "net": norm, "again": norm}) == 32 + own
