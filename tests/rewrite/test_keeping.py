"""What a rewrite leaves as it was: ties, dtypes, strides, flags, hooks, and what users hang on to modules."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import SwinTransformer, resnet18
from torchvision.models.convnext import CNBlock

from jdkd.errors import InputError
from jdkd.graph import trace
from jdkd.rewrite import arrange, mask, prune, verify, widen
from tests.graph.networks import Residual, awake, conv
from tests.rewrite.blocks import Block

X = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def plain() -> nn.Module:
    return awake(nn.Sequential(conv(3, 8), conv(8, 6), nn.Conv2d(6, 4, 1)))


def halved(model, x=X):
    topology = trace(model, x)
    return prune(model, topology, {group.name: range(group.units // 2) for group in topology.groups})


def test_one_parameter_in_two_modules_stays_one():
    a, b, out = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)
    b.weight = a.weight
    model = awake(nn.Sequential(nn.Conv2d(3, 8, 1), a, nn.ReLU(), b, out))
    cut = halved(model)
    assert cut[1].weight is cut[3].weight and cut[1].weight.shape == (4, 4, 1, 1) and cut[1].bias is not cut[3].bias


def test_a_table_that_is_also_a_head_stays_one():
    table, head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
    head.weight = table.weight
    model = Block(lambda m, ids: m.head(F.relu(m.mix(m.table(ids)))), table=table, mix=nn.Linear(8, 8), head=head)
    ids = torch.tensor([[1, 5, 3]])
    topology = verify(model, trace(model, ids), ids)
    (group,) = topology.groups
    cut, keep = prune(model, topology, {group.name: [0, 3, 4]}), {group.name: [0, 3, 4]}
    assert cut.table.weight is cut.head.weight and cut.table.weight.shape == (11, 3)
    torch.testing.assert_close(cut(ids), mask(model, topology, keep)(ids))
    torch.testing.assert_close(widen(model, topology, {group.name: 2})(ids), model(ids))


def test_a_parameter_that_is_also_held_elsewhere_is_the_same_there():
    model = plain()
    model.watched = [model[0][0].weight]
    cut = halved(model)
    assert cut.watched[0] is cut[0][0].weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_keeps_dtypes_strides_and_who_learns(dtype):
    model = plain().to(dtype).to(memory_format=torch.channels_last)
    model[1][0].weight.requires_grad_(False)
    for made in (halved(model, X.to(dtype)), widen(model, trace(model, X.to(dtype)), {"0.0": 3})):
        assert {p.dtype for p in made.parameters()} == {dtype} and not made[1][0].weight.requires_grad
        assert made[0][0].weight.requires_grad and made[1][0].weight.is_contiguous(memory_format=torch.channels_last)
        assert made[1][1].num_batches_tracked.dtype == torch.int64


def test_keeps_modes_hooks_and_attributes():
    model, heard = plain().train(), []
    model[1].eval()
    model[0].register_forward_hook(lambda *_: heard.append("forward"))
    model[0].stride_of_level, model.note = 8, {"by": "me"}
    model[2].weight.learning_rate = 0.1
    cut = halved(model)
    cut(X)
    assert "forward" in heard and cut[0].stride_of_level == 8 and cut.note == {"by": "me"}
    assert cut[2].weight.learning_rate == 0.1 and [m.training for m in cut.modules()] == [
        m.training for m in model.modules()
    ]
    assert (cut[0][0].out_channels, cut[1][0].in_channels, cut[1][1].num_features) == (4, 4, 3)


def test_leaves_the_model_itself_alone():
    model = plain()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    topology = verify(model, trace(model, X), X)
    for made in (halved(model), mask(model, topology, {"0.0": [1]}), widen(model, topology, {"0.0": 1})):
        for tensor in made.state_dict().values():
            tensor.fill_(7)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("rewrite", [lambda m, t: prune(m, t, {"0.0": [1]}), lambda m, t: mask(m, t, {"0.0": [1]})])
def test_what_cannot_be_copied_is_named(rewrite):
    model = plain()
    topology = trace(model, X)
    model[1].guard = threading.Lock()
    with pytest.raises(InputError, match="'guard' of 1 is a lock"):
        rewrite(model, topology)


def test_a_lazy_module_is_refused_with_the_remedy():
    with pytest.raises(InputError, match=r"'0.weight' has no shape yet.*run"):
        trace(nn.Sequential(nn.LazyConv2d(8, 1), nn.Conv2d(8, 2, 1)), X)


def test_units_out_of_order_are_not_guessed():
    model = Block(lambda m, x: m.b(m.a(x).roll(1, 1)), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 2, 1))
    with pytest.raises(InputError, match=r"out of order in 'b\.weight'"):
        widen(model, trace(model, X), {"a": 1})


def swin() -> nn.Module:
    return SwinTransformer([4, 4], 12, [2, 2], [1, 2], [2, 2], num_classes=5)


@pytest.mark.parametrize("make", [resnet18, lambda: CNBlock(12, 1.0, 0.0), swin], ids=["basic", "convnext", "swin"])
def test_a_block_that_is_added_is_born_as_the_identity_and_can_learn(make):
    torch.manual_seed(0)
    block = make()
    model, x = (block, torch.rand(1, 3, 32, 32)) if not isinstance(block, CNBlock) else (
        nn.Sequential(nn.Conv2d(3, 12, 1), nn.Sequential(block, make())), torch.rand(1, 3, 8, 8))  # fmt: skip
    model.eval()
    topology = verify(model, trace(model, x), x)
    assert topology.block_lists and all(all(e) for blocks in topology.block_lists for e in blocks.ends)
    order = {blocks.name: [*range(len(blocks.blocks)), 0] for blocks in topology.block_lists}
    longer = arrange(model, topology, order)
    torch.testing.assert_close(longer(x), model(x), rtol=1e-5, atol=1e-6)
    longer(x).square().sum().backward()
    count = len(list(model.parameters()))
    assert len(list(longer.parameters())) > count
    back = arrange(longer, trace(longer, x), {name: range(len(blocks) - 1) for name, blocks in order.items()})
    assert all(torch.equal(one, other) for one, other in zip(back.parameters(), model.parameters(), strict=True))


def test_dropped_units_that_are_kept_again_are_the_ones_they_were():
    model = plain()
    topology = trace(model, X)
    grown = widen(model, topology, {group.name: 2 for group in topology.groups})
    back = prune(grown, trace(grown, X), {group.name: range(group.units) for group in topology.groups})
    assert all(torch.equal(one, other) for one, other in zip(back.parameters(), model.parameters(), strict=True))


def test_more_units_than_there_are_begin_as_copies_in_turn():
    model = plain()
    grown = widen(model, trace(model, X), {"0.0": 20})
    assert (grown[0][0].out_channels, grown[1][0].in_channels) == (28, 28)
    torch.testing.assert_close(grown(X), model(X))


def test_behind_a_flip_new_units_come_first_and_keep_their_norms():
    model = awake(Block(lambda m, x: m.b(m.n(m.a(x).flip(1))), a=conv(3, 8), n=nn.BatchNorm2d(8), b=nn.Conv2d(8, 2, 1)))
    before = model.n.weight.detach().clone()
    grown = widen(model, trace(model, X), {"a.0": 2})
    torch.testing.assert_close(grown(X), model(X))
    assert torch.equal(grown.n.weight, torch.cat((before[[6, 7]], before))), "of the copies of the units 1 and 0"


class Gated(nn.Module):
    """Adds a gate that is one half, not nothing, when what makes it is silent."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return x + self.conv(x).sigmoid()


class Normed(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(x + self.conv(x))


@pytest.mark.parametrize("kind", [Gated, Normed])
def test_a_block_that_is_no_identity_when_it_is_silent_is_not_born_as_one(kind):
    model = awake(nn.Sequential(conv(3, 8), nn.Sequential(kind(), kind()), nn.Conv2d(8, 2, 1)))
    topology = verify(model, trace(model, X), X)
    (blocks,) = topology.block_lists
    arrange(model, topology, {blocks.name: [1]})(X)
    with pytest.raises(InputError, match="cannot be born as the identity"):
        arrange(model, topology, {blocks.name: [0, 0, 1]})


def test_residual_blocks_swap_and_leave():
    model = awake(nn.Sequential(conv(3, 8), nn.Sequential(Residual(8, 6), Residual(8, 4)), nn.Conv2d(8, 2, 1)))
    topology = verify(model, trace(model, X), X)
    (blocks,) = topology.block_lists
    swapped = arrange(model, topology, {blocks.name: [1, 0]})
    expected = model[2](model[1][0](model[1][1](model[0](X))))
    torch.testing.assert_close(swapped(X), expected)
    torch.testing.assert_close(arrange(model, topology, {blocks.name: []})(X), model[2](model[0](X)))
