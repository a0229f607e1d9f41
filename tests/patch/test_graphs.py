"""Which sizes are captured, kept and replayed, and what runs behind a replay; a GPU's part is played by a recorder."""

import pytest
import torch
from torch import Tensor, nn

from jdkd.latency.replaying import Replayed
from jdkd.latency.runtimes import _Replayed
from jdkd.patch import accelerate
from jdkd.patch.graphs import Behind, Trunk, why_no_graph
from jdkd.patch.overrides import Overrides
from jdkd.patch.plans import planned, structure_of
from tests.latency.conftest import detector
from tests.patch.test_levels import calls_of


class Recorder:
    """Stands for a CUDA graph: runs its call anew into what it has written, and counts."""

    def __init__(self) -> None:
        self.captured: list[tuple[int, ...]] = []
        self.replayed: list[tuple[int, ...]] = []

    def __call__(self, call, images: Tensor):
        self.captured.append(tuple(images.shape))
        out, recorder = call(images), self

        class Graph:
            def replay(self) -> None:
                recorder.replayed.append(tuple(images.shape))
                for into, value in zip(leaves(out), leaves(call(images)), strict=True):
                    into.copy_(value)

        return Graph(), images, out


def leaves(value) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(list(value.values()) if isinstance(value, dict) else value)


def batch(side: int) -> Tensor:
    return torch.full((1, 3, side, side), float(side))


def test_a_size_is_captured_once_it_was_seen_often_enough():
    recorder = Recorder()
    call = Replayed(lambda x: 2 * x, after=2, capture=recorder)
    for side in (4, 8, 4, 4, 8):
        assert torch.equal(call(batch(side)), 2 * batch(side))
    assert [shape[-1] for shape in recorder.captured] == [4, 8]
    assert [shape[-1] for shape in recorder.replayed] == [4, 4, 8]


def test_the_size_that_was_not_used_for_longest_goes():
    recorder = Recorder()
    call = Replayed(lambda x: 2 * x, most=2, capture=recorder)
    for side in (4, 8, 4, 16, 8):
        call(batch(side))
    assert [shape[-1] for shape in recorder.captured] == [4, 8, 16, 8]
    assert [shape[-1] for shape in call.sizes()] == [16, 8]
    call.forget()
    assert call.sizes() == []


def test_what_is_replayed_is_the_batch_that_was_given():
    call, given = Replayed(lambda x: x.sum(), capture=Recorder()), batch(4)
    assert call(given) == 192 and call(given + 1) == 240 and torch.equal(given, batch(4))


def test_another_dtype_has_a_graph_of_its_own():
    recorder = Recorder()
    call = Replayed(lambda x: x, capture=recorder)
    assert call(batch(4)).dtype == torch.float32 and call(batch(4).double()).dtype == torch.float64
    assert len(recorder.captured) == 2


def test_the_runtime_of_the_latency_harness_is_the_same_mechanism(monkeypatch):
    module = _Replayed(nn.Conv2d(3, 2, 1))
    assert isinstance(module._replayed, Replayed)


@pytest.fixture
def replaying(model, images):
    """A detector whose trunk and head are replayed by a recorder, its plain twin, and what is counted."""
    plan = planned(structure_of(model), images)
    assert plan.trunk == "backbone" and plan.behind == {"rpn.head": [0, 1]}
    plain, recorder, overrides = structure_of(model), Recorder(), Overrides()
    trunk = Trunk(model.backbone, {model.rpn.head: plan.behind["rpn.head"]}, capture=recorder)
    overrides.put(trunk)
    overrides.put(Behind(model.rpn.head))
    return model, plain, images, recorder, trunk


def test_heads_behind_a_trunk_are_replayed_with_it(replaying):
    model, plain, images, recorder, _ = replaying
    ran = calls_of(model.rpn.head.cls_logits)
    with torch.no_grad():
        for number in range(4):
            image = (images[0] + 0.1 * number).clamp(max=1)
            ours, theirs = model([image])[0], plain([image])[0]
            assert len(ours["boxes"]) > 5
            for key in ours:
                torch.testing.assert_close(ours[key], theirs[key])
        assert len(recorder.captured) == 1 and len(recorder.replayed) == 3
        ran.clear()
        model(images)
        assert len(ran) == 2, "two levels in the replay, and none behind it"
        model.rpn.head([torch.zeros(1, 8, 4, 4)] * 2)
        assert len(ran) == 4, "other levels run as they are"
        model.rpn.head.cls_logits.register_forward_hook(lambda *_: ran.append(1))
        replayed = len(recorder.replayed)
        torch.testing.assert_close(model(images)[0]["boxes"], plain(images)[0]["boxes"])
        assert len(ran) == 8 and len(recorder.replayed) == replayed, "a hook is called, level by level"


def test_what_a_trunk_and_a_head_returned_stays_when_they_run_again(replaying):
    """Whoever calls them by themselves, for features say, keeps what they returned."""
    model, plain, images, recorder, _ = replaying
    batches = [torch.stack([(images[0] + 0.2 * number).clamp(max=1)]) for number in range(4)]
    with torch.no_grad():
        ours = [(levels := model.backbone(each), model.rpn.head([*levels.values()])) for each in batches]
        theirs = [(levels := plain.backbone(each), plain.rpn.head([*levels.values()])) for each in batches]
    assert len(recorder.replayed) == 3
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_two_sizes_do_not_see_each_other(replaying):
    model, plain, images, recorder, _ = replaying
    other = [images[0][:, :, :64]]
    with torch.no_grad():
        for given in (images, other, images, other, images, other):
            ours, theirs = model(given)[0], plain(given)[0]
            torch.testing.assert_close(ours["boxes"], theirs["boxes"])
    assert len(set(recorder.captured)) == 2


def test_weights_that_were_exchanged_are_captured_anew(replaying):
    model, _, images, recorder, trunk = replaying
    with torch.no_grad():
        model(images), model(images)
        assert len(trunk.replayed.sizes()) == 1
        other = detector(seed=4)
        model.load_state_dict(other.state_dict(), assign=True)
        for _ in range(3):
            torch.testing.assert_close(model(images)[0]["boxes"], other(images)[0]["boxes"])
    assert len(recorder.captured) == 2


def test_on_a_cpu_it_is_left_out_and_says_why(model, images):
    one = accelerate(model, images, ingredients=("graphs",), timed=False)
    assert one.kept == ()
    assert one.trials[0].reason == "it captures work of an NVIDIA GPU, and the model is on cpu"
    assert "which module makes levels" in why_no_graph(torch.device("cuda"), None)
    assert why_no_graph(torch.device("cuda"), "backbone") is None
