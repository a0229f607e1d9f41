"""Every operator on every kernel of a device at small and odd sizes, against float64, and many times for equal bits.

    python -m benchmarks.gpu.smoke pearson pack --device cuda --out smoke.jsonl

Without pytest, so that it runs under a sanitizer, and each operator in a process of its own: a wrong kernel may take
its process with it. What is compared is what the tests of the operator compare, by the 2x rule. The checks stand in
order of worth; each leaves a row as soon as it is done.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from benchmarks import record
from benchmarks.gpu.jobs import tell
from benchmarks.gpu.plan import OPS
from jdkd._backend import available, use_backend
from jdkd.functional import pearson_tap, pkd_loss
from jdkd.ops import pearson_planner, pearson_single
from jdkd.ops.active_channels import Channels
from jdkd.ops.pack import Part, pack, unpack_add_
from tests.ops import (
    elastic_conv_cases,
    elastic_levels_cases,
    elastic_pointwise_cases,
    pack_cases,
    pearson_cases,
)

Check = tuple[str, Callable[[], object]]  # its name, and what raises where the kernel is wrong
Run = Callable[[], Sequence[Tensor]]
FLOATS = (torch.bfloat16, torch.float32, torch.float16)
CLUSTERS = (16, 8, 4, 2, 1)
SIZES = [(n, c, hw) for hw in (33, 77, 273, 1050, 4199, 16801, 67201, 134401) for n in (1, 2, 3) for c in (3, 67, 264)]


def backends(op: str, device: str) -> list[str]:
    """What runs an operator on a device, compiled ones first; on a CPU not through Triton's interpreter."""
    wanted = ("cuda", "triton") if device == "cuda" else ("cpu", "reference")
    return [name for name, missing in available(op).items() if name in wanted and missing is None]


def equal_bits(run: Run, repeats: int) -> None:
    """Holds what a run gives to the same bits every time."""
    first = [tensor.clone() for tensor in run()]
    for number in range(1, repeats):
        for index, (a, b) in enumerate(zip(first, run(), strict=True)):
            if not torch.equal(a, b):
                raise AssertionError(f"output {index} of repeat {number} has other bits than the first")


def on(backend: str, call: Callable[[], object]) -> Callable[[], object]:
    def forced() -> object:
        with use_backend(backend):
            return call()

    return forced


def pearson(device: str, repeats: int, brief: bool) -> Iterator[Check]:
    """The split form and the tap, in every dtype and layout; the single pass has a process of its own."""
    for name, check in _pearson(device, repeats, brief):
        yield name, mock.patch.object(pearson_single, "fits", return_value=False)(lambda *_, check=check: check())


def _pearson(device: str, repeats: int, brief: bool) -> Iterator[Check]:
    cases = pearson_cases
    drawn = [(backend, variant) for variant in cases.variants() for backend in backends("pearson", device)]
    for backend, variant in drawn:
        case, plain = cases.like(cases.CASES["many_tiles_and_chunks"], variant), cases.like(cases.PLAIN, variant)
        yield f"{backend} {variant} tap", on(backend, lambda own=plain: cases.check(own, device, tap=True))
        yield f"{backend} {variant} repeats", on(backend, lambda own=case: _pearson_repeats(own, device, repeats))
    for name in ("odd_sizes", "many_tiles_and_chunks", "large_mean") if brief else cases.CASES:
        for backend, variant in drawn:
            own = cases.like(cases.CASES[name], variant)
            yield f"{backend} {variant} {name}", on(backend, lambda own=own: cases.check(own, device))


def _pearson_repeats(case: pearson_cases.Case, device: str, repeats: int) -> None:
    students, teachers = case.levels(device)
    equal_bits(lambda: _loss_and_gradients(students, [teacher.detach() for teacher in teachers]), repeats)


def _loss_and_gradients(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> list[Tensor]:
    features, tapped = pearson_tap(students, teachers, pearson_cases.WEIGHT)
    loss = pkd_loss(students, teachers, pearson_cases.WEIGHT)
    heads = [torch.ones_like(feature) for feature in features]
    gradients = torch.autograd.grad([tapped, *features], students, [torch.ones_like(tapped), *heads])
    return [loss.detach(), tapped.detach(), *torch.autograd.grad(loss, students), *gradients]


def pearson_one_pass(device: str, repeats: int, brief: bool) -> Iterator[Check]:
    """The single pass in clusters of every size; every one is launched before any is captured in a graph."""
    backend = "cuda" if device == "cuda" else "reference"
    if backend not in backends("pearson_single", device):
        return
    found: list[tuple[str, tuple[list[Tensor], list[Tensor]]]] = []
    for dtype in (torch.bfloat16, torch.float32):
        if device == "cuda":
            shapes = of_clusters(dtype.itemsize, pearson_single._chip(torch.cuda.current_device()))
        else:
            shapes = {0: (2, 3, 77)}
        for cluster, (n, c, hw) in shapes.items():
            own = pearson_cases.Case(shapes=((n, c, 1, hw), (2, 5, 3, 7)), mean=0.5, r=0.8, dtype=dtype)
            students, teachers = ([level.detach() for level in side] for side in own.levels(device))
            name = f"{backend} {str(dtype)[6:]} cluster {cluster} of {n}x{c}x{hw}"
            found.append((name, (students, teachers)))
            yield name, on(backend, lambda s=students, t=teachers: _single_is_exact(s, t))
    for name, (students, teachers) in found:
        yield f"{name} repeats", on(backend, lambda s=students, t=teachers: equal_bits(lambda: _single(s, t), repeats))
    for name, (students, teachers) in found if device == "cuda" and not brief else ():
        yield f"{name} captured", on(backend, lambda s=students, t=teachers: _captured(s, t))


def of_clusters(itemsize: int, chip: pearson_planner.Chip) -> dict[int, tuple[int, int, int]]:
    """A level ``(N, C, H W)`` that the planner gives to clusters of each size, the largest first.

    Args:
        itemsize: bytes of an element.
        chip: see :data:`jdkd.ops.pearson_planner.Chip`.
    """
    found: dict[int, tuple[int, int, int]] = {}
    for shape in SIZES:
        plan = pearson_planner.plan([shape], itemsize, chip)
        if plan.fits:
            found.setdefault(plan.launches[0].cluster, shape)
    return {cluster: found[cluster] for cluster in CLUSTERS if cluster in found}


def _single(students: list[Tensor], teachers: list[Tensor]) -> list[Tensor]:
    weights = [pearson_cases.WEIGHT] * len(students)
    loss, losses, table, gradients = torch.ops.jdkd.pearson_single(students, teachers, weights, 1e-6, False)
    return [loss, losses, table, *gradients]


def _single_is_exact(students: list[Tensor], teachers: list[Tensor]) -> None:
    loss, _, _, *gradients = _single(students, teachers)
    pearson_cases.assert_as_exact_as_eager(loss, gradients, students, teachers)


def _captured(students: list[Tensor], teachers: list[Tensor]) -> None:
    expected = [tensor.clone() for tensor in _single(students, teachers)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = _single(students, teachers)
    for output in outputs:
        output.fill_(torch.nan)
    graph.replay()
    if not all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True)):
        raise AssertionError("a replay gives other bits than a call")


def packing(device: str, repeats: int, brief: bool) -> Iterator[Check]:
    """Pack and unpack of every kind of part: rounded once, and what is inactive untouched."""
    for backend in backends("pack", device):
        for dtype in FLOATS:
            yield f"{backend} {str(dtype)[6:]}", on(backend, lambda dtype=dtype: _packs(device, dtype, repeats))


def _packs(device: str, dtype: torch.dtype, repeats: int) -> None:
    weights, parts = pack_cases.subnet()
    there = [_on(part, device) for part in parts]
    own = pack_cases.on(device, weights)
    views = pack(own, there, dtype)
    equal_bits(lambda: pack(own, there, dtype), repeats)
    gradients = [weight.clone() for weight in own]
    unpack_add_(gradients, there, views)
    for found, summed, weight, part in zip(views, gradients, weights, parts, strict=True):
        expected, mask = pack_cases.sliced(weight, part).to(dtype), pack_cases.active_mask(weight, part)
        summed = summed.cpu()
        if not torch.equal(found.cpu(), expected):
            raise AssertionError(f"pack of {tuple(weight.shape)} is not what indexing gives")
        added = pack_cases.sliced(weight, part) + expected.float()
        if not (torch.equal(pack_cases.sliced(summed, part), added) and torch.equal(summed[~mask], weight[~mask])):
            raise AssertionError(f"unpack of {tuple(weight.shape)} is not what indexing gives")


def _on(part: Part, device: str) -> Part:
    """The part with its lists of channels on the device."""
    rows, columns = (
        None if side is None else Channels(side.count, None if side.index is None else side.index.to(device))
        for side in (part.rows, part.columns)
    )
    return part._replace(rows=rows, columns=columns)


def pointwise(device: str, repeats: int, brief: bool) -> Iterator[Check]:
    """The 1x1 convolution with every epilogue: whole vectors, odd channels, strides."""
    shapes = [((24, 16), (24, 16), (2, 5, 7), 1), ((136, 200), (131, 139), (2, 13, 21), 1)]
    shapes += [] if brief else [((264, 136), (250, 133), (1, 25, 42), 2), ((64, 256), (64, 256), (2, 25, 42), 1)]
    cases = elastic_pointwise_cases
    for dtype, backend, epilogue in _each("elastic_pointwise", device, cases.EPILOGUES):
        for weight, active, image, stride in shapes:
            own = cases.Problem(weight, active, image, stride, epilogue)

            def check(own: cases.Problem = own, dtype: torch.dtype = dtype) -> None:
                cases.assert_matches_float64(own, dtype, device, slack=1 if dtype == torch.float32 else 4)

            name = f"{backend} {str(dtype)[6:]} {epilogue} {active[1]}->{active[0]} /{stride}"
            yield name, on(backend, check)
        tensors = own.tensors(dtype, device)

        def run(own: cases.Problem = own, tensors: dict[str, Tensor] = tensors) -> list[Tensor]:
            found = cases.results(own.ours, tensors)
            return [tensor for key, tensor in found.items() if key != "douts"]

        yield f"{backend} {str(dtype)[6:]} {epilogue} repeats", on(backend, lambda run=run: equal_bits(run, repeats))


def levels(device: str, repeats: int, brief: bool) -> Iterator[Check]:
    """The convolution of several levels in one launch: whole vectors, odd channels, one level and five."""
    cases = elastic_levels_cases
    sizes = ((2, 13, 21), (2, 7, 11), (2, 4, 6), (2, 2, 3), (1, 1, 2))
    for dtype, backend, relu in _each("elastic_levels", device, (True, False)):
        for inputs, outputs, count in ((128, 136, 5), (131, 67, 5), (64, 200, 1)):
            problem = elastic_conv_cases.Problem(
                inputs, outputs, weight=(264, 160, 3, 3), window={"padding": 1}, channels_last=True
            )
            own = cases.Pyramid(problem, sizes[:count], relu)
            name = f"{backend} {str(dtype)[6:]} x{count} {inputs}->{outputs}{' relu' if relu else ''}"
            yield name, on(backend, lambda own=own, dtype=dtype: cases.assert_matches_float64(own, dtype, device))
        tensors = own.tensors(dtype, device)

        def run(own: cases.Pyramid = own, tensors: list[Tensor | None] = tensors) -> list[Tensor]:
            return [*cases.results(own.ours, tensors)[0].values()]

        yield (
            f"{backend} {str(dtype)[6:]} repeats{' relu' if relu else ''}",
            on(backend, lambda run=run: equal_bits(run, repeats)),
        )


def conv(device: str, repeats: int, brief: bool) -> Iterator[Check]:
    """The convolution that reads the shared weight in place, leading and listed channels, in both layouts."""
    cases = elastic_conv_cases
    problems = {
        "3x3": cases.Problem(70, 130, weight=(140, 90, 3, 3), image=(2, 13, 21), window={"padding": 1}),
        "3x3 listed": cases.Problem(
            [*range(4, 20)], [*range(39, 7, -1)], weight=(40, 24, 3, 3), window={"stride": 2, "padding": 1}
        ),
        "5x5": cases.Problem(16, 24, weight=(40, 24, 5, 5), image=(1, 25, 42), window={"padding": 2, "dilation": 2}),
    }
    for dtype, backend, last in _each("elastic_conv", device, (True, False)):
        for label, problem in problems.items():
            own = replace(problem, channels_last=last)
            name = f"{backend} {str(dtype)[6:]} {label} {'nhwc' if last else 'nchw'}"
            yield name, on(backend, lambda own=own, dtype=dtype: cases.assert_within_twice(own, dtype, device))
        tensors = own.tensors(dtype, device)

        def run(own: cases.Problem = own, tensors: list[Tensor | None] = tensors) -> list[Tensor]:
            return [*cases.results(own.ours, tensors).values()]

        yield (
            f"{backend} {str(dtype)[6:]} {'nhwc' if last else 'nchw'} repeats",
            on(backend, lambda run=run: equal_bits(run, repeats)),
        )


def _each(op: str, device: str, variants: Sequence) -> Iterator[tuple]:
    """Every dtype, backend and variant of an operator; on a CPU ATen rounds half precision more than once."""
    dtypes = FLOATS if device == "cuda" else (torch.float32,)
    return itertools.product(dtypes, backends(op, device), variants)


CHECKS = dict(zip(OPS, (pearson, pearson_one_pass, packing, pointwise, levels, conv), strict=True))


def smoke(op: str, device: str, repeats: int, until: float, brief: bool, out: Path, under: str | None) -> bool:
    """Runs the checks of an operator. Returns: whether all that were begun passed."""
    right, left = True, []
    for name, check in CHECKS[op](device, repeats, brief):
        if time.time() > until:
            left.append(name)
            continue
        torch.manual_seed(0)
        begin, why = time.monotonic(), None
        try:
            check()
            if device == "cuda":
                torch.cuda.synchronize()
        except Exception as error:  # whatever a kernel or its compiler raises
            why = f"{type(error).__name__}: {error}"
            right = False
            tell(failed=f"{op} {name}", why=why)
        row = {"op": op, "check": name, "ok": why is None, "why": why, "seconds": round(time.monotonic() - begin, 3)}
        record.append(out, [row | {"under": under}])
        if why is not None and device == "cuda" and _lost():
            break
    if left:
        print(f"{op}: not begun, out of time: {', '.join(left)}")
    return right


def _lost() -> bool:
    """Whether the device takes no more calls of this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        print(f"the context is lost: {error}")
        return True
    return False


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.smoke", description=__doc__.partition("\n")[0])
    parser.add_argument("ops", nargs="+", choices=OPS, metavar="OP")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--until", type=float, help="begin no check after this time, in seconds since 1970")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--brief", action="store_true", help="few checks and two repeats, for a sanitizer")
    parser.add_argument("--under", help="the tool that watches, for the rows")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(words)
    begin = time.time()
    share = (given.until - begin if given.until else 600) / len(given.ops)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN, so that a forgotten output cell shows
    torch.backends.cudnn.allow_tf32 = False  # float32 is held to float32
    repeats = 2 if given.brief else given.repeats
    verdicts = [
        smoke(op, given.device, repeats, begin + share * (number + 1), given.brief, given.out, given.under)
        for number, op in enumerate(given.ops)
    ]
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
