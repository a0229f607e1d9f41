"""Packing the active weights of a subnet, on every backend."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from jdkd import _backend
from jdkd.errors import InputError
from jdkd.ops import pack_table
from jdkd.ops.active_channels import Channels
from jdkd.ops.pack import Part, pack, unpack_add_
from jdkd.ops.pack_operators import _unpack, _unpack_add_
from tests.ops.pack_cases import DTYPES, LAST, active_mask, channels, on, sliced, subnet, weight

OP = "pack"
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # by the interpreter


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_of_part_is_what_indexing_gives_rounded_once(backend, device, dtype):
    weights, parts = subnet()
    packed = pack(on(device, weights), parts, dtype)
    for found, whole, part in zip(packed, weights, parts, strict=True):
        expected = sliced(whole, part).to(dtype)
        assert found.dtype == dtype and torch.equal(found.cpu(), expected)
        assert found.dim() != 4 or found.is_contiguous(memory_format=LAST)


def test_parts_are_views_of_one_buffer_each_at_a_multiple_of_128_bytes(backend, device):
    weights, parts = subnet()
    packed = pack(on(device, weights), parts, torch.bfloat16)
    assert len({view.untyped_storage().data_ptr() for view in packed}) == 1
    assert all(view.storage_offset() * view.element_size() % 128 == 0 for view in packed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", DTYPES)
def test_half_precision_masters_are_packed_into_any_dtype(backend, device, shared, dtype):
    weights, parts = subnet()
    weights = [whole.to(shared) for whole in weights]
    for found, whole, part in zip(pack(on(device, weights), parts, dtype), weights, parts, strict=True):
        assert torch.equal(found.cpu(), sliced(whole, part).to(dtype))


def test_special_values_survive_rounding(backend, device):
    inf, nan = float("inf"), float("nan")
    whole = torch.tensor([[0.0, -0.0, inf, -inf, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, 1.0]])
    (found,) = pack([whole.to(device)], [Part(Channels(1))], torch.bfloat16)
    assert torch.equal(found.cpu().view(torch.int16), whole.bfloat16().view(torch.int16))
    if backend != "triton" or device == "cuda":  # the interpreter's rounding here is the kernel's own, without NaN
        (found,) = pack([torch.full((1, 9), nan, device=device)], [Part(Channels(1))], torch.bfloat16)
        assert found.isnan().all()


@pytest.mark.parametrize("shared", DTYPES)
def test_gradients_are_added_where_the_part_is_active_and_nothing_else_is_touched(backend, device, shared):
    weights, parts = subnet()
    poison = 0x7FA5 if shared == torch.bfloat16 else 0x7E5A if shared == torch.float16 else 0x7FC5A5A5  # NaNs
    bits = torch.int32 if shared == torch.float32 else torch.int16
    gradients, before = [], []
    for place, (whole, part) in enumerate(zip(weights, parts, strict=True)):
        value = weight(
            whole.shape, place + 50, shared, whole.is_contiguous(memory_format=LAST) if whole.dim() == 4 else 0
        )
        value.view(bits)[~active_mask(whole, part)] = poison
        before.append(value)
        gradients.append(value.clone().to(device))
    packed = [torch.randn_like(sliced(whole, part)).bfloat16() for whole, part in zip(weights, parts, strict=True)]
    unpack_add_(gradients, parts, on(device, packed))
    for found, old, part, added in zip(gradients, before, parts, packed, strict=True):
        found, mask = found.cpu(), active_mask(old, part)
        assert torch.equal(found.view(bits)[~mask], old.view(bits)[~mask])
        assert torch.equal(sliced(found, part), (sliced(old, part).float() + added.float()).to(shared))


@pytest.mark.parametrize("make", [
    lambda g: g.contiguous(), lambda g: g.contiguous(memory_format=LAST),
    lambda g: g.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0), lambda g: g[..., :1].expand_as(g),
], ids=["contiguous", "channels-last", "permuted", "expanded"])  # fmt: skip
@pytest.mark.parametrize("last", [False, True], ids=["contiguous master", "channels-last master"])
def test_packed_gradients_may_lie_in_memory_in_any_way(backend, device, make, last):
    gradient = weight((24, 16, 3, 3), last=last)
    part = Part(Channels(16), channels([1, 0, 9, 8], 16))
    added = make(weight((16, 4, 3, 3), 7))
    found = [gradient.clone().to(device)]
    unpack_add_(found, [part], [added.to(device)])
    assert torch.equal(sliced(found[0].cpu(), part), sliced(gradient, part) + added)


def test_a_weight_that_starts_anywhere_and_one_with_gaps_are_packed(backend, device):
    flat = weight((4000,)).to(device)
    unaligned = flat[1 : 1 + 16 * 8 * 9].view(16, 8, 3, 3)
    gaps = flat[: 32 * 40].view(32, 40)[:, 3:35:2]  # [32, 16], stride 2
    parts = [Part(Channels(8), Channels(8)), Part(Channels(16), Channels(8))]
    for found, whole, part in zip(pack([unaligned, gaps], parts, torch.float32), [unaligned, gaps], parts, strict=True):
        assert torch.equal(found, sliced(whole, part))


def test_more_parts_than_one_launch_takes_pointers(backend, device):
    weights = [weight((3, 2), seed) for seed in range(600 if device == "cuda" or backend != "triton" else 40)]
    parts = [Part(Channels(1 + seed % 3), channels([1, 0], 2)) for seed in range(len(weights))]
    for found, whole, part in zip(pack(on(device, weights), parts, torch.float32), weights, parts, strict=True):
        assert torch.equal(found.cpu(), sliced(whole, part))


@pytest.mark.parametrize("last", [False, True], ids=["taps inside", "channels inside"])
def test_parts_larger_than_a_piece(backend, device, last):
    whole = weight((9, 700, 3, 3), last=last)
    for part in (Part(Channels(7), Channels(650)), Part(channels([8, 0], 9)), Part(Channels(9), None, (1, 1))):
        (found,) = pack([whole.to(device)], [part], torch.float16)
        assert torch.equal(found.cpu(), sliced(whole, part).half())
        gradient = [torch.zeros_like(whole).to(device)]
        unpack_add_(gradient, [part], [found])
        assert torch.equal(sliced(gradient[0].cpu(), part), sliced(whole, part).half().float())


def test_offsets_beyond_2_to_the_31_elements(backend, tmp_path):
    if backend in ("cuda", "reference"):
        pytest.skip("a sparse file is read on the host, and only here and there")
    rows, width = 3, 2**30 + 64
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(rows * width * 2)
    whole = torch.from_file(str(tmp_path / "sparse"), shared=True, size=rows * width, dtype=torch.float16)
    whole = whole.view(rows, width)
    whole[2, :64] = torch.arange(64)
    parts = [Part(channels([2], rows), Channels(64)), Part(channels([2, 0], rows), channels([63, 1], width))]
    found = pack([whole, whole], parts, torch.float32)
    unpack_add_([whole], parts[:1], [torch.ones(1, 64)])
    assert found[0].flatten().tolist() == list(range(64)) and found[1].tolist() == [[63, 1], [0, 0]]
    assert whole[2, :64].tolist() == list(range(1, 65))


def _stepped(name: str, layer: nn.Conv2d) -> None:
    """Changes the weight of a layer in one of the ways that no version counter tells."""
    if name == "data":
        layer.weight.data = layer.weight.data * 2
    elif name == "assigned":
        state = {key: value + 1 for key, value in copy.deepcopy(layer.state_dict()).items()}
        layer.load_state_dict(state, assign=True)
    elif name == "average":
        with torch.no_grad():
            torch._foreach_lerp_(
                [p.data for p in layer.parameters()], [torch.zeros_like(p) for p in layer.parameters()], 0.5
            )
    else:
        for parameter in layer.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer = torch.optim.SGD if name == "sgd" else torch.optim.Adam
        optimizer(layer.parameters(), lr=0.5, fused=True).step()


@pytest.mark.parametrize("name", ["data", "assigned", "average", "sgd", "adam"])
def test_whatever_happens_to_a_weight_is_seen_by_the_next_pack(backend, device, name):
    layer = nn.Conv2d(8, 16, 3, device=device)
    part = Part(Channels(8), Channels(4))
    (old,) = pack([layer.weight], [part], torch.float32)
    _stepped(name, layer)
    (new,) = pack([layer.weight], [part], torch.float32)
    assert torch.equal(new, layer.weight[:8, :4]) and not torch.equal(new, old)


def test_a_list_that_changes_in_place_is_read_again(backend, device):
    whole, index = weight((6, 2)).to(device), torch.tensor([4, 1])
    part = Part(Channels(2, index))
    assert torch.equal(pack([whole], [part], torch.float32)[0], whole[[4, 1]])
    index[0] = 5
    assert torch.equal(pack([whole], [part], torch.float32)[0], whole[[5, 1]])


def test_tables_are_kept_but_never_more_than_the_bound(monkeypatch):
    pack([weight((4, 4))], [Part(Channels(1))], torch.float32)  # checked on this device, which takes tables too
    monkeypatch.setattr(pack_table, "MAX_TABLES", 5)
    whole, made = weight((32, 4)), []
    original = pack_table.PackTable.__init__
    monkeypatch.setattr(
        pack_table.PackTable, "__init__", lambda self, *given: (made.append(self), original(self, *given))[1]
    )
    for count in [*range(1, 33), 32, 31]:
        pack([whole], [Part(Channels(count))], torch.float32)
    assert len(made) == 32 and len(pack_table._tables) == 5


def test_addresses_are_uploaded_again_for_another_stream(monkeypatch):
    pack([weight((32, 4))], [Part(Channels(7))], torch.float32)
    table, current = next(reversed(pack_table._tables.values())), ["one"]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[0])
    monkeypatch.setattr(table, "stream", "one")
    first = table.addresses((1, 2))
    assert table.addresses((1, 2)) is first
    current[0] = "two"
    second = table.addresses((1, 2))
    assert second is not first and table.addresses((1, 2)) is second
    current[0] = "one"  # what "two" uploaded may not have arrived
    assert table.addresses((1, 2)) is not second and table.addresses((3,)).tolist() == [3]


def test_a_captured_call_keeps_a_table_and_the_addresses_once(monkeypatch):
    pack([weight((32, 4))], [Part(Channels(9))], torch.float32)
    table = next(reversed(pack_table._tables.values()))
    monkeypatch.setattr(pack_table, "_captured", set())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(table, "stream", "one")
    for _ in range(3):
        assert table.addresses((1, 2)).tolist() == [1, 2] and len(table.tensors()) == 3
    assert pack_table._captured == {table} and list(table.replayed) == [(1, 2)]


def test_a_table_is_never_built_while_a_graph_is_captured(monkeypatch):
    whole = SimpleNamespace(shape=(8, 4), device=torch.device("cuda"), element_size=lambda: 4)
    known = list(pack_table._tables)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(InputError, match="run this subnet once before the capture"):
        pack_table.table_of([whole], [(4, 1)], [None], [None], [8, 4, 1, 1], torch.float32)
    assert list(pack_table._tables) == known


@pytest.mark.parametrize(("part", "words"), [
    (Part(Channels(9), Channels(4)), "part 0 has 9 rows"),
    (Part(Channels(8), Channels(5)), "part 0 has 5 columns"),
    (Part(Channels(8), None, (2, 3)), "no centre crop"),
    (Part(Channels(8), None, (5, 3)), "no centre crop"),
    (Part(Channels(3, torch.tensor([0, 1])), Channels(4)), "lists its 3 rows in torch.int64"),
    (Part(Channels(8), Channels(2, torch.tensor([0, 1], dtype=torch.int32))), "columns in torch.int32"),
    (Part(Channels(2, torch.tensor([0, -1])), Channels(4)), "lists rows from -1 to 0"),
    (Part(Channels(8), Channels(2, torch.tensor([4, 0]))), "its weight has 4; list indices from 0 to 3"),
])  # fmt: skip
def test_a_part_that_does_not_fit_is_refused(backend, device, part, words):
    with pytest.raises(InputError, match=words):
        pack([weight((8, 4, 3, 3)).to(device)], [part], torch.float32)


def test_refusals_come_before_anything_is_written(backend, device):
    gradients = [weight((4, 4)).to(device), weight((4, 4), 1).to(device)]
    kept, parts = [g.clone() for g in gradients], [Part(Channels(2))] * 2
    good = torch.ones(2, 4, device=device)
    for given, packed, words in (
        (gradients, [good, good[:1]], "packed gradient 1 has shape"),
        (gradients, [good, good.bfloat16()], "make a call for each dtype"),
        ([gradients[0], gradients[0]], [good, good], "given twice"),
        (gradients, [good], "1 packed gradients were given for 2 parts"),
    ):
        with pytest.raises(InputError, match=words):
            unpack_add_(given, parts, packed)
    with pytest.raises(InputError, match="1, 2 or 4 dimensions"):
        pack([torch.zeros(2, 2, 2, device=device)], [Part(Channels(2), Channels(2))], torch.float32)
    with pytest.raises(InputError, match="weights were given for 2 parts"):
        pack(gradients[:1], parts, torch.float32)
    assert all(torch.equal(g, k) for g, k in zip(gradients, kept, strict=True))


def test_packed_gradients_on_another_device_are_refused():
    parts, good, elsewhere = ([None], [None], [2, 4, 1, 1]), weight((4, 4)), torch.ones(2, 4, device="meta")
    with pytest.raises(InputError, match="on meta but"):
        _unpack_add_([good], *parts, [elsewhere])
    with pytest.raises(InputError, match="on meta but"):
        _unpack([elsewhere], [good], *parts)
    assert torch.equal(good, weight((4, 4)))


@pytest.mark.parametrize("shared", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_claims_no_alignment_that_is_not_there(monkeypatch, shared, dtype):
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if not _backend.interpreting():
        pytest.skip("runs in Triton's interpreter")
    claims = []
    monkeypatch.setattr(
        interpreter.TensorHandle, "set_attr", lambda self, key, n: claims.append(not (self.data % n).any())
    )
    whole = weight((24, 16 + 16 // shared.itemsize, 3, 3), dtype=shared, last=True)  # steps of one vector and more
    with _backend.use_backend("triton"):
        (found,) = pack([whole], [Part(channels([5, 2, 1], 24), Channels(16))], dtype)
    assert claims and all(claims) and torch.equal(found, whole[[5, 2, 1], :16].to(dtype))


def test_two_runs_give_the_same_bits(backend, device):
    weights, parts = subnet()
    runs: list[list[Tensor]] = [pack(on(device, weights), parts, torch.float16) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
