"""pytest-benchmark of the elastic convolution: ``python -m pytest benchmarks/test_elastic_conv.py``."""

import pytest
import torch

from benchmarks.cases import elastic_conv as case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROVIDERS = ["mask_multiply", "slice_contiguous", "exported", "ours"] + ["ours_triton"] * (DEVICE == "cuda")


@pytest.fixture(scope="module", params=case.SHAPES, ids=lambda shape: shape.label)
def given(request) -> case.Inputs:
    return case.inputs(request.param, DEVICE)


def test_providers_agree(given):
    outputs = {name: run().detach() for name, run in case.providers(given).items()}
    expected = case.active_part(given, outputs.pop("exported"))
    for name, output in outputs.items():
        assert (case.active_part(given, output) - expected).abs().max() <= 2e-3 * expected.abs().max(), name


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_elastic_conv(benchmark, given, provider, mode):
    run = case.providers(given)[provider]
    benchmark.group = f"{given.slim.shape[1]} channels, {mode}"

    def step() -> None:
        with torch.set_grad_enabled(mode == "training"):
            y = run()
        if mode == "training":
            y.backward(y.detach())
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
