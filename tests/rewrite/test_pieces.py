"""Every piece that people build detectors of: cut and grown at any size of input, or kept with a reason."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from jdkd.graph import Topology, trace
from jdkd.rewrite import mask, prune, verify, widen
from jdkd.rewrite.trial import comparable
from tests.graph.networks import awake, conv
from tests.rewrite.blocks import FREE, KEPT, Block, c

TRACED = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).double()
OTHER = torch.rand(3, 3, 24, 20, generator=torch.Generator().manual_seed(2)).double()
READERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
ATTENTION = ("matmul attention", "einsum attention", "bmm attention", "fused attention")


def around(piece: nn.Module) -> nn.Module:
    model = awake(nn.Sequential(conv(3, 8), piece, conv(8, 10), nn.Conv2d(10, 4, 1))).double()
    for module in model.modules():
        for hidden in getattr(module, "hidden", ()):
            hidden.double()
    return model


def draws(topology: Topology) -> Iterator[dict[str, list[int]]]:
    """Every group alone, and all together, each with some of its units."""
    generator = torch.Generator().manual_seed(0)
    keep = {
        group.name: torch.randperm(group.units, generator=generator)[: max(1, int(0.6 * group.units))].tolist()
        for group in topology.groups
    }
    yield from ({name: units} for name, units in keep.items())
    yield keep


def deaf(model: nn.Module, topology: Topology, keep: dict[str, list[int]]) -> nn.Module | None:
    """The model whose readers get zeros for the units that go, by hooks, without a look at weights; None where
    something that is no module reads."""
    model = copy.deepcopy(model)
    for group in (group for group in topology.groups if group.name in keep):
        for slot in (slot for slot in group.slots if slot.role == "in"):
            owner = slot.tensor.partition(".parametrizations")[0].removesuffix(".weight")
            reader = dict(model.named_modules()).get(owner)
            gone = torch.tensor([p for k in range(group.units) if k not in keep[group.name] for p in slot.places[k]])
            if not isinstance(reader, READERS):
                return None
            dim = -1 if isinstance(reader, nn.Linear) else 1
            reader.register_forward_pre_hook(lambda _, x, gone=gone, dim=dim: x[0].index_fill(dim, gone, 0.0))
    return model


def check(model: nn.Module, topology: Topology) -> None:
    with torch.no_grad():
        for keep in draws(topology):
            cut, masked, unheard = (
                prune(model, topology, keep),
                mask(model, topology, keep),
                deaf(model, topology, keep),
            )
            for x in (TRACED, OTHER):
                torch.testing.assert_close(cut(x), masked(x), rtol=1e-9, atol=1e-9)
                if unheard is not None:
                    torch.testing.assert_close(cut(x), unheard(x), rtol=1e-9, atol=1e-9)
        for count in (1, 3):
            grown = widen(model, topology, {group.name: count for group in topology.groups if group.grows})
            for x in (TRACED, OTHER):
                torch.testing.assert_close(grown(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FREE)
def test_a_piece_is_cut_and_grown_at_any_size_of_input(name):
    model = around(FREE[name]())
    traced = trace(model, TRACED)
    topology = verify(model, traced, TRACED)
    assert [group.name for group in topology.groups] == [group.name for group in traced.groups]
    assert not topology.unknown and ("0.0.weight", 0) in {(s.tensor, s.dim) for g in topology.groups for s in g.slots}
    makers = {f"1.{n}.weight" for n, m in model[1].named_modules() if isinstance(m, READERS) and len(m.weight) > 1}
    if not name.startswith("deformable") and name not in ATTENTION:  # offsets are positions, a head's inside is summed
        assert makers <= {s.tensor for g in topology.groups for s in g.slots if s.role == "out"}
    assert {g.name for g in topology.groups if not g.grows} == ({"1.primary.0"} if name == "ghost" else set())
    check(model, topology)


@pytest.mark.parametrize("name", KEPT)
def test_a_piece_that_looks_across_channels_keeps_them_and_says_why(name):
    make, words = KEPT[name]
    model = around(make())
    topology = verify(model, trace(model, TRACED), TRACED)
    reasons = [frozen.reason for frozen in topology.frozen if ("0.0.weight", 0) in frozen.tensors]
    assert any(words in reason for reason in reasons) or name == "sampled"
    assert "2.0" in [group.name for group in topology.groups]  # the rest can still be cut
    check(model, topology)


def test_what_fits_only_while_both_are_of_one_size_is_found():
    class Expanded(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * self.b(x).expand_as(x)

    model = around(Expanded())
    traced = trace(model, TRACED)
    assert len(traced.groups) == 3
    assert [group.name for group in verify(model, traced, TRACED).groups] == ["2.0"]


def test_zeros_of_a_young_model_hide_no_difference():
    piece = KEPT["numbers in code"][0]()
    model = nn.Sequential(conv(3, 8), piece, nn.Conv2d(8, 4, 1))
    nn.init.zeros_(model[2].weight)
    assert not verify(model, trace(model, TRACED.float()), TRACED.float()).groups


def test_scores_of_a_deep_model_are_not_all_alike_where_it_is_compared():
    blocks = nn.Sequential(*(Block(lambda m, x: x + m.b(m.a(x)), a=c(6, 4), b=c(4, 6)) for _ in range(30)))
    model = nn.Sequential(conv(3, 6), blocks, nn.Conv2d(6, 1, 1), nn.Sigmoid()).eval()
    (scores,) = comparable(model, (TRACED.float(),)).returned[""]
    assert scores.min() > 1e-3 and scores.max() < 1 - 1e-3 and scores.std() > 0.05
