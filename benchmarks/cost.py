"""What a call costs besides its time: memory, and what it launches.

Memory is counted where it is handed out, by the caching allocator on a GPU and by the profiler's record of the CPU
allocator, so that compiled graphs and C++ operators are counted like everything else. Inputs do not count, outputs do.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from jdkd.ops import host_memory

Provider = Callable[[Any], Sequence[Tensor]]


@dataclass(frozen=True)
class Step:
    """A provider in two halves, so that what lives between them can be weighed.

    Args:
        forward: from inputs to tensors that hold the graph.
        backward: from inputs and those to the outputs.
    """

    forward: Callable[[Any], Sequence[Tensor]]
    backward: Callable[[Any, Sequence[Tensor]], Sequence[Tensor]]

    def __call__(self, inputs: Any) -> Sequence[Tensor]:
        return self.backward(inputs, self.forward(inputs))


@dataclass(frozen=True)
class Cost:
    """What one call takes.

    Args:
        peak_bytes: most memory in use at once, beyond the inputs, outputs included.
        kept_bytes: memory that lives between forward and backward, beyond the inputs; None where there is no such time.
        kernels: kernels, copies and fills on the GPU; None on a CPU, or where the profiler may not see them.
        dispatched_ops: operators that torch dispatched, the outermost only; loops that torch.compile generated are not
            dispatched, and not counted. None on a GPU.
    """

    peak_bytes: int
    kept_bytes: int | None
    kernels: int | None
    dispatched_ops: int | None


def cost(provider: Provider, inputs: Any, device: str) -> Cost:
    """Weighs one call of a provider that has been called before with the same inputs.

    Args:
        provider: what to call; :attr:`Cost.kept_bytes` needs a :class:`Step`.
        inputs: what to call it with.
        device: ``cpu`` or ``cuda``.
    """
    return _cost_gpu(provider, inputs) if device == "cuda" else _cost_cpu(provider, inputs)


def host_seconds(provider: Provider, inputs: Any, device: str, calls: int = 20, seconds: float = math.inf) -> float:
    """How long the host is busy with one call: a median. On a CPU it takes inputs of next to no size to see that.

    Of ``calls`` calls, or of as many as begin within ``seconds``.
    """
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    samples, deadline = [], time.perf_counter() + seconds
    while len(samples) < calls and (not samples or time.perf_counter() < deadline):
        wait()
        begin = time.perf_counter()
        provider(inputs)
        samples.append(time.perf_counter() - begin)
    wait()
    return statistics.median(samples)


def _cost_cpu(provider: Provider, inputs: Any) -> Cost:
    kept = None
    if isinstance(provider, Step):
        outputs, sizes, _ = _profiled(lambda: provider.forward(inputs))
        kept = sizes[-1] if _holds_graph(outputs) else None
        del outputs
    _, sizes, operators = _profiled(lambda: provider(inputs))
    return Cost(max(sizes), kept, None, operators)


def _cost_gpu(provider: Provider, inputs: Any) -> Cost:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, kept = torch.cuda.memory_allocated(), None
    if isinstance(provider, Step):
        held = provider.forward(inputs)
        kept = torch.cuda.memory_allocated() - before if _holds_graph(held) else None
        held = provider.backward(inputs, held)
    else:
        held = provider(inputs)
    peak = torch.cuda.max_memory_allocated() - before
    del held
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as record:
        provider(inputs)
        torch.cuda.synchronize()
    on_device = [event for event in record.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = sum(not event.is_user_annotation for event in on_device)
    return Cost(peak, kept, kernels or None, None)


def _holds_graph(outputs: Sequence[Tensor]) -> bool:
    return any(output.requires_grad for output in outputs)


def _profiled(call: Callable[[], Sequence[Tensor]]) -> tuple[Sequence[Tensor], list[int], int]:
    """What a call returns, the bytes in use after every allocation and release, and how many operators it ran.

    Buffers that jdkd would map itself come from torch here, which sees no others.
    """
    with (
        mock.patch.object(host_memory, "MAPPED_FROM", math.inf),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record,
    ):
        outputs = call()
    # FunctionEvents add up what happens inside an operator, where the peak may lie; the events beneath do not.
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = list(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    return outputs, sizes or [0], sum(_outermost(event) for event in record.events())


def _outermost(event: Any) -> bool:
    """Whether an event is an operator, and called by none."""
    if not _is_operator(event.name):
        return False
    while (event := event.cpu_parent) is not None:
        if _is_operator(event.name):
            return False
    return True


def _is_operator(name: str) -> bool:
    return "::" in name and not name.startswith(("autograd::", "torch::"))
