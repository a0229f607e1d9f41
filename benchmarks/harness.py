"""How a kernel is timed against its competitors.

A :class:`Case` is data: inputs, an exact result, providers (the eager baseline first) and the bytes that anybody must
move. Providers must agree with the exact result before anything is timed. They take turns in every round, so that
whatever else the machine does meets them all alike.

On a GPU a round replays a CUDA graph that runs a provider over several sets of inputs, together at least
three times the L2 cache, so that data comes from memory; outputs are poisoned and compared again after the
last replay, which shows that the graph did touch every set. Host time per call is measured apart, without
the graph.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Provider = Callable[[Any], Sequence[Tensor]]
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-3, torch.float16: 5e-3}
# The baseline is what people run today, and in half precision it may be far off: the eager Pearson loss errs by 10 % in
# float16. It is timed all the same, and its row says by how much it errs.
BASELINE_TOLERANCE = 0.2
MIN_ROUNDS, MAX_ROUNDS = 5, 200


@dataclass(frozen=True)
class Case:
    """One size of one operator in one mode.

    Args:
        op: noun stem of the operator.
        label: where the size occurs, such as ``P3 N=2``.
        mode: ``forward`` or ``forward+backward``.
        dtype: of the features.
        layout: ``NCHW`` or ``channels-last``.
        make: draws one set of inputs on the device.
        exact: from inputs to the outputs that all providers are held to, in float32.
        providers: from inputs to outputs; the first is the baseline.
        least_bytes: what any implementation must read and write.
    """

    op: str
    label: str
    mode: str
    dtype: torch.dtype
    layout: str
    make: Callable[[], Any]
    exact: Provider
    providers: Mapping[str, Provider]
    least_bytes: int

    def __str__(self) -> str:
        return f"{self.op} {self.label} {str(self.dtype)[6:]} {self.layout} {self.mode}"


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one provider: all samples, and the host's share where it was measured apart.

    ``error`` is the largest difference of an output from the exact one, in norm, relative.
    """

    provider: str
    seconds: list[float]
    error: float
    host_seconds: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def quartiles(self) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self.seconds, n=4) if len(self.seconds) > 1 else self.seconds * 3
        return low, high


class Disagreement(AssertionError):
    """A provider computes something else than the baseline."""


def check_agreement(case: Case, name: str, outputs: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Compares a provider's outputs with the exact ones, in norm.

    Returns:
        The largest relative difference.

    Raises:
        Disagreement: if it is too large, with the provider and the size of the difference.
    """
    if len(outputs) != len(exact):
        raise Disagreement(f"{case}: {name} returns {len(outputs)} outputs, expected are {len(exact)}")
    allowed = BASELINE_TOLERANCE if name == next(iter(case.providers)) else TOLERANCES[case.dtype]
    worst = 0.0
    for index, (ours, theirs) in enumerate(zip(outputs, exact, strict=True)):
        error = (torch.dist(ours.double(), theirs.double()) / torch.linalg.vector_norm(theirs.double())).item()
        if not error <= allowed:
            raise Disagreement(f"{case}: output {index} of {name} errs by {error:.2e}; {allowed:.0e} is allowed")
        worst = max(worst, error)
    return worst


def measure(case: Case, device: str, seconds: float) -> list[Timing]:
    """Checks and times all providers of a case.

    Args:
        case: what to time.
        device: ``cpu`` or ``cuda``.
        seconds: how long the rounds may take, together; at least :data:`MIN_ROUNDS` are run.

    Returns:
        One timing a provider, the baseline's first.

    Raises:
        Disagreement: if a provider computes something else.
    """
    return _measure_gpu(case, seconds) if device == "cuda" else _measure_cpu(case, seconds)


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written, of a plain copy that no cache holds: the yardstick of a process."""
    size = (256 if device == "cpu" else 1024) << 20
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    samples = []
    for _ in range(12):
        if device == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            target.copy_(source)
            end.record()
            end.synchronize()
            samples.append(begin.elapsed_time(end) / 1e3)
        else:
            begin_time = time.perf_counter()
            target.copy_(source)
            samples.append(time.perf_counter() - begin_time)
    return 2 * source.numel() / statistics.median(samples[2:])


def _rounds(runs: Mapping[str, Callable[[], float]], seconds: float) -> dict[str, list[float]]:
    """Samples of every run, which take turns; every other round in the reverse order."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    deadline = time.perf_counter() + seconds
    for number in range(MAX_ROUNDS):
        if number >= MIN_ROUNDS and time.perf_counter() > deadline:
            break
        order = list(runs) if number % 2 == 0 else list(reversed(runs))
        for name in order:
            samples[name].append(runs[name]())
    return samples


def _measure_cpu(case: Case, seconds: float) -> list[Timing]:
    inputs = case.make()
    exact = case.exact(inputs)
    errors = {  # also the warm-up
        name: check_agreement(case, name, provider(inputs), exact) for name, provider in case.providers.items()
    }
    del exact

    def timed(provider: Provider) -> float:
        begin = time.perf_counter()
        provider(inputs)
        return time.perf_counter() - begin

    runs = {name: lambda provider=provider: timed(provider) for name, provider in case.providers.items()}
    return [Timing(name, samples, errors[name]) for name, samples in _rounds(runs, seconds).items()]


def _measure_gpu(case: Case, seconds: float) -> list[Timing]:
    first = case.make()
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    count = max(2, min(256, math.ceil(3 * l2 / _nbytes(first))))
    sets = [first, *(case.make() for _ in range(count - 1))]
    exact = [case.exact(inputs) for inputs in sets]
    graphs, outputs, host = {}, {}, {}
    for name, provider in case.providers.items():
        graphs[name], outputs[name] = _captured(provider, sets)
        host[name] = _host_seconds(provider, first)

    def timed(name: str) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graphs[name].replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / count

    def verified(name: str) -> float:
        for output in (output for of_set in outputs[name] for output in of_set):
            output.fill_(float("nan"))
        graphs[name].replay()
        pairs = zip(outputs[name], exact, strict=True)
        return max(check_agreement(case, name, found, wanted) for found, wanted in pairs)

    errors = {name: verified(name) for name in graphs}
    samples = _rounds({name: lambda name=name: timed(name) for name in graphs}, seconds)
    errors = {name: max(errors[name], verified(name)) for name in graphs}
    return [Timing(name, samples[name], errors[name], host[name]) for name in graphs]


def _nbytes(inputs: Any) -> int:
    """Bytes of all tensors in nested inputs."""
    if isinstance(inputs, Tensor):
        return inputs.numel() * inputs.element_size()
    if isinstance(inputs, Mapping):
        inputs = inputs.values()
    elif not isinstance(inputs, Sequence):
        inputs = getattr(inputs, "__dict__", {}).values()
    return sum(_nbytes(part) for part in inputs if not isinstance(part, str | int | float | bool | None))


def _captured(provider: Provider, sets: Sequence[Any]) -> tuple[torch.cuda.CUDAGraph, list[Sequence[Tensor]]]:
    """A graph that runs the provider over all sets, and the outputs it writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            provider(sets[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [provider(inputs) for inputs in sets]
    return graph, outputs


def _host_seconds(provider: Provider, inputs: Any) -> float:
    """How long the host is busy with one call, the device left behind."""
    samples = []
    for _ in range(20):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        provider(inputs)
        samples.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return statistics.median(samples)
