"""What the host does for one call of the Pearson loss, layer by layer.

    python -m benchmarks.host          prints a table
    python -m benchmarks.host --save   also appends to benchmarks/results/<device>/host.jsonl

Five levels of next to no size, so that a call is nothing but overhead. Layers take turns, and every call is timed by
itself; a figure is the first decile, in microseconds a call, as what else a machine does only adds: forward with its
graph, and both ways.

==================  ================================================================================================
kernel              the backend's functions, called directly
operator            ``torch.ops.jdkd``, which picks the backend: the dispatcher, and an implementation in Python
nothing             an ``autograd.Function`` of as many tensors that computes nothing
undispatched        the loss's ``autograd.Function`` on the backend's functions, past the dispatcher
dispatched          the loss's ``autograd.Function`` on the operators
pkd_loss            and the checks and the pairing of levels
pearson_tap         and features that go on to heads, whose gradients come back; its dispatcher left out for comparison
eager               the formula as its authors write it
==================  ================================================================================================
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks import markdown, record
from benchmarks.cases import pearson as cases
from benchmarks.cost import Step
from jdkd import _backend
from jdkd.errors import InputError
from jdkd.functional import pearson_tap, pkd_loss
from jdkd.ops import pearson
from jdkd.reference import pearson as reference

OP = "host"
SHAPES = [(1, 4, 2, 2)] * 5
SETTINGS = pearson.Settings((cases.WEIGHT,) * len(SHAPES))
CALLS = 20


class Layer(NamedTuple):
    """What is called, and whether the dispatcher is left out."""

    step: Step
    undispatched: bool = False


class _Nothing(torch.autograd.Function):
    """As many tensors as the loss has, saved and returned as they are."""

    @staticmethod
    def forward(ctx: Any, *levels: Tensor) -> Tensor:
        ctx.save_for_backward(*levels)
        return levels[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        students, teachers = ctx.saved_tensors[: len(SHAPES)], ctx.saved_tensors[len(SHAPES) :]
        return (*students, *(None for _ in teachers))


def layers(backend: str) -> dict[str, Layer]:
    """The layers of the module's docstring."""

    def function(students: Sequence[Tensor], teachers: Sequence[Tensor], weight: float) -> Tensor:
        return pearson.pearson_loss(students, teachers, SETTINGS)[0]

    def nothing(students: Sequence[Tensor], teachers: Sequence[Tensor], weight: float) -> Tensor:
        return _Nothing.apply(*students, *teachers)

    return {
        "kernel": Layer(direct(pearson._FORWARD[backend], pearson._BACKWARD[backend])),
        "operator": Layer(direct(torch.ops.jdkd.pearson_fwd, torch.ops.jdkd.pearson_bwd)),
        "nothing": Layer(cases.step(nothing)),
        "undispatched": Layer(cases.step(function), undispatched=True),
        "dispatched": Layer(cases.step(function)),
        "pkd_loss": Layer(cases.step(pkd_loss)),
        "pearson_tap, undispatched": Layer(cases.step(pearson_tap, tapped=True), undispatched=True),
        "pearson_tap": Layer(cases.step(pearson_tap, tapped=True)),
        "eager": Layer(cases.step(reference.pkd_loss)),
    }


def direct(forward: Callable[..., Any], backward: Callable[..., Any]) -> Step:
    """The two functions of a backend, or the two operators, without autograd."""

    def first(given: cases.Inputs) -> Sequence[Tensor]:
        with torch.no_grad():
            return forward(given.students, given.teachers, SETTINGS.weights, SETTINGS.eps, SETTINGS.skip_constant)

    def second(given: cases.Inputs, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        loss, _, table, _ = outputs
        with torch.no_grad():
            return backward(torch.ones_like(loss), given.students, given.teachers, table[0], [])

    return Step(first, second)


@contextlib.contextmanager
def undispatched(backend: str) -> Iterator[None]:
    """Inside, the loss calls the backend's functions where it would call the operators."""
    functions = {"pearson_fwd": pearson._FORWARD[backend], "pearson_bwd": pearson._BACKWARD[backend]}
    with mock.patch.multiple(torch.ops.jdkd, **functions):
        yield


def measure(backend: str, device: str, rounds: int) -> dict[str, tuple[float, float]]:
    """Microseconds a call of every layer, forward and both ways.

    Args:
        backend: which backend runs.
        device: ``cpu`` or ``cuda``.
        rounds: how often the layers take turns, at least 2.
    """
    given = {mode: cases.inputs(SHAPES, torch.float32, "NCHW", mode, device, 1.0) for mode in cases.MODES}
    found = layers(backend)
    samples: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in found}
    with _backend.use_backend(backend):
        for number in range(rounds + 1):
            for name, layer in found.items():
                inputs = given["tap" if name.startswith("pearson_tap") else "forward+backward"]
                with undispatched(backend) if layer.undispatched else contextlib.nullcontext():
                    for call, own in zip((layer.step.forward, layer.step), samples[name], strict=True):
                        own += seconds(call, inputs, device) if number else []  # the first is the warm-up
    return {name: tuple(1e6 * statistics.quantiles(own, n=10)[0] for own in both) for name, both in samples.items()}


def seconds(call: Callable[[cases.Inputs], Any], inputs: cases.Inputs, device: str) -> list[float]:
    """The host's time for each of :data:`CALLS` calls; a GPU is left behind."""
    samples = []
    for _ in range(CALLS):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call(inputs)
        samples.append(time.perf_counter() - begin)
    return samples


def rows(backend: str, device: str, found: Mapping[str, tuple[float, float]]) -> list[record.Row]:
    """A row a layer, in microseconds a call."""
    common = {
        "op": OP,
        "backend": backend,
        "device": record.device_name(device),
        "torch": torch.__version__,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": record.commit(),
    }
    return [{**common, "layer": layer, "forward": forward, "both": both} for layer, (forward, both) in found.items()]


def table(given: Sequence[record.Row]) -> str:
    """Markdown: a line for each layer of a backend on a machine, of its last row."""
    last = {(row["device"], row["backend"], row["layer"]): row for row in given}
    lines = [(*where, f"{row['forward']:.0f} µs", f"{row['both']:.0f} µs") for where, row in last.items()]
    return markdown.table(("machine", "backend", "layer", "forward", "both ways"), "lllr", lines)


def main(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__.partition("\n")[0])
    parser.add_argument("--backend", choices=_backend.BACKENDS, help="the one that runs by itself, if none is named")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--save", action="store_true", help="append to the result file of this machine")
    given = parser.parse_args(words)
    device = "cuda" if torch.cuda.is_available() and given.backend != "cpu" else "cpu"
    backend = given.backend or _backend.select("pearson", torch.empty(0, device=device))
    file = record.result_file(device, OP)
    if given.save:
        record.require_published(file)
    found = rows(backend, device, measure(backend, device, given.rounds))
    if given.save:
        record.append(file, found)
    print(f"{len(SHAPES)} levels of {SHAPES[0]}\n\n{table(found)}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InputError as error:
        sys.exit(f"{error}")
