"""Where large flat buffers come from on a CPU: pages are taken again, but never while a tensor lives on them."""

from __future__ import annotations

import gc
import importlib
import sys

import pytest
import torch

from jdkd import _ext
from jdkd.functional import pkd_loss
from jdkd.ops import host_memory
from jdkd.ops.active_channels import Channels
from jdkd.ops.host_memory import HUGE_PAGE, empty, empty_like, zeros
from jdkd.ops.pack import Part, pack
from tests.ops.pack_cases import weight

CPU = torch.device("cpu")
LARGE = HUGE_PAGE  # elements of float32: four pages

pytestmark = pytest.mark.skipif(not host_memory._is_mapped(LARGE, torch.float32, CPU), reason="no huge pages here")


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
    assert len(addresses) == 5 and len(host_memory._packed_pages) == 2
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
    importlib.reload(host_memory)
    try:
        kept = host_memory.empty(LARGE, torch.float32, CPU).fill_(7.0)
        others = [host_memory.empty(LARGE, torch.float32, CPU).fill_(1.0) for _ in range(3)]
        addresses = {other.data_ptr() for other in others}
        del others
        assert host_memory.empty(LARGE, torch.float32, CPU).data_ptr() in addresses and (kept == 7.0).all()
    finally:
        monkeypatch.undo()
        importlib.reload(host_memory)


def test_zeros_are_zeros_and_start_a_storage():
    for _ in range(3):
        buffer = zeros(LARGE + 1, torch.empty(0))
        assert buffer.storage_offset() == 0 and buffer.data_ptr() % 128 == 0
        assert not buffer.any()
        buffer.fill_(1.0)


def test_a_level_keeps_its_strides_and_takes_the_pages_of_one_that_is_gone(monkeypatch):
    monkeypatch.setattr(host_memory, "_level_pages", [])
    level = torch.zeros(2, 64, 100, 168).contiguous(memory_format=torch.channels_last)
    addresses = set()
    for like in (level, level.half(), level.contiguous()):
        gradient = empty_like(like)
        assert gradient.stride() == like.stride() and gradient.dtype == like.dtype and gradient.shape == like.shape
        addresses.add(gradient.data_ptr())
        del gradient
    assert len(addresses) == 1
    assert empty_like(level[:1, :3]).untyped_storage().nbytes() == 3 * 100 * 168 * 4


@pytest.mark.skipif(_ext.library() is None, reason="jdkd._C is not built")
def test_gradients_of_the_pearson_loss_that_live_are_never_overwritten():
    students = [torch.randn(2, 64, 100, 168, requires_grad=True) for _ in range(8)]
    teachers = [torch.randn(2, 64, 100, 168) for _ in students]
    first = torch.autograd.grad(pkd_loss(students, teachers), students)
    copies = [gradient.clone() for gradient in first]
    for _ in range(2):
        torch.autograd.grad(pkd_loss(students, teachers[::-1]), students)
    assert all(torch.equal(gradient, copy) for gradient, copy in zip(first, copies, strict=True))
