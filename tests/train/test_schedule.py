"""Named schedules, several sizes to train at, the running average, and parts of losses by name."""

import json

import pytest
import torch

from jdkd.detect.input_size import training_sizes
from jdkd.errors import InputError
from jdkd.train import DivergenceError, TrainConfig, fit
from jdkd.train.schedule import named_schedule
from tests.train.toy import Toy, same, values

CPU = {"device": "cpu"}


@pytest.mark.parametrize(("name", "drops"), [("1x", (8, 11)), ("2x", (16, 22)), ("3x", (24, 33))])
def test_named_schedules_fall_to_a_tenth_after_the_published_epochs(name, drops):
    config = TrainConfig(lr=1.0, batch_size=4, **named_schedule(name, 400, 4))
    epoch = 100
    assert config.steps == {"1x": 12, "2x": 24, "3x": 36}[name] * epoch
    for drop, before in zip(drops, (1.0, 0.1), strict=True):
        assert config.lr_at(drop * epoch - 1) == pytest.approx(before)
        assert config.lr_at(drop * epoch) == pytest.approx(before / 10)


def test_warm_up_is_of_500_steps_or_a_tenth_of_few():
    long, short = (TrainConfig(lr=1.0, **named_schedule("1x", images, 1)) for images in (1000, 10))
    assert long.lr_at(499) < 1 and long.lr_at(500) == pytest.approx(1.0)
    assert short.steps == 120 and short.lr_at(11) < 1 and short.lr_at(12) == pytest.approx(1.0)
    assert long.lr_at(250) / long.lr_at(125) == pytest.approx(251 / 126)


def test_a_cosine_of_the_same_length():
    config = TrainConfig(lr=1.0, **named_schedule("2x", 17, 2, "cosine"))
    assert config.steps == 204 and config.milestones is None
    assert config.lr_at(203) == pytest.approx(config.lr_end)
    assert named_schedule("3x", 17, 8)["steps"] == 77, "76 and a half, of which no image is left out"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"milestones": (0.9, 0.5)}, "milestones must be fractions of the cycle in 0..1 that rise"),
        ({"milestones": (8, 11)}, "milestones must be fractions"),
        ({"sizes": (64, 0)}, "sizes must be whole numbers of pixels"),
        ({"ema": 1.5}, "ema is a fraction"),
    ],
)
def test_settings_that_are_none_are_refused(settings, words):
    with pytest.raises(InputError, match=words):
        TrainConfig(steps=1, **settings)


def test_what_json_has_as_lists_is_the_same_setting():
    assert TrainConfig(steps=1, sizes=[48, 64], milestones=[0.5]) == TrainConfig(
        steps=1, sizes=(48, 64), milestones=(0.5,)
    )


def test_images_are_resized_to_all_of_the_sizes_and_the_detector_stays_as_it_was(scenes, model):
    seen, before = set(), (model.transform.min_size, model.transform.max_size)
    watched = model.transform.register_forward_hook(lambda _, __, out: seen.update(min(s) for s in out[0].image_sizes))
    fit(model, scenes, TrainConfig(steps=3, batch_size=3, sizes=(48, 64, 112), gamma_l1=0.0), **CPU)
    watched.remove()
    assert seen == {48, 64, 112} and (model.transform.min_size, model.transform.max_size) == before


def test_images_that_are_not_square_grow_to_the_largest_size_beyond_the_limit_of_the_long_side(model):
    model.transform.min_size, model.transform.max_size = (60,), 80
    for sizes, expected in (((90,), (90, 120)), ((30,), (30, 40))):
        with training_sizes(model, sizes):
            assert model.train().transform([torch.zeros(3, 60, 80)])[0].image_sizes == [expected]
    assert model.eval().transform([torch.zeros(3, 60, 80)])[0].image_sizes == [(60, 80)]


def test_sizes_are_refused_where_images_stay_as_they_are(scenes, tmp_path):
    with pytest.raises(InputError, match=r"Toy takes images as they are.*leave the sizes to train at out"):
        fit(Toy(), scenes, TrainConfig(steps=1, sizes=(48,)), **CPU, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_running_average_is_what_is_left(scenes):
    config = {"steps": 6, "batch_size": 1, "optimizer": "sgd", "lr": 0.1}
    passed, plain, averaged = [], Toy(), Toy()

    def losses(model):
        return lambda images, targets, step: (
            model(images, targets) | {"loss_norm": model.norm(torch.stack(images)[:, :2]).square().mean()}
        )

    kept = lambda *_: passed.append(values(plain))  # noqa: E731
    fit(plain, scenes, TrainConfig(**config), **CPU, losses=losses(plain), progress=kept)
    fit(averaged, scenes, TrainConfig(**config, ema=0.4), **CPU, losses=losses(averaged))
    expected = passed[0]
    for step, after in enumerate(passed[1:], start=1):
        decay = min(0.4, (1 + step) / (10 + step))
        expected = {name: decay * old + (1 - decay) * after[name] for name, old in expected.items()}
    found = values(averaged)
    assert not same(found, values(plain))
    for name in ("weight", "bias", "norm.weight", "norm.running_mean", "norm.running_var"):
        torch.testing.assert_close(found[name], expected[name])


def test_a_resumed_running_average_ends_where_an_uninterrupted_one_does(scenes, tmp_path):
    config = TrainConfig(steps=5, batch_size=1, ema=0.5, checkpoint_every=2)
    whole, halved = Toy(), Toy()
    fit(whole, scenes, config, **CPU)

    def stop(step, *_):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(halved, scenes, config, **CPU, folder=tmp_path, progress=stop)
    again = Toy()
    fit(again, scenes, config, **CPU, folder=tmp_path, resume=True)
    assert same(values(again), values(whole))
    finished = Toy()
    fit(finished, scenes, config, **CPU, folder=tmp_path, resume=True)
    assert same(values(finished), values(whole)), "a finished training that is resumed is the same"


def test_a_checkpoint_of_a_version_without_these_settings_is_carried_on(scenes, tmp_path):
    config = TrainConfig(steps=2, batch_size=1)
    fit(Toy(), scenes, config, **CPU, folder=tmp_path)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for name in ("milestones", "sizes", "ema"):
        del kept["config"][name]
    del kept["average"]
    torch.save(kept, tmp_path / "checkpoint.pt")
    assert fit(Toy(), scenes, config, **CPU, folder=tmp_path, resume=True).steps == 2


def test_parts_of_losses_are_logged_and_named_where_they_are_not_finite(scenes, tmp_path):
    toy, now = Toy(), [0]

    def losses(images, targets, step):
        now[0] = step
        terms = toy(images, targets)
        yield terms | {"loss_fit": terms["loss_fit"] * (float("inf") if step == 2 else 1)}

    def parts():
        return {"loss_fit of stride 8": torch.tensor(float("inf") if now[0] == 2 else 1.0)}

    config = TrainConfig(steps=4, batch_size=1, checkpoint_every=2, log_every=1)
    with pytest.raises(DivergenceError, match="step 3 of 4: loss_fit, loss_fit of stride 8 are not finite") as caught:
        fit(toy, scenes, config, **CPU, folder=tmp_path, losses=losses, parts=parts)
    assert f"last good checkpoint: step 2 in {tmp_path}" in str(caught.value) and caught.value.step == 3
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["parts"] for row in rows] == [{"loss_fit of stride 8": 1.0}] * 2
    assert "loss_fit of stride 8" not in rows[0]["losses"]
