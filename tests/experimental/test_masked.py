"""Candidates evaluated in place: equal to the pruned network, and the model is what it was afterwards."""

import copy

import pytest
import torch
from torch import nn

from jdkd.errors import InputError
from jdkd.experimental import masked
from jdkd.nn import ElasticGroups, Subnet, export, set_subnet
from tests.nn.elastic_models import BLOCKS, GROUPS, Net, images, randomised, supernet

DECLARED = ElasticGroups(GROUPS)
KEPT = {
    "none": {},
    "leading": {"stream": 5, "stage.1.inner": 2},
    "listed": {"stream": [6, 1, 2], "stage.0.inner": [3], "stage.2.inner": torch.tensor([5, 0])},
    "permuted": {"stage.1.inner": [5, 4, 3, 2, 1, 0]},
}
kept_of = pytest.mark.parametrize("keep", KEPT.values(), ids=KEPT)


def _plain() -> Net:
    return randomised(Net(), seed=3)


def _pruned(model: Net, keep: dict) -> nn.Module:
    net = supernet()
    net.load_state_dict(model.state_dict())
    set_subnet(net, Subnet(keep))
    return export(net)


def _fingerprint(model: nn.Module) -> dict:
    """Everything that a candidate could leave behind."""
    tensors = {name: (id(t), t.data_ptr(), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    return {
        "tensors": {name: (identity, address) for name, (identity, address, _) in tensors.items()},
        "values": {name: value for name, (_, _, value) in tensors.items()},
        "modules": {name: id(module) for name, module in model.named_modules()},
        "requires": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "repr": repr(model),
    }


def _assert_untouched(model: nn.Module, before: dict) -> None:
    after = _fingerprint(model)
    for name, value in before.pop("values").items():
        assert torch.equal(value, after["values"][name]), name
    after.pop("values")
    assert after == before


@kept_of
def test_a_candidate_equals_the_pruned_network_and_the_model_stays(keep):
    model, x = _plain(), images()
    before, whole = _fingerprint(model), model(x)
    pruned = _pruned(model, keep)
    with masked(model, keep, DECLARED) as candidate:
        assert candidate is model
        torch.testing.assert_close(model(x), pruned(x))
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, pruned.state_dict()[name], rtol=0, atol=0)
        assert repr(model.stage[0].depthwise) == repr(pruned.stage[0].depthwise)
    _assert_untouched(model, before)
    torch.testing.assert_close(model(x), whole, rtol=0, atol=0)


def test_the_model_stays_after_an_exception():
    model = _plain()
    before = _fingerprint(model)
    with pytest.raises(RuntimeError, match="expected input"), masked(model, KEPT["listed"], DECLARED, skip=BLOCKS[:1]):
        model(torch.zeros(1, 4, 6, 6))
    _assert_untouched(model, before)


@kept_of
def test_inactive_channels_are_never_computed(keep):
    model, x = _plain(), images()
    pruned = _pruned(model, keep)
    for name, kept in keep.items():
        size = {"stream": 8}.get(name, 6)
        active = range(kept) if isinstance(kept, int) else torch.as_tensor(kept).tolist()
        dropped = torch.tensor([c for c in range(size) if c not in active], dtype=torch.int64)
        for path, side, *repeat in GROUPS[name]:
            times = repeat[0] if repeat else 1
            entries = (dropped[:, None] * times + torch.arange(times)).flatten()
            for tensor in model.get_submodule(path).state_dict().values():
                if side == "in" and tensor.dim() > 1:
                    tensor.index_fill_(1, entries, torch.nan)
                elif side == "out" and tensor.dim() > 0:
                    tensor.index_fill_(0, entries, torch.nan)
    with masked(model, keep, DECLARED):
        torch.testing.assert_close(model(x), pruned(x))


def test_leading_channels_are_views_of_the_weights():
    model = _plain()
    weight = model.stem.weight
    with masked(model, {"stream": 5}, DECLARED):
        assert model.stem.weight.data_ptr() == weight.data_ptr()
        assert model.stem.weight.shape[0] == 5


@pytest.mark.parametrize("keep", [{"stream": 5}, {"stream": [6, 1, 2]}], ids=["leading", "listed"])
def test_statistics_that_are_calibrated_are_those_of_the_candidate(keep):
    model, x = _plain(), images()
    before = _fingerprint(model)
    with masked(model, keep, DECLARED):
        of_parent = model.bn.running_mean.clone()
        model.bn.train()
        model(x)
        model.bn.eval()
        assert model.bn.num_batches_tracked == before["values"]["bn.num_batches_tracked"] + 1
        assert not torch.equal(model.bn.running_mean, of_parent)
    _assert_untouched(model, before)


def test_what_is_written_into_leading_weights_reaches_the_model():
    model = _plain()
    weight = model.stem.weight.detach().clone()
    with masked(model, {"stream": 5}, DECLARED):
        model.stem.weight.zero_()
    weight[:5] = 0
    assert torch.equal(model.stem.weight, weight)


def test_a_batch_norm_outside_all_groups_is_written_as_ever():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)).eval()
    with masked(model, {"g": 2}, ElasticGroups({"g": [("0", "out"), ("1", "in")]})):
        model[2].train()
        model(images())
    assert model[2].num_batches_tracked == 1


def test_what_else_a_subclass_holds_stays_whole():
    class Gated(nn.Conv2d):
        def __init__(self, *args):
            super().__init__(*args)
            self.register_buffer("table", torch.arange(8.0))
            self.register_buffer("running_mean", torch.arange(8.0))
            self.gains = nn.Parameter(torch.arange(8.0))

        def forward(self, x):
            return super().forward(x) * self.table[-1] + self.gains[-1] - self.running_mean[-1]

    class Tabled(nn.BatchNorm2d):
        def __init__(self, *args):
            super().__init__(*args)
            self.register_buffer("table", torch.arange(8.0))

        def forward(self, x):
            return super().forward(x) + self.table[-1]

    model, x = nn.Sequential(Gated(3, 4, 1), Tabled(4), nn.Conv2d(4, 2, 1)).eval(), images()
    pruned = copy.deepcopy(model)
    pruned[0].weight.data, pruned[0].bias.data = model[0].weight[:2], model[0].bias[:2]
    pruned[1] = Tabled(2).eval()
    pruned[2].weight.data = model[2].weight[:, :2]
    groups = ElasticGroups({"g": [("0", "out"), ("1", "out"), ("2", "in")]})
    with masked(model, {"g": 2}, groups):
        torch.testing.assert_close(model(x), pruned(x))


def test_blocks_can_be_left_out():
    model, x = _plain(), images()
    pruned = _pruned(model, KEPT["listed"])
    pruned.stage[1] = nn.Identity()
    before = _fingerprint(model)
    with masked(model, {**KEPT["listed"], "stage.1.inner": 2}, DECLARED, skip=["stage.1"]):
        torch.testing.assert_close(model(x), pruned(x))
    _assert_untouched(model, before)


def test_candidates_of_candidates():
    model, x = _plain(), images()
    pruned = _pruned(model, {"stream": [6, 2]})
    before = _fingerprint(model)
    with masked(model, {"stream": [6, 1, 2]}, DECLARED), masked(model, {"stream": [0, 2]}, DECLARED):
        torch.testing.assert_close(model(x), pruned(x))
    _assert_untouched(model, before)


def test_a_candidate_of_a_shallower_candidate():
    model, x = _plain(), images()
    pruned = _pruned(model, {"stream": [6, 2], "stage.0.inner": 4})
    pruned.stage[1] = nn.Identity()
    before = _fingerprint(model)
    with masked(model, {"stage.0.inner": 4}, DECLARED, skip=["stage.1"]):
        with masked(model, {"stream": [6, 2]}, DECLARED):
            torch.testing.assert_close(model(x), pruned(x))
        with (
            pytest.raises(InputError, match=r"no group 'stage\.1\.inner'"),
            masked(model, {"stage.1.inner": 2}, DECLARED),
        ):
            pass
    _assert_untouched(model, before)


def test_a_layer_at_two_paths_is_masked_at_both_and_runs_where_it_is_not_skipped():
    shared = nn.Conv2d(6, 6, 1)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Sequential(shared), shared, nn.Conv2d(6, 2, 1)).eval()
    sides = [("0", "out"), ("1.0", "in"), ("1.0", "out"), ("3", "in")]
    kept, x = [5, 0, 2], images()
    pruned = copy.deepcopy(model)
    pruned[0].weight.data, pruned[0].bias.data = model[0].weight[kept], model[0].bias[kept]
    pruned[2].weight.data, pruned[2].bias.data = shared.weight[kept][:, kept], shared.bias[kept]
    pruned[3].weight.data = model[3].weight[:, kept]
    before = _fingerprint(model)
    for declared in (sides, [*sides, ("2", "in"), ("2", "out")]):
        with masked(model, {"g": kept}, ElasticGroups({"g": declared})):
            torch.testing.assert_close(model(x), pruned(x))
    with masked(model, {"g": kept}, ElasticGroups({"g": sides}), skip=["1"]):
        torch.testing.assert_close(model(x), nn.Sequential(pruned[0], pruned[2], pruned[3])(x))
    _assert_untouched(model, before)
    apart = ElasticGroups({"g": [("0", "out"), ("1.0", "in")], "h": [("1.0", "out"), ("2", "in")]})
    with pytest.raises(InputError, match=r"2 and 1\.0 are one module, and its side 'in' is in the groups 'h' and 'g'"):
        with masked(model, {"g": 2}, apart):
            pass


def test_layers_that_share_a_weight_are_masked_each_for_itself():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    model[2].weight = model[0].weight
    x = torch.randn(3, 4)
    hidden = model[0](x)[:, :2] @ model[1].weight[:, :2].T + model[1].bias
    expected = model[2](hidden)[:, :3]
    groups = ElasticGroups({"a": [("0", "out"), ("1", "in")], "b": [("2", "out")]})
    with masked(model, {"a": 2, "b": 3}, groups):
        torch.testing.assert_close(model(x), expected)
    assert model[2].weight is model[0].weight


def test_the_groups_of_the_model_are_taken_if_none_are_given():
    model, x = _plain(), images()
    with pytest.raises(InputError, match="Net does not say which of its channels are coupled"), masked(model, {}):
        pass
    model.elastic_groups, pruned = DECLARED, _pruned(model, {"stream": 5})
    with masked(model, {"stream": 5}):
        torch.testing.assert_close(model(x), pruned(x))


def test_refuses_a_weight_that_is_computed():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)).eval()
    nn.utils.parametrizations.weight_norm(model[0])
    with pytest.raises(InputError, match=r"0 \(groups g\): the weight of this \w+ is computed"):
        with masked(model, {"g": 2}, ElasticGroups({"g": [("0", "out"), ("1", "in")]})):
            pass


def test_a_gradient_reaches_the_input_and_no_weight():
    model, x = _plain(), images().requires_grad_()
    with masked(model, KEPT["listed"], DECLARED):
        model(x).sum().backward()
    assert x.grad.any()
    assert model.stem.weight.grad is None


@pytest.mark.parametrize(
    ("keep", "skip", "words"),
    [
        ({"stream": 9}, (), ["group 'stream'", "9", "has 8"]),
        ({"stream": [0, 8]}, (), ["group 'stream'", "index 8"]),
        ({"stage.0.inner": [2, 2]}, (), ["group 'stage.0.inner'", "2 twice"]),
        ({"stage.0.inner": []}, (), ["group 'stage.0.inner'", "0 channels of 6"]),
        ({"stream": torch.ones(8, dtype=torch.bool)}, (), ["group 'stream'", "boolean mask"]),
        ({"rest": 2}, (), ["'rest'", "stream"]),
        ({}, ["stage.7"], ["'stage.7'", "Net does not have"]),
        ({}, [""], ["''"]),
    ],
)
def test_refuses_channels_that_do_not_fit(keep, skip, words):
    model = _plain()
    before = _fingerprint(model)
    with pytest.raises(InputError) as caught, masked(model, keep, DECLARED, skip=skip):
        pass
    for word in ["masked", *words]:
        assert word in str(caught.value)
    _assert_untouched(model, before)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((None, DECLARED), {}, "masked: keep=None is no mapping; give {group: channels}"),
        (([3], DECLARED), {}, r"masked: keep=\[3\] is no mapping"),
        (({"stream": 3}, GROUPS), {}, "masked: groups is a dict; give an ElasticGroups"),
        (({}, DECLARED), {"skip": "stage.1"}, "masked: skip='stage.1' is no list of paths"),
        (({}, DECLARED), {"skip": None}, "masked: skip=None is no list of paths"),
        (({}, DECLARED), {"skip": iter(["stage.1"])}, "masked: skip=<.*> is no list of paths"),
        (({}, DECLARED), {"skip": [1]}, r"masked: skip=\[1\] is no list of paths"),
    ],
)
def test_refuses_arguments_of_other_kinds(arguments, options, words):
    with pytest.raises(InputError, match=words), masked(_plain(), *arguments, **options):
        pass


def test_refuses_training_mode_and_layers_it_does_not_know():
    with pytest.raises(InputError, match=r"bn, a BatchNorm2d, is in training mode .* call model.eval"):
        with masked(_plain().train(), {"stream": 4}, DECLARED):
            pass
    with pytest.raises(InputError, match=r"stem \(groups stream\): ElasticConv2d is an elastic layer; use set_subnet"):
        with masked(supernet(), {"stream": 4}, DECLARED):
            pass
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4))
    with pytest.raises(InputError, match=r"1 \(groups g\): GroupNorm cannot be masked"):
        with masked(model, {"g": 2}, ElasticGroups({"g": [("0", "out"), ("1", "out")]})):
            pass
