"""A checkpointed forward keeps its subnet, or its recomputation raises, whichever threads run and set it."""

import itertools
import pickle
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import jdkd.nn
from jdkd.errors import InputError
from jdkd.nn import ElasticConv2d, ElasticGroups, Subnet, set_subnet, subnet_epoch

reentrant = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "saved-tensors"])
DEPTH = 70  # of backward passes within each other: from 60 on autograd takes a thread of its own


def _elsewhere(function: Callable[[], Any]) -> Any:
    """Runs a function in a thread that has run nothing yet."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def _conv(rows: list[int]) -> ElasticConv2d:
    conv = ElasticConv2d(4, 8, 1, bias=False)
    x = torch.ones(1, requires_grad=True)
    for _ in range(50):  # as in a process that has been at work: autograd's numbers are large
        x = x * 1.0
    conv.set_active(out_channels=rows)
    return conv


def _loss(conv: nn.Module, use_reentrant: bool, checkpoint: Callable = torch_checkpoint) -> torch.Tensor:
    x = torch.ones(1, 4, 2, 2, requires_grad=True)  # [N, C, H, W]
    return checkpoint(conv, x, use_reentrant=use_reentrant).sum()


def _rows(conv: ElasticConv2d) -> list[int]:
    """Which filters have a gradient."""
    return conv.weight.grad.flatten(1).any(1).nonzero().flatten().tolist()


@reentrant
@pytest.mark.parametrize("run", [lambda f: f(), _elsewhere], ids=["same", "other"])
def test_raises_where_another_thread_has_set_another_subnet(run, use_reentrant):
    conv = _conv([0, 1])
    loss = _loss(conv, use_reentrant)
    _elsewhere(lambda: conv.set_active(out_channels=[3, 5]))
    with pytest.raises(InputError, match=r"in another thread, and perhaps after .* in one thread, or use jdkd"):
        run(loss.backward)


@reentrant
def test_raises_where_the_thread_of_the_backward_pass_has_set_another_subnet(use_reentrant):
    conv = _conv([0, 1])
    loss = _loss(conv, use_reentrant)

    def backward():
        conv.set_active(out_channels=[3, 5])
        loss.backward()

    with pytest.raises(InputError, match="subnet was set after the checkpointed forward"):
        _elsewhere(backward)


@reentrant
def test_a_model_built_in_one_thread_trains_in_another(use_reentrant):
    conv = _conv([0, 1])
    conv(torch.ones(1, 4, 2, 2))

    def steps():
        _loss(conv, use_reentrant).backward()
        assert _rows(conv) == [0, 1]
        conv.set_active(out_channels=[3, 5])
        loss = _loss(conv, use_reentrant)
        conv.zero_grad()
        loss.backward()
        assert _rows(conv) == [3, 5]
        late = _loss(conv, use_reentrant)
        conv.set_active(out_channels=[0, 1])
        with pytest.raises(InputError, match="run backward before the next set_subnet"):
            late.backward()

    _elsewhere(steps)


@reentrant
def test_another_thread_may_call_the_backward_pass(use_reentrant):
    conv = _conv([0, 1])
    _elsewhere(_loss(conv, use_reentrant).backward)
    assert _rows(conv) == [0, 1]
    conv = _conv([0, 1])
    _elsewhere(lambda: _loss(conv, use_reentrant)).backward()
    assert _rows(conv) == [0, 1]


@reentrant
@pytest.mark.parametrize("late", [1, 100], ids=["one forward", "many"])
def test_raises_where_only_another_thread_has_met_the_new_subnet(late, use_reentrant):
    conv = _conv([0, 1])
    loss = _loss(conv, use_reentrant)
    conv.set_active(out_channels=[3, 5])
    for _ in range(late):
        _elsewhere(lambda: conv(torch.ones(1, 4, 2, 2)))
    with pytest.raises(InputError, match=r"or use jdkd\.nn\.checkpoint"):
        loss.backward()
    conv.set_active(out_channels=[2, 4])
    _elsewhere(lambda: conv(torch.ones(1, 4, 2, 2)))
    with pytest.raises(InputError, match=r"or use jdkd\.nn\.checkpoint"):
        loss.backward()


@reentrant
def test_a_whole_model_notes_who_ran_its_earlier_subnets(use_reentrant):
    model = nn.Sequential(ElasticConv2d(4, 8, 1, bias=False))
    model.elastic_groups = ElasticGroups({"a": [("0", "out")]})
    set_subnet(model, Subnet({"a": [0, 1]}))
    loss = _loss(model, use_reentrant)
    set_subnet(model, Subnet({"a": [3, 5]}))
    _elsewhere(lambda: model(torch.ones(1, 4, 2, 2)))
    with pytest.raises(InputError, match=r"or use jdkd\.nn\.checkpoint"):
        loss.backward()


def test_threads_that_come_and_go_are_not_all_remembered():
    conv = _conv([0, 1])
    for rows in ([3, 5], [2, 4], [1, 6]):
        conv.set_active(out_channels=rows)
        for _ in range(subnet_epoch._MOST + 5):
            _elsewhere(lambda: conv(torch.ones(1, 4, 2, 2)))
        assert len(conv._record.since.numbers) <= subnet_epoch._MOST
        assert len(conv._record.since.earlier) <= subnet_epoch._MOST


@reentrant
@pytest.mark.parametrize("checkpoint", [torch_checkpoint, jdkd.nn.checkpoint], ids=["torch's", "ours"])
def test_one_thread_sets_what_another_runs(checkpoint, use_reentrant):
    conv = _conv([0, 1])
    with ThreadPoolExecutor(1) as pool:
        pool.submit(conv, torch.ones(1, 4, 2, 2)).result()
        conv.set_active(out_channels=[3, 5])
        loss = pool.submit(_loss, conv, use_reentrant, checkpoint).result()
        if use_reentrant and checkpoint is torch_checkpoint:  # its node is older than the first look at the subnet
            with pytest.raises(InputError, match="in another thread"):
                pool.submit(loss.backward).result()
        else:
            pool.submit(loss.backward).result()
            assert _rows(conv) == [3, 5]


@reentrant
def test_a_model_from_another_process_is_checkpointed(use_reentrant, monkeypatch):
    conv = _conv([0, 1])
    _loss(conv, use_reentrant).backward()
    saved = pickle.dumps(conv)
    monkeypatch.setattr(subnet_epoch, "_ticks", itertools.count(conv._record.since.thread))  # where both count the same

    def step():
        loaded = pickle.loads(saved)
        loaded.zero_grad()
        _loss(loaded, use_reentrant).backward()
        return _rows(loaded)

    assert _elsewhere(step) == [0, 1]


class _Within(torch.autograd.Function):
    """A backward pass within another one."""

    @staticmethod
    def forward(ctx, x, losses):
        ctx.losses = losses
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.losses[0].backward()
        return gradient, None


@reentrant
@pytest.mark.filterwarnings("ignore:Error detected in:UserWarning")
def test_threads_of_autograd_know_the_thread_that_called_them(use_reentrant):
    conv, threads = _conv([0, 1]), []

    def nested() -> torch.Tensor:
        loss = _loss(conv, use_reentrant)
        loss.register_hook(lambda _: threads.append(threading.get_ident()))
        for _ in range(DEPTH):
            loss = _Within.apply(torch.ones(1, requires_grad=True), [loss])
        return loss

    nested().backward()
    assert _rows(conv) == [0, 1] and threads != [threading.get_ident()]
    loss = nested()
    conv.set_active(out_channels=[3, 5])
    with pytest.raises(InputError, match="run backward before the next set_subnet"):
        loss.backward()


def test_torch_holds_a_reference_that_is_counted(monkeypatch):
    monkeypatch.setattr(subnet_epoch, "_ticks", itertools.count(1_000_000))  # small numbers Python keeps itself

    def references() -> tuple[int, int]:
        named, alike = subnet_epoch._Thread(), SimpleNamespace(name=object())
        return sys.getrefcount(named.name), sys.getrefcount(alike.name)

    found, own = _elsewhere(references)
    assert found == own + 1
