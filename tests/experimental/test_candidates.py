"""Many candidates at once: equal to one by one, bit for bit, and what they share runs once."""

import sys

import pytest
import torch
from torch import nn

from jdkd.errors import InputError
from jdkd.experimental import PrunedCandidate, score_candidates
from tests.experimental.candidate_models import Chain, assert_equal, counted, one_by_one, plain
from tests.nn.elastic_models import Net, images

CANDIDATES = [
    PrunedCandidate({"stage.2.inner": [5, 0]}),
    {"stream": [6, 1, 2], "stage.1.inner": 2},
    PrunedCandidate(skip=["stage.1"]),
    {},
    {"stage.2.inner": 3},
    PrunedCandidate({"stage.0.inner": 4}, skip=["stage.2"]),
    {"stage.2.inner": [5, 0]},
    {"stream": [6, 1, 2], "stage.1.inner": 4},
]


@pytest.mark.parametrize("share", [True, False])
def test_results_are_those_of_one_by_one_in_the_order_given(share):
    model, x = plain(), images()
    expected = one_by_one(model, CANDIDATES, x, model.elastic_groups)
    assert_equal(score_candidates(model, CANDIDATES, x, share=share), expected)
    assert "forward" not in vars(model.stem)
    scores = score_candidates(model, CANDIDATES, x, model.elastic_groups, score=torch.Tensor.sum, share=share)
    assert_equal(scores, [output.sum() for output in expected])


def test_what_candidates_share_runs_once_and_what_differs_runs():
    model = plain()
    calls = counted(model)
    inner = [{"stage.2.inner": width} for width in (1, 2, 3, 3)]
    score_candidates(model, [*inner, PrunedCandidate(skip=["stage.1"]), {}], images())
    assert calls["stem"] == calls["bn"] == 1, "nothing before the first mask runs twice"
    assert calls["stage.0"] == 1 and calls["stage.1"] == 1
    assert calls["stage.2"] == calls["head"] == 5, "two of six candidates are equal"
    assert calls[""] == 5


def test_order_does_not_cost_what_is_shared():
    model = Chain()
    calls = counted(model)
    score_candidates(model, [{"2": 1, "0": 2}, {"2": 2}, {"0": 2}, {"2": 1}, {"0": 3}, {"0": 2, "2": 2}], images())
    assert [calls[f"convs.{i}"] for i in range(4)] == [3, 3, 6, 6]


def test_equal_lists_are_gathered_once(monkeypatch):
    room = sys.modules["jdkd.experimental.masked"]
    gathered = []
    part = room._part
    monkeypatch.setattr(room, "_part", lambda *args: gathered.append(args) or part(*args))
    candidates = [{"0": [4, 2], "2": [width]} for width in (1, 2, 3, 4)]
    model = Chain()
    score_candidates(model, candidates, images())
    assert len(gathered) == 4 + 4 * 4, "weights and biases of two layers, and of two others four times"


WRITERS = {
    "tensor": lambda x: x.sub_(1),
    "view": lambda x: x[:, 0].mul_(2),
    "list": lambda x: x[0].sub_(1),
    "dictionary": lambda x: x["image"].sub_(1),
}


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", WRITERS)
def test_refuses_a_candidate_that_writes_the_batch(kind, share):
    class Writing(Chain):
        def forward(self, x):
            if self.convs[1].out_channels == 3:
                WRITERS[kind](x)
            return super().forward({"list": lambda: x[0], "dictionary": lambda: x["image"]}.get(kind, lambda: x)())

    model, x = Writing(), images()
    batch = {"list": [x], "dictionary": {"image": x}}.get(kind, x)
    score_candidates(model, [{"1": 2}, {}], batch, share=share)
    with pytest.raises(InputError, match=r"candidate 1 .* wrote into the batch in place.* x = x\.clone\(\)"):
        score_candidates(model, [{}, {"1": 3}], batch, share=share)
    assert model.convs[1].out_channels == 6


def test_every_candidate_gets_containers_of_its_own():
    class Popping(Chain):
        def forward(self, levels):
            return super().forward(levels["images"].pop())

    model, x = Popping(), images()
    batch = {"images": [x]}
    found = score_candidates(model, [{"1": 2}, {}], batch)
    assert_equal(found, [one_by_one(model, [c], {"images": [x]}, model.elastic_groups)[0] for c in ({"1": 2}, {})])
    assert len(batch["images"]) == 1


def test_a_tensor_that_a_result_names_twice_is_copied_once():
    (found,) = score_candidates(Chain(), [{}], images(), score=lambda output: {"once": output, "twice": [output]})
    assert found["once"] is found["twice"][0]


def test_hooks_run_for_every_candidate():
    model = plain()
    seen = []
    model.stage[0].conv1.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    model.stage[0].bn2.register_forward_hook(lambda module, args, output: output.add_(1))
    expected = one_by_one(model, CANDIDATES, images(), model.elastic_groups)
    one = list(seen)
    seen.clear()
    assert_equal(score_candidates(model, CANDIDATES, images()), expected)
    assert sorted(seen) == sorted(one)
    handle = nn.modules.module.register_module_forward_hook(lambda *state: seen.append(state[0]))
    try:
        score_candidates(model, [{}, {}], images())
    finally:
        handle.remove()
    assert [type(module) for module in seen].count(Net) == 2
    assert seen.count(model.stage[0].conv1) == 2


def test_images_of_inference_mode_are_shared_too():
    model = Chain()
    calls = counted(model)
    with torch.inference_mode():
        x = torch.randn(2, 3, 6, 6)
        results = score_candidates(model, [{"2": 2}, {"2": 3}], x)
        assert_equal(results, one_by_one(model, [{"2": 2}, {"2": 3}], x, model.elastic_groups))
    assert calls["convs.0"] == 1 + 2


def test_several_arguments():
    class Two(Chain):
        def forward(self, x, y, scale=None):
            return super().forward(x + y)

    model = Two()
    batch = images(), torch.ones(())
    assert_equal(score_candidates(model, [{"0": 2}], batch), one_by_one(model, [{"0": 2}], batch, model.elastic_groups))


def test_the_model_stays_after_an_exception():
    model = plain()
    state = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    with pytest.raises(RuntimeError, match="expected input"):
        score_candidates(model, CANDIDATES, torch.zeros(1, 4, 6, 6))
    with pytest.raises(ZeroDivisionError):
        score_candidates(model, CANDIDATES, images(), score=lambda output: 1 / 0)
    assert state == {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("candidates", "words"),
    [
        ([{}, {"stream": 9}], ["candidate 1", "group 'stream'", "9", "has 8"]),
        ([PrunedCandidate(skip=["stage.7"])], ["candidate 0", "'stage.7'"]),
    ],
)
def test_refuses_candidates_that_do_not_fit(candidates, words):
    with pytest.raises(InputError) as caught:
        score_candidates(plain(), candidates, images())
    for word in ["score_candidates", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("candidates", "words"),
    [
        ({"stream": 3}, r"candidates=\{'stream': 3\} is no list of candidates; give \[\{\.\.\.\}, \.\.\.\]"),
        (PrunedCandidate({"stream": 3}), r"candidates=PrunedCandidate\(.* is no list of candidates"),
        ("stream", "candidates='stream' is no list of candidates"),
        (None, "candidates=None is no list of candidates"),
        ([{}, "stream"], "candidate 1 is 'stream'; give channels by group, {group: channels}, or a PrunedCandidate"),
        ([PrunedCandidate(skip="stage.1")], "candidate 0: masked: skip='stage.1' is no list of paths"),
        ([PrunedCandidate(None)], "candidate 0: masked: keep=None is no mapping"),
    ],
)
def test_refuses_candidates_of_other_kinds(candidates, words):
    with pytest.raises(InputError, match=f"score_candidates: {words}"):
        score_candidates(plain(), candidates, images())


def test_refuses_training_mode_and_a_model_without_groups():
    model = plain()
    model.head.train()
    with pytest.raises(InputError, match=r"score_candidates: head, a Linear, is in training mode; call model.eval"):
        score_candidates(model, [{}], images())
    with pytest.raises(InputError, match="Conv2d does not say which of its channels are coupled"):
        score_candidates(nn.Conv2d(3, 3, 1).eval(), [{}], images())
