"""What only a GPU can show of packing: real sizes, no waiting, graphs, streams."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jdkd._backend import available, use_backend
from jdkd.ops.active_channels import Channels
from jdkd.ops.pack import Part, pack, packed_weights, unpack_add_
from tests.ops.pack_cases import DTYPES, LAST, sliced

pytestmark = pytest.mark.gpu
GPU_BACKENDS = [name for name in ("triton", "cuda") if available("pack").get(name, "absent") is None]
SHAPES = [(64, 3, 7, 7), (256, 256, 3, 3), (512, 512, 3, 3), (2048, 1024, 1, 1), (256, 1, 3, 3), (1000, 2048), (2048,)]


def subnet(last: bool = False, listed: bool = False) -> tuple[list[Tensor], list[Part]]:
    """Half width of every layer, in leading channels or in every other one."""
    torch.manual_seed(0)
    weights, parts = [], []
    for shape in SHAPES:
        weight = torch.randn(shape, device="cuda")
        weights.append(weight.contiguous(memory_format=LAST) if last and len(shape) == 4 else weight)
        rows, columns = (_half(n, listed) for n in (*shape, 1)[:2])
        parts.append(Part(rows, columns if len(shape) > 1 and shape[1] > 3 else None))
    return weights, parts


def _half(maximum: int, listed: bool) -> Channels:
    count = max(1, maximum // 2)
    return Channels(count, torch.arange(0, maximum, 2, device="cuda")[:count] if listed else None)


def expected(weight: Tensor, part: Part) -> Tensor:
    on_host = [None if c is None else Channels(c.count, None if c.index is None else c.index.cpu()) for c in part[:2]]
    return sliced(weight, Part(*on_host))


@pytest.mark.parametrize("name", GPU_BACKENDS)
@pytest.mark.parametrize("listed", [False, True], ids=["leading", "listed"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_sizes_agree_with_indexing(name, dtype, last, listed):
    weights, parts = subnet(last, listed)
    gradients = [weight.clone() for weight in weights]
    with use_backend(name):
        packed = pack(weights, parts, dtype)
        unpack_add_(gradients, parts, packed)
    for found, gradient, weight, part in zip(packed, gradients, weights, parts, strict=True):
        assert torch.equal(found, expected(weight, part).to(dtype))
        assert torch.equal(expected(gradient, part), expected(weight, part) + found.float())


@pytest.mark.parametrize("name", GPU_BACKENDS)
@pytest.mark.parametrize("mode", ["autograd", "main_grad"])
def test_new_and_known_subnets_never_wait_for_the_device(name, mode):
    weights, parts = subnet()
    leaves = [weight.requires_grad_() for weight in weights]

    def step(fewer: int) -> None:
        own = [part._replace(rows=Channels(part.rows.count - fewer)) for part in parts]
        packed = packed_weights(leaves, own, torch.bfloat16, mode)
        torch.autograd.backward(packed, [torch.ones_like(view) for view in packed])

    with use_backend(name):
        step(0)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for fewer in (0, 1, 2):
                step(fewer)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", GPU_BACKENDS)
@pytest.mark.parametrize("listed", [False, True], ids=["leading", "listed"])
def test_a_graph_captures_pack_and_unpack(name, listed):
    weights, parts = subnet(listed=listed)
    gradients = [torch.zeros_like(weight) for weight in weights]

    def step() -> list[Tensor]:
        packed = pack(weights, parts, torch.bfloat16)
        unpack_add_(gradients, parts, [view * 2 for view in packed])
        return packed

    with use_backend(name):
        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            packed = step()
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.normal_()
            gradient.zero_()
        graph.replay()
    for found, gradient, weight, part in zip(packed, gradients, weights, parts, strict=True):
        assert torch.equal(found, expected(weight, part).bfloat16())
        assert torch.equal(expected(gradient, part), 2 * found.float())


@pytest.mark.parametrize("name", GPU_BACKENDS)
def test_a_table_may_be_used_on_another_stream(name):
    weights, parts = subnet()
    other = torch.cuda.Stream()
    with use_backend(name):
        first = pack(weights, parts, torch.float16)
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            second = pack(weights, parts, torch.float16)
        torch.cuda.current_stream().wait_stream(other)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
