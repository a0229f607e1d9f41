"""Gradients through packed weights: dense, in place, and what each mode promises."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jdkd._backend import use_backend
from jdkd.errors import InputError
from jdkd.ops import pack, pack_operators
from jdkd.ops.active_channels import Channels
from jdkd.ops.pack import GRAD_MODES, Part, packed_weights
from tests.ops.pack_cases import LAST, active_mask, channels, on, sliced, subnet, weight

OP = "pack"
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # by the interpreter
    pytest.mark.filterwarnings("ignore:.*Function.*instantiated:DeprecationWarning"),  # by dynamo
]


def leaves(device: str) -> tuple[list[Tensor], list[Part]]:
    weights, parts = subnet()
    return [whole.requires_grad_() for whole in on(device, weights)], parts


def test_gradients_are_those_of_indexing(backend, device):
    weights, parts = leaves(device)
    packed = packed_weights(weights, parts, torch.float32)
    given = [torch.randn_like(view) for view in packed]
    torch.autograd.backward(packed, given)
    plain = [whole.detach().clone().requires_grad_() for whole in weights]
    torch.autograd.backward([sliced(whole, part) for whole, part in zip(plain, parts, strict=True)], given)
    for ours, theirs in zip(weights, plain, strict=True):
        assert torch.equal(ours.grad, theirs.grad)
        assert ours.grad.stride() == ours.stride()


@pytest.mark.parametrize(("group_bytes", "groups"), [(1, 7), (20 << 10, 3), (1 << 20, 1)])
def test_gradients_that_a_cpu_makes_in_groups_are_those_of_indexing(monkeypatch, group_bytes, groups):
    weights, parts = leaves("cpu")
    sum(view.sum() for view in packed_weights(weights, parts, torch.bfloat16)).backward()  # which checks the kernels
    made = []
    monkeypatch.setattr(pack_operators, "zeros", lambda numel, like: made.append(numel) or torch.zeros(numel))
    monkeypatch.setattr(pack, "GROUP_BYTES", group_bytes)
    weights, parts = leaves("cpu")
    weights[3].requires_grad_(False)
    packed = packed_weights(weights, parts, torch.bfloat16)
    given = [torch.randn_like(view) for view in packed]
    used = [place for place, view in enumerate(packed) if view.requires_grad]
    torch.autograd.backward([packed[place] for place in used], [given[place] for place in used])
    assert len(made) == groups and weights[3].grad is None
    for place, (whole, part, view) in enumerate(zip(weights, parts, packed, strict=True)):
        assert torch.equal(view, sliced(whole.detach(), part).bfloat16())
        if place != 3:
            assert torch.equal(sliced(whole.grad, part), given[place].float())
            assert not whole.grad[~active_mask(whole, part)].any()


@pytest.mark.parametrize("mode", GRAD_MODES)
def test_several_subnets_add_up_in_one_step(backend, device, mode):
    whole = weight((16, 8, 3, 3)).to(device).requires_grad_()
    expected = torch.zeros_like(whole)
    for rows in (16, 8, [3, 1]):
        part = Part(channels(rows, 16), Channels(8))
        (packed,) = packed_weights([whole], [part], torch.float32, mode)
        packed.square().sum().backward()
        expected += torch.where(active_mask(whole, part).to(device), 2 * whole.detach(), 0)
    assert torch.equal(whole.grad, expected)


def test_main_grad_writes_into_the_gradient_it_finds_and_hands_none_on(backend, device):
    weights, parts = leaves(device)
    for place, whole in enumerate(weights):
        whole.grad = torch.full_like(whole, 7.0)
        if place == 1:
            whole.main_grad = torch.full_like(whole, 3.0)
    before = [whole.grad for whole in weights]
    hooked = []
    weights[0].register_hook(hooked.append)
    packed = packed_weights(weights, parts, torch.bfloat16, "main_grad")
    torch.autograd.backward(packed, [torch.ones_like(view) for view in packed])
    for place, (whole, part, grad) in enumerate(zip(weights, parts, before, strict=True)):
        mask = active_mask(whole, part).to(device)
        assert whole.grad is grad and hooked == [None]
        assert torch.equal(whole.grad, torch.where(mask, 7.0 + (place != 1), 7.0))
        assert place != 1 or torch.equal(whole.main_grad, torch.where(mask, 4.0, 3.0))


@pytest.mark.parametrize("mode", GRAD_MODES)
def test_a_weight_may_be_packed_twice_in_one_call(backend, device, mode):
    whole = weight((6, 4)).to(device).requires_grad_()
    parts = [Part(Channels(4)), Part(channels([5, 2], 6), Channels(3))]
    torch.autograd.backward(packed_weights([whole, whole], parts, torch.float32, mode), [
        torch.ones(4, 4, device=device), torch.ones(2, 3, device=device)
    ])  # fmt: skip
    expected = sum(active_mask(whole, part).float() for part in parts)
    assert torch.equal(whole.grad.cpu(), expected)


@pytest.mark.parametrize("mode", GRAD_MODES)
def test_unused_parts_and_frozen_weights_get_no_gradient(backend, device, mode):
    weights, parts = leaves(device)
    weights[2].requires_grad_(False)
    packed = packed_weights(weights, parts, torch.float32, mode)
    (packed[1].sum() + packed[2].sum()).backward()
    assert [whole.grad is not None for whole in weights] == [False, True, *[False] * 6]


def test_a_subnet_of_convolutions_trains_as_one_that_slices(backend, device):
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 8, 1)]
    widths, x = [(8, 3), (12, 8), (8, 12)], weight((2, 3, 9, 9)).to(device)
    masters = [layer.weight.detach().to(device) for layer in layers]

    def loss(weights: list[Tensor]) -> Tensor:
        y = F.relu(F.conv2d(x, weights[0], padding=1))
        return F.conv2d(F.relu(F.conv2d(y, weights[1], padding=1)), weights[2]).square().mean()

    found = []
    for route in ("pack", "slice"):
        own = [whole.clone().requires_grad_() for whole in masters]
        if route == "pack":
            used = packed_weights(own, [Part(Channels(o), Channels(i)) for o, i in widths], torch.float32)
        else:
            used = [whole[:o, :i] for whole, (o, i) in zip(own, widths, strict=True)]
        loss(used).backward()
        found.append([whole.grad for whole in own])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_gradients_are_exact_in_float64():
    weights = [
        whole.double().requires_grad_() for whole in (weight((4, 3, 3, 3)), weight((5, 2), last=True), weight((4,)))
    ]
    parts = [Part(channels([2, 0], 4), Channels(2), (1, 3)), Part(Channels(3)), Part(channels([3, 1], 4))]
    assert torch.autograd.gradcheck(lambda *w: packed_weights(w, parts, torch.float64), weights)


def test_operators_pass_opcheck(backend, device):
    weights, part = on(device, [weight((8, 8, 3, 3)), weight((32, 4))]), ([None, torch.tensor([5, 1])], [None, None])
    given = (*part, [8, 4, 3, 3, 2, 4, 1, 1])
    packed = [torch.ones(8, 4, 3, 3, device=device), torch.ones(2, 4, device=device)]
    ops = torch.ops.jdkd
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.unpack.default, (packed, weights, *given), test_utils=tests)
    torch.library.opcheck(ops.unpack_add_.default, ([w.clone() for w in weights], *given, packed), test_utils=tests)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # NaN between the parts equals no NaN
    whole = [8, 8, 3, 3, 32, 4, 1, 1]  # 576 and 128 elements: no gap between parts
    torch.library.opcheck(
        ops.pack.default, (weights, [None, None], [None, None], whole, torch.float32), test_utils=tests
    )
    torch.utils.deterministic.fill_uninitialized_memory = filled


def test_new_widths_compile_at_most_once_more(device):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    whole = weight((32, 16, 3, 3)).to(device).requires_grad_()

    @torch.compile(backend=counter, fullgraph=True)
    def step(whole: Tensor, rows: int, columns: int) -> Tensor:
        part = Part(Channels(rows), Channels(columns))
        (packed,) = packed_weights([whole], [part], torch.float32)
        return packed.square().sum()

    for rows, columns in ((8, 4), (16, 8), (24, 12), (12, 16), (20, 10)):
        whole.grad = None
        step(whole, rows, columns).backward()
        expected = torch.zeros_like(whole)
        expected[:rows, :columns] = 2 * whole.detach()[:rows, :columns]
        assert torch.equal(whole.grad, expected)
    assert counter.frame_count <= 2


def test_refusals_name_the_remedy():
    whole = weight((4, 4)).requires_grad_()
    with pytest.raises(InputError, match="is none of autograd, main_grad"):
        packed_weights([whole], [Part(Channels(2))], torch.float32, "both")
    with pytest.raises(InputError, match="use grad_mode='autograd'"):
        packed_weights([whole * 2], [Part(Channels(2))], torch.float32, "main_grad")
    with pytest.raises(InputError, match="choose float32, bfloat16 or float16"), use_backend("cpu"):
        packed_weights([whole], [Part(Channels(2))], torch.float64)


def test_dense_gradients_of_real_size_are_zero_where_inactive():
    whole = weight((512, 256, 3, 3), last=True).requires_grad_()  # 4.5 MB: pages of the operating system's own
    part = Part(Channels(100), Channels(96))
    (packed,) = packed_weights([whole], [part], torch.float32)
    packed.sum().backward()
    assert torch.equal(whole.grad, active_mask(whole, part).float()) and whole.grad.is_contiguous(memory_format=LAST)
