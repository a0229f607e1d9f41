"""How a kernel is timed against its competitors.

A :class:`Case` is data: inputs, an exact result, providers (the eager baseline first) and the bytes that anybody must
move. Providers must agree with the exact result before anything is timed. They take turns in every round, so that
whatever else the machine does meets them all alike; on a CPU a plain copy, the yardstick, takes its turn with them.

On a GPU a round replays a CUDA graph that runs a provider over several sets of inputs, of which anybody touches at
least three times the L2 cache, so that data comes from memory; it is queued behind a sleep, so that the host's launch
is not timed. Outputs are poisoned and compared again after the last replay, which shows that the graph did touch every
set. Host time per call is measured apart, without the graph; on a CPU on inputs so small that the host's work is all
there is. What makes the host wait no graph can hold: it is called instead, and its row says so. What else a call costs
is in :mod:`benchmarks.cost`.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cost import Cost, Provider, cost, host_seconds

TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-3, torch.float16: 5e-3}
# What people run today may be far off in half precision: the eager Pearson loss errs by 10 % in float16. It is timed
# all the same, and its row says by how much it errs.
LOOSE_TOLERANCE = 0.2
TINY_CALLS, TINY_SECONDS = 200, 1.0
WAITS = "called without a CUDA graph, which cannot hold what the host waits for"
MIN_ROUNDS, MAX_ROUNDS = 5, 200
YARDSTICK = "a plain copy"
COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
MAX_SLEEP = 1 << 27  # cycles of a GPU, about a tenth of a second


@dataclass(frozen=True)
class Case:
    """One size of one operator in one mode.

    Args:
        op: noun stem of the operator.
        label: where the size occurs, such as ``P3 N=2``.
        mode: ``forward``, ``forward+backward`` or another.
        dtype: of the features.
        layout: ``NCHW`` or ``channels-last``.
        make: draws one set of inputs on the device.
        exact: from inputs to the outputs that all providers are held to, in float32.
        providers: from inputs to outputs; the first is the baseline. What a row should say besides may be an attribute
            ``note``, and what a provider counted one ``counts``, read after the last call.
        least_bytes: what any implementation must read and write, where forward and backward are calls of their own
            and nothing stays in a cache between them.
        loose: providers that are held only to :data:`LOOSE_TOLERANCE`, as the baseline always is; one of them that errs
            by more, or does not run, is left out, and the others are timed.
        tiny: draws inputs of next to no size, for the host's time on a CPU.
        waits: providers that make the host wait for the device.
        tolerance: relative error allowed to those that are not loose, where :data:`TOLERANCES` does not fit.
        restore: sets what providers add to back to what it was drawn as, before they are checked; it is not timed.
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
    loose: Collection[str] = ()
    tiny: Callable[[], Any] | None = None
    waits: Collection[str] = ()
    tolerance: float | None = None
    restore: Callable[[Any], None] | None = None

    def __str__(self) -> str:
        return f"{self.op} {self.label} {str(self.dtype)[6:]} {self.layout} {self.mode}"


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one provider: all samples, the host's share where it was measured apart, and other costs.

    ``error`` is the largest difference of an output from the exact one, in norm, relative; ``note`` is what else there
    is to say, ``counts`` what the provider counted, and ``copy_bytes_per_s`` the yardstick, where a plain copy took its
    turns among the providers.
    """

    provider: str
    seconds: list[float]
    error: float
    host_seconds: float | None = None
    cost: Cost | None = None
    note: str | None = None
    counts: Mapping[str, int] | None = None
    copy_bytes_per_s: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def quartiles(self) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self.seconds, n=4) if len(self.seconds) > 1 else self.seconds * 3
        return low, high


class Disagreement(AssertionError):
    """A provider computes something else than it should."""


def check_agreement(case: Case, name: str, outputs: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Compares a provider's outputs with the exact ones, in norm.

    Returns:
        The largest relative difference.

    Raises:
        Disagreement: if it is too large, with the provider and the size of the difference.
    """
    if len(outputs) != len(exact):
        raise Disagreement(f"{case}: {name} returns {len(outputs)} outputs, expected are {len(exact)}")
    loose = name in case.loose or name == next(iter(case.providers))
    allowed = LOOSE_TOLERANCE if loose else case.tolerance or TOLERANCES[case.dtype]
    worst = 0.0
    for index, (ours, theirs) in enumerate(zip(outputs, exact, strict=True)):
        error = (torch.dist(ours.double(), theirs.double()) / torch.linalg.vector_norm(theirs.double())).item()
        if not error <= allowed:
            raise Disagreement(f"{case}: output {index} of {name} errs by {error:.2e}; {allowed:.0e} is allowed")
        worst = max(worst, error)
    return worst


def measure(case: Case, device: str, seconds: float, wrong: dict[str, str] | None = None) -> list[Timing]:
    """Checks and times all providers of a case.

    Args:
        case: what to time.
        device: ``cpu`` or ``cuda``.
        seconds: how long the rounds may take, together; at least :data:`MIN_ROUNDS` are run.
        wrong: filled with what is wrong with providers that are not loose, by their names; the others are timed.

    Returns:
        One timing a provider, the baseline's first.

    Raises:
        Disagreement: if a provider that is not loose computes something else, and ``wrong`` is not given.
    """
    return _measure_gpu(case, seconds, wrong) if device == "cuda" else _measure_cpu(case, seconds, wrong)


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read and written, of a plain copy that no cache holds: the yardstick of a process."""
    copy, watch = copying(device), Stopwatch() if device == "cuda" else clocked
    return 2 * COPY_BYTES[device] / statistics.median([watch(copy) for _ in range(12)][2:])


def copying(device: str) -> Callable[[], Tensor]:
    """A plain copy of :data:`COPY_BYTES` that was run once.

    The bytes are random: constant ones are moved faster, and would flatter whoever is measured by them.
    """
    source = copied(COPY_BYTES[device], device)
    target = source.clone()
    return lambda: target.copy_(source)


def copied(size: int, device: str) -> Tensor:
    """``[size]`` random bytes."""
    return torch.randint(256, (size,), dtype=torch.uint8, device=device)


def clocked(run: Callable[[], Any]) -> float:
    """Seconds that a call takes on the host."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


class Stopwatch:
    """Seconds that a GPU takes for what is launched, without the host's time for the launch.

    The launch is queued behind a sleep. Where that ends before all is queued, the launch is repeated behind a longer
    one.
    """

    def __init__(self) -> None:
        self.cycles = 100_000

    def __call__(self, launch: Callable[[], Any], waits: bool = False) -> float:
        """Times a launch; ``waits``: it makes the host wait, so that no sleep can hide it."""
        while True:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(self.cycles)
            begin.record()
            launch()
            end.record()
            late = begin.query()
            end.synchronize()
            if waits or not late or self.cycles >= MAX_SLEEP:
                return begin.elapsed_time(end) / 1e3
            self.cycles *= 2


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


def _measure_cpu(case: Case, seconds: float, wrong: dict[str, str] | None) -> list[Timing]:
    inputs = case.make()
    exact = case.exact(inputs)
    # The check is also the warm-up.
    errors = _of_each(case, lambda name, provider: check_agreement(case, name, provider(inputs), exact), wrong)

    # The copy takes turns too, as a machine's bandwidth need not be now what it was when the process began.
    runs = {YARDSTICK: copying("cpu")} | {name: partial(case.providers[name], inputs) for name in errors}
    samples = _rounds({name: partial(clocked, run) for name, run in runs.items()}, seconds)
    copied_per_s = 2 * COPY_BYTES["cpu"] / statistics.median(samples[YARDSTICK])
    costs = {name: cost(case.providers[name], inputs, "cpu") for name in errors}
    host = dict.fromkeys(errors)
    if case.tiny is not None:
        tiny = case.tiny()
        for name in errors:
            case.providers[name](tiny)
            host[name] = host_seconds(case.providers[name], tiny, "cpu", TINY_CALLS, TINY_SECONDS)
    return [
        Timing(
            name,
            samples[name],
            errors[name],
            host[name],
            costs[name],
            _note(case, name),
            _counts(case, name),
            copied_per_s,
        )
        for name in errors
    ]


def _measure_gpu(case: Case, seconds: float, wrong: dict[str, str] | None) -> list[Timing]:
    gc.collect()  # what the case before left behind, so that its memory is free
    torch.cuda.empty_cache()
    first = case.make()
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    exact = [case.exact(first)]
    count = _number_of_sets(case, first, exact[0], l2, torch.cuda.mem_get_info()[0])
    sets = [first, *(case.make() for _ in range(count - 1))]
    exact += [case.exact(inputs) for inputs in sets[1:]]
    captured, watch = {}, Stopwatch()

    def replay(name: str) -> float:
        return watch(captured[name][0].replay, waits=name in case.waits) / count

    def verified(name: str, _: Provider | None = None) -> float:
        graph, outputs = captured[name]
        for output in (output for of_set in outputs for output in of_set):
            output.fill_(float("nan"))
        for inputs in sets if case.restore else ():
            case.restore(inputs)
        graph.replay()
        return max(check_agreement(case, name, found, wanted) for found, wanted in zip(outputs, exact, strict=True))

    def prepared(name: str, provider: Provider) -> tuple[float, float, Cost]:
        captured[name] = _called(provider, sets) if name in case.waits else _captured(provider, sets)
        return verified(name), host_seconds(provider, first, "cuda"), cost(provider, first, "cuda")

    found = _of_each(case, prepared, wrong)
    samples = _rounds({name: lambda name=name: replay(name) for name in found}, seconds)
    later = _of_each(case, verified, wrong, found)
    return [
        Timing(name, samples[name], max(error, later[name]), host, costs, _note(case, name, WAITS), _counts(case, name))
        for name, (error, host, costs) in found.items()
        if name in later
    ]


def _number_of_sets(case: Case, inputs: Any, exact: Sequence[Tensor], l2: int, free: int) -> int:
    """How many sets of inputs make what any provider touches three times the L2 cache, if half of the free memory holds
    them with the exact outputs and those of every provider.

    Args:
        case: what is timed; providers may leave a part of the inputs alone, but not its ``least_bytes``.
        inputs, exact: one set, and its exact outputs.
        l2, free: bytes of the cache and of the memory that is free.
    """
    own = _nbytes(inputs)
    each = own + (1 + len(case.providers)) * _nbytes(exact)
    return max(2, min(math.ceil(3 * l2 / min(own, case.least_bytes)), free // 2 // each))


def _note(case: Case, name: str, of_waiting: str | None = None) -> str | None:
    """What a row of the provider says besides."""
    notes = [getattr(case.providers[name], "note", None), of_waiting if name in case.waits else None]
    return "; ".join(filter(None, notes)) or None


def _counts(case: Case, name: str) -> Mapping[str, int] | None:
    """What a provider counted itself."""
    return getattr(case.providers[name], "counts", None)


def _of_each(
    case: Case,
    ask: Callable[[str, Provider], Any],
    wrong: dict[str, str] | None,
    names: Collection[str] | None = None,
) -> dict[str, Any]:
    """What every provider, or those of ``names``, answers, in their order, without the loose ones that fail; and
    without the others that do, if ``wrong`` is there to say why."""
    answers = {}
    for name, provider in case.providers.items():
        if names is not None and name not in names:
            continue
        try:
            answers[name] = ask(name, provider)
        except Exception as error:  # whatever a compiler raises
            if name not in case.loose:
                if wrong is None:
                    raise
                wrong[name] = f"{type(error).__name__}: {error}"
            print(f"  {name} is left out: {type(error).__name__}: {error}", file=sys.stderr)
    return answers


def _nbytes(inputs: Any) -> int:
    """Bytes of all tensors in nested inputs, each once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(inputs, set()))


def _tensors(inputs: Any, seen: set[int]) -> Iterator[Tensor]:
    """The tensors in nested inputs that were not seen before; of a module its parameters and buffers."""
    if isinstance(inputs, str | int | float | bool | None) or id(inputs) in seen:
        return
    seen.add(id(inputs))
    if isinstance(inputs, Tensor):
        yield inputs
        return
    if isinstance(inputs, nn.Module):
        parts = itertools.chain(inputs.parameters(), inputs.buffers())
    elif isinstance(inputs, Mapping):
        parts = inputs.values()
    elif isinstance(inputs, Sequence):
        parts = inputs
    else:
        parts = getattr(inputs, "__dict__", {}).values()
    for part in parts:
        yield from _tensors(part, seen)


@dataclass(frozen=True)
class _Calls:
    """Stands in for a graph of what none can hold."""

    provider: Provider
    sets: Sequence[Any]
    outputs: list[Sequence[Tensor]]

    def replay(self) -> None:
        self.outputs[:] = [self.provider(inputs) for inputs in self.sets]


def _called(provider: Provider, sets: Sequence[Any]) -> tuple[_Calls, list[Sequence[Tensor]]]:
    """Calls of the provider over all sets, and the outputs of the last ones."""
    outputs: list[Sequence[Tensor]] = []
    calls = _Calls(provider, sets, outputs)
    calls.replay()
    return calls, outputs


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
