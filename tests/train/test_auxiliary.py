"""What is trained beside a model, and what a training takes over from its parent's optimizer."""

import copy

import pytest
import torch
from torch import nn

from jdkd.errors import InputError
from jdkd.train import TrainConfig, fit
from jdkd.train.optimizer import build_optimizer, inherit_moments
from tests.train.toy import Toy, same, values

CPU = {"device": "cpu"}


class Scale(nn.Module):
    """Stands for adapters: it takes part in the losses and is no part of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[2.0]]))
        self.norm = nn.BatchNorm1d(1)


def losses_of(model: Toy, scale: Scale):
    def losses(images, targets, step):
        terms = model(images, targets)
        brightness = torch.stack([image.mean() for image in images])[:, None]
        yield terms | {"loss_scaled": (scale.norm(brightness) * scale.weight * model.weight).square().mean()}

    return losses


def trained(scenes, config, model=None, **how) -> tuple[Toy, Scale]:
    model, scale = model or Toy(), Scale()
    fit(model, scenes, config, **CPU, losses=losses_of(model, scale), auxiliary=scale, **how)
    return model, scale


def test_it_is_trained_with_the_model_decayed_like_it_and_left_in_its_mode(scenes):
    model, scale = trained(scenes, TrainConfig(steps=3, batch_size=2, weight_decay=0.1))
    assert scale.weight != 2 and scale.norm.num_batches_tracked == 3 and scale.weight.grad is None
    assert model.state_dict().keys() == Toy().state_dict().keys()
    groups = build_optimizer(model, TrainConfig(steps=1, weight_decay=0.1), scale.eval()).param_groups
    decay = {name: group["weight_decay"] for group in groups for name in group["param_names"]}
    assert decay["auxiliary.weight"] == decay["weight"] == 0.1 and decay["auxiliary.norm.weight"] == 0
    fit(
        model,
        scenes,
        TrainConfig(steps=1, batch_size=2),
        **CPU,
        losses=losses_of(model, scale.train()),
        auxiliary=scale,
    )
    assert scale.training


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_resumed_it_ends_where_it_would_have_bit_for_bit(scenes, tmp_path, optimizer):
    config = TrainConfig(steps=6, batch_size=2, optimizer=optimizer, lr=1e-2)

    def stop(step, total, losses):
        if step == 3:
            raise KeyboardInterrupt

    whole = trained(scenes, config)
    with pytest.raises(KeyboardInterrupt):
        trained(scenes, config, folder=tmp_path, progress=stop)
    resumed = trained(scenes, config, folder=tmp_path, resume=True)
    assert all(same(values(ours), values(theirs)) for ours, theirs in zip(whole, resumed, strict=True))


def test_a_checkpoint_with_and_a_training_without_one_do_not_fit(scenes, tmp_path):
    config = TrainConfig(steps=2, batch_size=2)
    trained(scenes, config, folder=tmp_path / "with")
    fit(Toy(), scenes, config, **CPU, folder=tmp_path / "without")
    with pytest.raises(InputError, match=r"norm\.bias of an auxiliary module, and fit was given none"):
        fit(Toy(), scenes, config, **CPU, folder=tmp_path / "with", resume=True)
    with pytest.raises(InputError, match=r"does not fit this model.*Scale"):
        trained(scenes, config, folder=tmp_path / "without", resume=True)
    state = torch.load(tmp_path / "with" / "checkpoint.pt", weights_only=True)
    torch.save({**state, "auxiliary": 3}, tmp_path / "with" / "checkpoint.pt")
    with pytest.raises(InputError, match="its auxiliary is a int, not a dict"):
        trained(scenes, config, folder=tmp_path / "with", resume=True)


def test_a_checkpoint_from_before_there_were_any_is_resumed(scenes, tmp_path):
    config = TrainConfig(steps=2, batch_size=2)
    model = Toy()
    fit(model, scenes, config, **CPU, folder=tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del state["auxiliary"]
    for group in state["optimizer"]["param_groups"]:
        del group["param_names"]
    torch.save(state, tmp_path / "checkpoint.pt")
    again = Toy()
    fit(again, scenes, config, **CPU, folder=tmp_path, resume=True)
    assert same(values(model), values(again))


def test_parameters_of_the_model_are_not_trained_twice(scenes):
    model = Toy()
    with pytest.raises(InputError, match=r"auxiliary holds the model's own norm\.weight"):
        fit(model, scenes, TrainConfig(steps=1), **CPU, auxiliary=model.norm)
    with pytest.raises(InputError, match=r"auxiliary is 3; give a torch\.nn\.Module"):
        fit(model, scenes, TrainConfig(steps=1), **CPU, auxiliary=3)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("give", ["folder", "file"])
def test_a_child_goes_on_with_its_parents_moments(scenes, tmp_path, optimizer, give):
    """Two trainings of one step, the second at the first's end, are the optimizer's second step."""
    config = TrainConfig(steps=1, batch_size=2, optimizer=optimizer, lr=1e-2, warmup=0, clip=0, gamma_l1=0)
    model = Toy()
    fit(model, scenes, config, **CPU, folder=tmp_path)
    file = tmp_path / "checkpoint.pt"
    state = torch.load(file, weights_only=True)
    fresh, expected = copy.deepcopy(model), copy.deepcopy(model)
    reference = build_optimizer(expected, config)
    reference.load_state_dict(copy.deepcopy(state["optimizer"]))
    fit(fresh, scenes, config, **CPU)
    given = tmp_path if give == "folder" else str(file)

    def recorded(images, targets, step):
        terms = model(images, targets)
        gradients.extend(torch.autograd.grad(sum(terms.values()), [model.weight, model.bias], retain_graph=True))
        yield terms

    gradients = []
    fit(model, scenes, config, **CPU, losses=recorded, inherit=given)
    expected.weight.grad, expected.bias.grad = gradients
    reference.step()
    assert torch.equal(model.weight, expected.weight) and torch.equal(model.bias, expected.bias)
    assert not torch.equal(model.weight, fresh.weight)


class Wider(Toy):
    """A child whose weight grew, with one parameter more."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, -2.0, 3.0, 4.0]]))
        self.more = nn.Parameter(torch.tensor([[5.0]]))

    def forward(self, images, targets):
        return super().forward(images, targets) | {"loss_more": self.more.square().sum()}


def test_what_is_of_another_shape_or_new_begins_fresh_and_so_does_what_is_auxiliary(scenes, tmp_path):
    config = TrainConfig(steps=4, batch_size=2)
    trained(scenes, config, folder=tmp_path / "parent")
    trained(scenes, config, Wider(), folder=tmp_path / "child", inherit=tmp_path / "parent")
    state = torch.load(tmp_path / "child" / "checkpoint.pt", weights_only=True)["optimizer"]
    steps = {
        name: int(state["state"][number]["step"])
        for group in state["param_groups"]
        for number, name in zip(group["params"], group["param_names"], strict=True)
        if number in state["state"]
    }
    assert steps == {"bias": 8, "weight": 4, "more": 4} | dict.fromkeys(
        ("auxiliary.weight", "auxiliary.norm.weight", "auxiliary.norm.bias"), 4
    )


def test_a_training_that_is_resumed_needs_its_parent_no_more(scenes, tmp_path):
    config = TrainConfig(steps=2, batch_size=2)
    fit(Toy(), scenes, config, **CPU, folder=tmp_path / "parent")
    model, again = Toy(), Toy()
    how = {"folder": tmp_path / "child", "inherit": tmp_path / "parent", "resume": True}
    fit(model, scenes, config, **CPU, **how)
    (tmp_path / "parent" / "checkpoint.pt").unlink()
    fit(again, scenes, config, **CPU, **how)
    assert same(values(model), values(again))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": {}}, "holds a dict that is not the state of an optimizer"),
        ({"param_groups": [{"params": [0]}], "state": {}}, "with its parameters' names; give the checkpoint"),
        ({"param_groups": [{"params": [0], "param_names": ["a"]}], "state": {0: {"exp_avg": torch.ones(1)}}},
         r"moments of 1 parameters \(a\), and none has the name and shape of one of the 4"),
        ({"param_groups": [{"params": [0], "param_names": ["a"]}], "state": {0: {"momentum_buffer": torch.ones(1)}}},
         r"another optimizer \(momentum_buffer; this one keeps exp_avg\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_inherited_is_named(given, message):
    optimizer = build_optimizer(Toy(), TrainConfig(steps=1))
    with pytest.raises(InputError, match=message):
        inherit_moments(optimizer, given)
    assert not optimizer.state


def test_a_parent_that_is_not_there_is_named_before_anything_is_written(scenes, tmp_path):
    with pytest.raises(InputError, match=r"inherit names nowhere, where no checkpoint is; give the folder"):
        fit(Toy(), scenes, TrainConfig(steps=1), **CPU, folder=tmp_path / "run", inherit="nowhere")
    assert not (tmp_path / "run").exists()
