"""Elastic depth and width change what is packed; a change of subnet must not compile a kernel."""

from __future__ import annotations

import pytest
import torch

from jdkd import _backend
from jdkd._backend import use_backend
from jdkd.kernels import pack as kernels
from jdkd.ops.active_channels import Channels
from jdkd.ops.pack import Part, pack, packed_weights, unpack_add_
from tests.compilations import Compilations
from tests.ops.emulated import placed
from tests.ops.pack_cases import weight

pytestmark = pytest.mark.skipif(not _backend.interpreting(), reason="runs in Triton's interpreter")


def compiled(monkeypatch: pytest.MonkeyPatch, offsets: tuple[int, ...], *, careless: bool = False) -> int:
    """How many variants subnets of 1 to 40 blocks take, whose weights begin at offsets in turn, in elements."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    kernel = Compilations(kernels._pack_kernel, careless=careless)
    monkeypatch.setattr(kernels, "_pack_kernel", kernel)
    for depth in range(1, 41):
        drawn = [weight((8, 8, 3, 3), i) for i in range(depth)]
        for offset in offsets:
            weights = [placed(whole, offset).requires_grad_() for whole in drawn]
            parts = [Part(Channels(1 + depth % 8), Channels(8))] * depth
            with use_backend("triton"):
                packed = packed_weights(weights, parts, torch.bfloat16)
                gradients = [placed(torch.zeros_like(view), offset) for view in packed]
                torch.autograd.backward(packed, gradients)
                unpack_add_([placed(whole, 0) for whole in weights], parts, gradients)
                pack([placed(whole, 0) for whole in weights], parts, torch.bfloat16)
    return len(kernel.keys)


def test_subnets_of_any_depth_take_one_variant_an_action(monkeypatch):
    assert compiled(monkeypatch, (0,)) == 3


def test_weights_at_any_address_take_one_more(monkeypatch):
    assert compiled(monkeypatch, (0, 1)) == 6


@pytest.mark.parametrize(("offsets", "variants"), [((0,), 3), ((0, 1), 6)])
def test_careless_arguments_are_seen_to_compile_more(monkeypatch, offsets, variants):
    assert compiled(monkeypatch, offsets, careless=True) > variants
