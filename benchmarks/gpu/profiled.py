"""Six kernels, each launched once between the marks that ``ncu --profile-from-start off`` waits for."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator

import torch

from benchmarks.cases import elastic_levels, elastic_pointwise, pack, pearson
from benchmarks.harness import Case

BF16 = torch.bfloat16


def launches() -> Iterator[tuple[str, Case, str]]:
    """A name, a case and the provider whose kernels are wanted: both forms of the loss, split ones twice, packing, the
    grouped levels and a 1x1 convolution."""
    loss = {mode: pearson.case("P3-P7", 16, BF16, "NCHW", mode, "cuda") for mode in ("tap", "forward+backward")}
    yield "Pearson tap, Triton", loss["tap"], "jdkd triton"
    yield "Pearson tap, CUDA", loss["tap"], "jdkd cuda"
    yield "Pearson single pass", loss["forward+backward"], "jdkd single"
    yield "pack", pack.case(0.5, BF16, "channels-last", "forward", "cuda", network="37.9M of ResNet-101"), "jdkd"
    yield "grouped levels", elastic_levels.case("P5-P7", 0.5, BF16, "forward", "cuda"), "jdkd triton"
    label = "layer3 1x1 256->1024"
    yield "1x1", elastic_pointwise.case(label, 0.5, BF16, "evaluation", "cuda"), "jdkd triton"


@contextlib.contextmanager
def marked() -> Iterator[None]:
    """What is launched inside is profiled."""
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    yield
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def profiled(name: str, case: Case, provider: str) -> None:
    """Launches a provider once unmarked, so that it is compiled and loaded, and once marked."""
    if provider not in case.providers:
        print(f"== {name}: there is no {provider} here", flush=True)
        return
    inputs = case.make()
    case.providers[provider](inputs)
    print(f"== {name}: {case}, {provider}, at least {case.least_bytes / 1e6:.0f} MB", flush=True)
    with marked():
        case.providers[provider](inputs)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.profiled", description=__doc__)
    parser.add_argument("--seconds", type=float, default=150, help="begin none after so many")
    until = time.monotonic() + parser.parse_args(words).seconds
    failed = 0
    for name, case, provider in launches():
        if time.monotonic() > until:
            print(f"== {name}: not begun, out of time", flush=True)
            continue
        try:
            profiled(name, case, provider)
        except Exception as error:  # whatever a kernel raises: the others are profiled
            print(f"== {name}: {type(error).__name__}: {error}", flush=True)
            failed += 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
