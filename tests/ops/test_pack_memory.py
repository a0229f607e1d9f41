"""Where large flat buffers come from on a CPU: pages are taken again, but never while a tensor lives on them."""

from __future__ import annotations

import gc
import importlib
import sys

import pytest
import torch

from jdkd.ops import pack_memory
from jdkd.ops.active_channels import Channels
from jdkd.ops.pack import Part, pack
from jdkd.ops.pack_memory import HUGE_PAGE, empty, zeros
from tests.ops.pack_cases import weight

CPU = torch.device("cpu")
LARGE = HUGE_PAGE  # elements of float32: four pages

pytestmark = pytest.mark.skipif(not pack_memory._is_mapped(LARGE, torch.float32, CPU), reason="no huge pages here")


def test_packed_weights_that_live_are_never_overwritten():
    wholes = [weight((1024, 1024), seed) for seed in range(6)]
    alive = [pack([whole], [Part(Channels(1000))], torch.float32)[0] for whole in wholes]
    assert all(torch.equal(view, whole[:1000]) for view, whole in zip(alive, wholes, strict=True))


def test_a_view_or_a_gradient_graph_keeps_the_pages():
    view = empty(LARGE, torch.float32, CPU)[5:9].fill_(7.0)
    graph = (torch.ones(LARGE, requires_grad=True) * empty(LARGE, torch.float32, CPU).fill_(3.0)).sum()
    for _ in range(4):
        empty(LARGE, torch.float32, CPU).fill_(1.0)
    assert view.tolist() == [7.0] * 4
    (gradient,) = torch.autograd.grad(graph, [graph.grad_fn.next_functions[0][0].next_functions[0][0].variable])
    assert (gradient == 3.0).all()


def test_pages_that_nobody_uses_are_taken_again_and_at_most_two_buffers_are_kept():
    buffers = [empty(LARGE, torch.float32, CPU) for _ in range(5)]
    addresses = {buffer.data_ptr() for buffer in buffers}
    assert len(addresses) == 5 and len(pack_memory._packed_pages) == 2
    del buffers
    gc.collect()
    again = [empty(LARGE - 3, torch.float32, CPU), empty(2 * LARGE, torch.float16, CPU)]
    assert {buffer.data_ptr() for buffer in again} <= addresses


def test_a_gradient_that_lives_is_never_overwritten_and_one_that_is_gone_gives_its_pages():
    kept = zeros(LARGE, torch.empty(0)).fill_(5.0)
    others = [zeros(LARGE, torch.empty(0)).fill_(1.0) for _ in range(3)]
    addresses = {other.data_ptr() for other in others}
    del others
    again = zeros(LARGE, torch.empty(0))
    assert again.data_ptr() in addresses and not again.any() and (kept == 5.0).all()


def test_a_python_that_counts_fewer_references_recycles_the_same(monkeypatch):
    counted = sys.getrefcount
    # From 3.14 on, names in a function need not count. The stand-in's own name counts here.
    monkeypatch.setattr(sys, "getrefcount", lambda thing: counted(thing) - 2)
    importlib.reload(pack_memory)
    try:
        kept = pack_memory.empty(LARGE, torch.float32, CPU).fill_(7.0)
        others = [pack_memory.empty(LARGE, torch.float32, CPU).fill_(1.0) for _ in range(3)]
        addresses = {other.data_ptr() for other in others}
        del others
        assert pack_memory.empty(LARGE, torch.float32, CPU).data_ptr() in addresses and (kept == 7.0).all()
    finally:
        monkeypatch.undo()
        importlib.reload(pack_memory)


def test_zeros_are_zeros_and_start_a_storage():
    for _ in range(3):
        buffer = zeros(LARGE + 1, torch.empty(0))
        assert buffer.storage_offset() == 0 and buffer.data_ptr() % 128 == 0
        assert not buffer.any()
        buffer.fill_(1.0)
