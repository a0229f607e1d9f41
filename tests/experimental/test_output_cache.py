"""What a candidate is given of an earlier one's run, and what runs again."""

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from torch import nn

from jdkd.experimental import PrunedCandidate, score_candidates
from jdkd.nn import ElasticGroups
from tests.experimental.candidate_models import Chain, assert_equal, counted, one_by_one
from tests.nn.elastic_models import images


class Adding(nn.Module):
    def forward(self, x):
        return x.add_(1)


class Doubled(nn.Module):
    """Calls a layer that it does not own alone."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(self.inner(x) + 1)


class Named(nn.Module):
    """Gives a dictionary, and keeps the one it gave: what its caller does to that must not come back."""

    def forward(self, x):
        return OrderedDict(a=x + 1, b=[x])


class Reading(nn.Module):
    """Mutates the containers and writes the tensors that it is given."""

    def forward(self, levels):
        levels["b"].append(levels.pop("a"))
        levels["b"][0] += 1
        return sum(levels["b"])


class Calling(nn.Module):
    """A function, as a module that nothing is known of."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, *unknown):
        return self.function(x)


class Filled(nn.Module):
    """Writes as a kernel does that PyTorch does not know of, into memory that was only taken."""

    def __init__(self, take: Callable[[torch.Size], torch.Tensor]):
        super().__init__()
        self.take = take

    def forward(self, x):
        taken = self.take(x.shape)
        taken.numpy()[...] = x.numpy()
        return taken


SHARED = nn.Conv2d(6, 6, 1)
LIKE = torch.zeros(())
TAKEN = {
    "empty": torch.empty,
    "empty_like": lambda shape: torch.empty_like(LIKE.expand(shape), memory_format=torch.contiguous_format),
    "new_empty": LIKE.new_empty,
    "aten.empty": torch.ops.aten.empty.memory_format,
}
WHOLE = [nn.Identity(), nn.Identity()]  # between layers that are masked
BETWEEN = {
    "activations in place": [nn.ReLU(inplace=True)] * 4,
    "writers of their inputs": [nn.Sequential(nn.BatchNorm2d(6), Adding()), Adding(), Adding(), nn.Identity()],
    "dictionaries": [nn.Sequential(Named(), Reading()), nn.Identity(), nn.Sequential(Named(), Reading()), Adding()],
    **{f"{name} filled unseen": [Filled(take)] * 4 for name, take in TAKEN.items()},
    "a module used twice": [Doubled(SHARED), *WHOLE, Doubled(SHARED)],
}


@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
def test_what_was_written_since_is_not_given_again(between):
    model, x = Chain(*between), images()
    candidates = [{"2": 2}, {"2": 3}, {}, {"1": [5, 1], "2": 1}, {"1": [5, 1]}, {"1": [0, 2]}]
    expected = one_by_one(model, candidates, x, model.elastic_groups)
    assert_equal(score_candidates(model, candidates, x), expected)
    assert torch.equal(x, images())


@pytest.mark.parametrize("relu", [nn.ReLU(inplace=True), Calling(torch.relu_), Calling(torch.relu)])
def test_what_follows_a_function_or_an_activation_in_place_is_shared(relu):
    model = Chain(nn.Identity(), relu, nn.Identity(), nn.Identity())
    calls = counted(model)
    score_candidates(model, [{"2": 2}, {"2": 3}, {}], images())
    written = 1 if relu.__class__ is Calling and relu.function is torch.relu else 3
    assert [calls[f"convs.{i}"] for i in range(4)] == [1, written, 3, 3]


def test_what_ran_in_another_precision_is_not_given_again():
    class Twice(nn.Module):
        """In bfloat16 once, if the block runs, and then as it is called."""

        def __init__(self):
            super().__init__()
            self.conv, self.block = nn.Conv2d(3, 3, 1), Calling(self.first)

        def first(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                return self.conv(x).float()

        def forward(self, x):
            return self.conv(self.block(x))

    model, x = Twice().eval(), images()
    candidates = [PrunedCandidate(skip=["block"]), {}, PrunedCandidate(skip=["block"])]
    for whole in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=not whole):
            expected = one_by_one(model, candidates, x, ElasticGroups({}))
            assert_equal(score_candidates(model, candidates, x, ElasticGroups({})), expected)


class Aliased(nn.Module):
    """Writes in place what a module gave as it took it, and reads what that took."""

    def __init__(self, alias: nn.Module):
        super().__init__()
        self.pre, self.alias, self.fc = nn.Conv2d(3, 6, 1), alias, nn.Conv2d(6, 6, 1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        taken = self.pre(x) * 1.0
        self.act(self.alias(taken))
        return self.fc(taken)


ALIASES = [nn.Dropout(), nn.Identity(), nn.Flatten(), nn.Unflatten(1, (2, 3)), nn.Sequential()]


@pytest.mark.parametrize("alias", [*ALIASES, nn.Sequential(nn.Identity(), nn.Flatten())], ids=repr)
def test_what_shares_memory_with_its_input_is_not_given_again(alias):
    model, x = Aliased(alias).eval(), images()
    candidates = [PrunedCandidate(skip=["act"]), {}]
    expected = one_by_one(model, candidates, x, ElasticGroups({}))
    assert not torch.equal(*expected)
    assert_equal(score_candidates(model, candidates, x, ElasticGroups({})), expected)


def test_what_follows_a_module_that_shares_memory_with_its_input_is_shared():
    model = Chain(nn.Dropout(), nn.Unflatten(1, (6,)), nn.Identity(), nn.Identity())
    calls = counted(model)
    score_candidates(model, [{"2": 2}, {"2": 3}, {}], images())
    assert [calls[f"convs.{i}"] for i in range(4)] == [1, 1, 3, 3]
    assert calls["between.0"] == calls["between.1"] == 3


class Unequal(nn.Module):
    """Writes a view in place, of tensors whose memory is not theirs alone to name."""

    def __init__(self, make: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.make, self.view, self.act = make, Calling(lambda x: x.unsqueeze(-1)), Calling(torch.relu_)

    def forward(self, x):
        taken = self.make(x) * 1.0
        self.act(self.view(taken))
        return torch.cat([row.flatten() for row in taken.unbind()])


LAYOUTS = {
    "strided": lambda x: x,
    "jagged": lambda x: torch.nested.nested_tensor([x[:1], x], layout=torch.jagged),
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_a_view_is_not_given_again_in_any_layout(make):
    model, x = Unequal(make).eval(), torch.randn(3, 4)
    candidates = [PrunedCandidate(skip=["act"]), {}]
    expected = one_by_one(model, candidates, x, ElasticGroups({}))
    assert not torch.equal(*expected)
    assert_equal(score_candidates(model, candidates, x, ElasticGroups({})), expected)


def test_sparse_tensors_pass():
    model = nn.Sequential(Calling(torch.Tensor.to_sparse), Calling(torch.relu), Calling(torch.Tensor.to_dense))
    x, groups = torch.randn(3, 4), ElasticGroups({})
    assert_equal(score_candidates(model.eval(), [{}, {}], x, groups), one_by_one(model, [{}, {}], x, groups))


def test_a_result_that_its_caller_writes_is_not_given_again():
    model = Chain()
    expected = one_by_one(model, [{}, {}], images(), model.elastic_groups)
    assert_equal(
        score_candidates(model, [{}, {}], images(), score=lambda output: output.mul_(2)), [e * 2 for e in expected]
    )


SCORES = {
    "output": None,
    "several": lambda output: {"twice": [output, output[0]], "half": output[:, :3]},
    "NumPy's": lambda output: output.numpy(),
    "with a function": lambda output: [output[:, :3], lambda: None],  # cannot be pickled
}


@pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
def test_a_result_stays_when_a_later_candidate_writes_what_it_shares(score):
    block = nn.Sequential(Calling(torch.relu_), nn.Conv2d(6, 6, 1))
    model, x = nn.Sequential(nn.Conv2d(3, 6, 1), block).eval(), images()
    candidates = [PrunedCandidate(skip=["1"]), {}]
    expected = one_by_one(model, candidates, x, ElasticGroups({}))
    found = score_candidates(model, candidates, x, ElasticGroups({}), score=score)
    for result, output in zip(found, expected, strict=True):
        wanted = output if score is None else score(output)
        assert_equal(*([value[0] if isinstance(value, list) else value] for value in (result, wanted)))


class Held:
    """Holds a tensor where nothing but its own code finds it."""

    def __init__(self, held):
        self.held = held

    def __reduce__(self):
        raise TypeError("cannot be pickled")


@pytest.mark.parametrize("at", ["score", "output", "elsewhere"])
def test_what_a_result_holds_unseen_stays_when_a_later_candidate_writes_it(at):
    class Writing(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            return Held(y) if at == "output" else y

    block = nn.Sequential(Calling(torch.relu_), nn.Conv2d(6, 6, 1))
    model, x = Writing(nn.Conv2d(3, 6, 1), block).eval(), images()
    candidates, kept = [PrunedCandidate(skip=["1"]), {}], []
    expected = one_by_one(model, candidates, x, ElasticGroups({}))
    score = {"score": Held, "output": None, "elsewhere": lambda y: kept.append((y, y.clone()))}[at]
    found = score_candidates(model, candidates, x, ElasticGroups({}), score=score)
    if at == "elsewhere":
        assert len(kept) == 2 and all(torch.equal(now, then) for now, then in kept)
    else:
        assert_equal([value.held for value in found], [getattr(value, "held", value) for value in expected])


def test_what_a_hook_caught_stays_when_a_later_candidate_writes_it():
    block, caught = nn.Sequential(Calling(torch.relu_), nn.Conv2d(6, 6, 1)), []
    model, x = nn.Sequential(nn.Conv2d(3, 6, 1), block, nn.Identity()).eval(), images()
    model[2].register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    candidates = [PrunedCandidate(skip=["1"]), {}]
    expected = one_by_one(model, candidates, x, ElasticGroups({}))
    assert_equal(score_candidates(model, candidates, x, ElasticGroups({}), score=lambda _: caught[-1]), expected)


def test_a_score_that_writes_its_output_does_not_undo_sharing():
    model = Chain()
    calls = counted(model)
    score_candidates(model, [{}, {}], images(), score=lambda output: Held(output.zero_()))
    assert [calls[f"convs.{i}"] for i in range(4)] == [1, 1, 1, 1]


def test_what_cannot_be_told_apart_runs_again():
    class Called(nn.Module):
        def forward(self, x, function):
            return function(x)

    class Lambdas(Chain):
        def forward(self, x):
            return super().forward(self.between[0](x, lambda y: y + self.shift))

    model = Lambdas(Called())
    model.between = nn.ModuleList([Called(), *[nn.Identity()] * 3])
    model.shift = 0.0

    def forward(x):
        model.shift += 1
        return Chain.forward(model, x)

    model.between[0].forward = lambda x, function=lambda y: y: function(x)
    model.eval()
    calls = counted(model)
    score_candidates(model, [{}, {}], images(), score=lambda output: None)
    assert calls["between.0"] == 1 + 1


@pytest.mark.parametrize(
    "draw", [torch.rand_like, lambda x: nn.functional.dropout(x, 0.5), nn.functional.gumbel_softmax]
)
def test_what_a_function_draws_at_random_is_new(draw):
    class Drawing(Chain):
        def forward(self, x):
            return super().forward(draw(x))

    model = Drawing()
    calls = counted(model)
    score_candidates(model, [{"2": 2}, {"2": 3}], images())
    assert [calls[f"convs.{i}"] for i in range(4)] == [2, 2, 2, 2]


def test_dropout_in_evaluation_is_no_draw():
    class Dropping(Chain):
        def forward(self, x):
            return super().forward(nn.functional.dropout(x, 0.5, self.training))

    model = Dropping()
    calls = counted(model)
    score_candidates(model, [{"2": 2}, {"2": 3}], images())
    assert [calls[f"convs.{i}"] for i in range(4)] == [1, 1, 2, 2]
