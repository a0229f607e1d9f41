"""The training loop: what one step does, and what a training leaves as it was."""

import dataclasses
import json

import pytest
import torch
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from jdkd.errors import InputError
from jdkd.train import DivergenceError, TrainConfig, evaluate, fit
from jdkd.train.optimizer import build_optimizer
from tests.detectors import detector, small_spec
from tests.train.scenes import write_scenes
from tests.train.toy import Toy, same, values

CPU = {"device": "cpu"}
PLAIN = {
    "optimizer": "sgd",
    "momentum": 0.0,
    "weight_decay": 0.0,
    "gamma_l1": 0.0,
    "clip": 0.0,
    "warmup": 0.0,
}


def test_a_detector_learns_the_scenes(scenes):
    from tests.detectors import build

    torch.manual_seed(1)
    model = build(small_spec())
    before = evaluate(model, scenes, **CPU).map
    report = fit(model, scenes, TrainConfig(steps=120, batch_size=4, seed=1), **CPU)
    assert report.steps == 120 and report.seconds > 0
    assert {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"} == report.losses.keys()
    assert before < 0.05
    assert evaluate(model, scenes, **CPU).map > 0.15


def test_is_a_function_of_the_seed_alone(scenes):
    def trained(seed: int, noise: int) -> dict:
        model = Toy()
        torch.manual_seed(noise)
        fit(model, scenes, TrainConfig(steps=5, batch_size=2, seed=seed), **CPU)
        return values(model)

    assert same(trained(0, noise=1), trained(0, noise=2))
    assert not same(trained(0, noise=1), trained(1, noise=1))


def test_what_a_step_draws_is_of_the_seed_and_the_step(scenes):
    def drawn(seed: int) -> list[float]:
        model, found = Toy(), []
        losses = lambda images, targets, step: [found.append(torch.rand(()).item()), model(images, targets)][1:]  # noqa: E731
        fit(model, scenes, TrainConfig(steps=3, batch_size=1, seed=seed), **CPU, losses=losses)
        return found

    assert drawn(0) == drawn(0) and len({*drawn(0), *drawn(1)}) == 6


def test_leaves_generators_modes_and_gradients_as_they_were(scenes):
    model = Toy()
    model.norm.eval()
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    modes = []
    config = TrainConfig(steps=2, batch_size=2)
    fit(
        model,
        scenes,
        config,
        **CPU,
        losses=lambda i, t, s: [modes.append(model.norm.training) or model(i, t)],
    )
    assert torch.equal(torch.rand(3), expected)
    assert modes == [True, True]
    assert model.training and not model.norm.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_each_dictionary_is_back_propagated_before_the_next_is_asked_for(scenes):
    model, seen = Toy(), []

    def losses(images, targets, step):
        seen.append(model.weight.grad)
        yield {"loss_a": model.weight.sum(), "loss_b": model.weight.sum()}
        seen.append(model.weight.grad.clone())
        yield {"loss_a": 3 * model.weight.sum()}
        seen.append(model.weight.grad.clone())

    before = model.weight.detach().clone()
    report = fit(model, scenes, TrainConfig(steps=1, batch_size=1, lr=0.1, **PLAIN), **CPU, losses=losses)
    assert seen[0] is None
    assert torch.equal(seen[1], torch.full((1, 3), 2.0)) and torch.equal(seen[2], torch.full((1, 3), 5.0))
    assert torch.allclose(model.weight, before - 0.5)
    assert report.losses == {"loss_a": pytest.approx(8.0), "loss_b": pytest.approx(2.0)}


def test_losses_may_be_a_single_dictionary(scenes):
    a, b = Toy(), Toy()
    fit(a, scenes, TrainConfig(steps=3, batch_size=2), **CPU, losses=lambda i, t, s: a(i, t))
    fit(b, scenes, TrainConfig(steps=3, batch_size=2), **CPU)
    assert same(values(a), values(b))


def test_a_loss_of_one_value_is_a_scalar_and_one_of_more_is_refused(scenes):
    a, b = Toy(), Toy()
    config = TrainConfig(steps=3, batch_size=2)
    report = fit(a, scenes, config, **CPU, losses=lambda i, t, s: {k: loss[None] for k, loss in a(i, t).items()})
    assert report == dataclasses.replace(fit(b, scenes, config, **CPU), seconds=report.seconds)
    assert same(values(a), values(b))
    with pytest.raises(InputError, match=r"loss_fit is a tensor \[2\], and a loss is a scalar"):
        fit(a, scenes, config, **CPU, losses=lambda i, t, s: {"loss_fit": a.weight[0, :2] ** 2})


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_gradients_are_clipped_by_their_common_norm(scenes, amp):
    model = Toy()
    before = model.weight.detach().clone()
    config = TrainConfig(steps=1, batch_size=1, lr=1.0, amp=amp, **{**PLAIN, "clip": 0.01})
    fit(model, scenes, config, **CPU, losses=lambda i, t, s: {"loss": 100 * model.weight.sum()})
    assert (model.weight - before).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_sgd_has_the_momentum_that_it_was_given(scenes):
    model = Toy()
    before = model.weight.detach().clone()
    config = TrainConfig(steps=2, batch_size=1, lr=0.1, lr_end=1.0, **{**PLAIN, "momentum": 0.5})
    fit(model, scenes, config, **CPU, losses=lambda i, t, s: {"loss": model.weight.sum()})
    assert torch.allclose(model.weight, before - 0.1 - 0.1 * 1.5)


def test_every_step_has_the_rate_of_its_place_in_the_cycle(scenes):
    model, passed = Toy(), []
    config = TrainConfig(steps=5, batch_size=1, lr=0.1, **{**PLAIN, "warmup": 0.4})
    kept = lambda *_: passed.append(model.weight.detach().clone())  # noqa: E731
    before = model.weight.detach().clone()
    fit(model, scenes, config, **CPU, losses=lambda i, t, s: {"loss": model.weight.sum()}, progress=kept)
    moved = [(one - other).mean().item() for one, other in zip([before, *passed], passed, strict=False)]
    assert moved == pytest.approx([config.lr_at(step) for step in range(5)], rel=1e-4)


def test_norms_and_biases_are_not_decayed():
    model = Toy()
    decayed, others = build_optimizer(model, TrainConfig(steps=1, weight_decay=0.3)).param_groups
    assert decayed["weight_decay"] == 0.3 and [id(p) for p in decayed["params"]] == [id(model.weight)]
    assert others["weight_decay"] == 0.0
    assert {id(p) for p in others["params"]} == {id(model.bias), id(model.norm.weight), id(model.norm.bias)}


def test_slimming_moves_scales_towards_zero_by_its_strength(scenes):
    model = Toy()
    before = model.norm.weight.detach().clone()
    config = TrainConfig(steps=1, batch_size=1, lr=1.0, **{**PLAIN, "gamma_l1": 0.125})
    fit(model, scenes, config, **CPU, losses=lambda i, t, s: {"loss": 0 * model.norm.weight.sum()})
    assert torch.allclose(model.norm.weight, before - 0.125 * before.sign())


def test_slimming_leaves_scales_alone_that_took_no_part(scenes):
    model = Toy()
    before = model.norm.weight.detach().clone()
    config = TrainConfig(steps=2, batch_size=1, lr=1.0, **{**PLAIN, "gamma_l1": 0.125})
    fit(model, scenes, config, **CPU, losses=lambda i, t, s: {"loss": model.weight.sum()})
    assert torch.equal(model.norm.weight, before)


def test_frozen_parameters_stay(scenes):
    model = Toy()
    model.bias.requires_grad_(False)
    model.norm.weight.requires_grad_(False)
    before = values(model)
    fit(model, scenes, TrainConfig(steps=2, batch_size=1, gamma_l1=0.1), **CPU)
    assert torch.equal(model.norm.weight, before["norm.weight"])
    assert torch.equal(model.bias, before["bias"]) and not torch.equal(model.weight, before["weight"])
    with pytest.raises(InputError, match="Toy has no parameter that can be trained"):
        fit(model.requires_grad_(False), scenes, TrainConfig(steps=2, batch_size=1), **CPU)


def test_losses_are_computed_under_autocast_and_the_rest_is_not(scenes):
    model, dtypes, outside = Toy(), [], []
    model.weight.register_hook(lambda grad: outside.append(torch.is_autocast_enabled("cpu")))

    def losses(images, targets, step):
        for _ in range(2):
            product = torch.ones(2, 1) @ model.weight
            dtypes.append(product.dtype)
            yield {"loss": product.sum()}

    fit(model, scenes, TrainConfig(steps=1, batch_size=1, amp="bf16"), **CPU, losses=losses)
    assert dtypes == [torch.bfloat16, torch.bfloat16] and outside == [False, False]
    fit(model, scenes, TrainConfig(steps=1, batch_size=1, amp="auto"), **CPU, losses=losses)
    assert dtypes[2:] == [torch.float32, torch.float32]


def test_torchvisions_own_coarsest_levels_train_outside_of_autocast(scenes):
    """As those of our families do: a RetinaNet of torchvision's in bfloat16, at 64 pixels on a CPU."""
    model, dtypes = Toy(), []
    model.coarsest = LastLevelP6P7(2, 2)
    model.coarsest.p7.register_forward_pre_hook(lambda _, given: dtypes.append(given[0].dtype))

    def losses(images, targets, step):
        levels, _ = model.coarsest([torch.ones(1, 2, 4, 2)], [torch.ones(1, 2, 4, 2)], ["2"])
        yield {"loss": levels[-1].sum() + 0 * model.weight.sum()}

    fit(model, scenes, TrainConfig(steps=1, batch_size=1, amp="bf16"), **CPU, losses=losses)
    assert dtypes == [torch.float32] and type(model.coarsest) is LastLevelP6P7


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_a_detector_trains_in_reduced_precision(scenes, model, amp):
    before = values(model)
    report = fit(model, scenes, TrainConfig(steps=3, batch_size=2, lr=1e-4, amp=amp), **CPU)
    assert report.steps == 3
    after = values(model)
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert after["backbone.body.conv1.weight"].dtype == torch.float32
    assert not torch.equal(after["backbone.body.conv1.weight"], before["backbone.body.conv1.weight"])


def overflowing(model: Toy, at: int):
    """Losses that are finite but whose gradient is infinite at one step."""

    def losses(images, targets, step):
        term = model.weight.sum()
        if step == at:
            term.register_hook(lambda grad: grad * float("inf"))
        yield {"loss": term * 1.0}

    return losses


def test_an_overflow_under_loss_scaling_skips_the_step_and_lowers_the_scale(scenes, tmp_path):
    model, weights = Toy(), []
    config = TrainConfig(steps=3, batch_size=1, amp="fp16", log_every=1, **PLAIN)

    def keep(step, total, losses):
        weights.append(model.weight.detach().clone())

    fit(model, scenes, config, **CPU, losses=overflowing(model, at=1), folder=tmp_path, progress=keep)
    assert torch.equal(weights[1], weights[0]) and not torch.equal(weights[2], weights[1])
    text = (tmp_path / "log.jsonl").read_text()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]  # which JSON does not have
    assert [row["loss_scale"] for row in rows] == [65536.0, 32768.0, 32768.0]
    assert [row["grad_norm"] is None for row in rows] == [False, True, False]


def test_a_gradient_that_overflows_at_every_scale_is_divergence(scenes):
    model = Toy()
    config = TrainConfig(steps=60, batch_size=1, amp="fp16", log_every=1, **PLAIN)

    def losses(images, targets, step):
        yield from overflowing(model, at=step)(images, targets, step)

    with pytest.raises(DivergenceError, match="gradient norm is not finite") as caught:
        fit(model, scenes, config, **CPU, losses=losses)
    assert 20 < caught.value.step < 40


def test_an_infinite_gradient_without_loss_scaling_is_divergence(scenes):
    model, weights = Toy(), []
    config = TrainConfig(steps=3, batch_size=1, **PLAIN)

    def keep(step, total, losses):
        weights.append(model.weight.detach().clone())

    with pytest.raises(DivergenceError, match="step 2 of 3: gradient norm is not finite") as caught:
        fit(model, scenes, config, **CPU, losses=overflowing(model, at=1), progress=keep)
    assert (caught.value.step, caught.value.what) == (2, "gradient norm")
    assert torch.equal(model.weight, weights[-1]), "the step must not be taken"


def test_reports_progress_after_every_step(scenes):
    seen = []
    config = TrainConfig(steps=5, batch_size=1, log_every=2)
    fit(Toy(), scenes, config, **CPU, progress=lambda step, total, losses: seen.append((step, total, losses)))
    assert [(step, total) for step, total, _ in seen] == [(step, 5) for step in range(1, 6)]
    assert seen[0][2].keys() == {"loss_fit", "loss_bias"}
    assert seen[2][2] == seen[1][2] != seen[3][2], "losses are fetched at log lines only"


def test_writes_nothing_without_a_folder(scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(Toy(), scenes, TrainConfig(steps=2, batch_size=1, checkpoint_every=1), **CPU)
    assert not list(tmp_path.iterdir())


def test_the_log_has_what_a_step_did(scenes, tmp_path):
    config = TrainConfig(steps=5, batch_size=1, lr=1e-3, log_every=2)
    fit(Toy(), scenes, config, **CPU, folder=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 4, 5]
    assert [row["lr"] for row in rows] == [config.lr_at(step) for step in (0, 1, 3, 4)]
    assert all(row["losses"].keys() == {"loss_fit", "loss_bias"} for row in rows)
    assert all(row["grad_norm"] > 0 and row["step_seconds"] > 0 for row in rows)


def test_a_batch_without_variance_says_what_to_do(tmp_path):
    data = write_scenes(tmp_path, images=2, size=(32, 32))
    with pytest.raises(InputError, match=r"batch_size 1 leaves a batch norm 1 value a channel.*\[1, 32, 1, 1\]"):
        fit(
            detector(small_spec(min_size=32, max_size=32)), data, TrainConfig(steps=1, batch_size=1),
            device="cpu", folder=tmp_path / "out",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_an_image_of_which_no_pixel_would_be_left_is_named_before_the_first_step(tmp_path):
    data = write_scenes(tmp_path / "data", images=2, size=(32, 4000))
    with pytest.raises(InputError, match=r"0\.png is 32x4000 .*raise max_size to 125"):
        fit(detector(small_spec()), data, TrainConfig(steps=1), device="cpu", folder=tmp_path / "out")
    assert not (tmp_path / "out").exists()
