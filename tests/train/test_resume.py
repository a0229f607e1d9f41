"""What survives an interruption, a divergence and a full disk."""

import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from jdkd.errors import InputError
from jdkd.notices import Notice
from jdkd.train import DivergenceError, TrainConfig, engine, fit
from jdkd.train.divergence import NonFiniteMonitor
from tests.detectors import detector, small_spec
from tests.train.scenes import write_scenes
from tests.train.toy import Toy, same, values

CPU = {"device": "cpu"}


def interrupt_at(when: int):
    def progress(step, total, losses):
        if step == when:
            raise KeyboardInterrupt

    return progress


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(scenes, tmp_path, optimizer):
    config = TrainConfig(steps=6, batch_size=2, flip=0.5, optimizer=optimizer, lr=1e-3, log_every=1)
    whole, halves = detector(small_spec()), detector(small_spec())
    fit(whole, scenes, config, **CPU, folder=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(halves, scenes, config, **CPU, folder=tmp_path / "halves", progress=interrupt_at(3))
    fresh = detector(small_spec(), seed=5)
    assert not same(values(whole), values(halves))
    report = fit(fresh, scenes, config, **CPU, folder=tmp_path / "halves", resume=True)
    assert report.steps == 6
    assert same(values(whole), values(fresh))
    logs = [[{**row, "step_seconds": 0} for row in rows(tmp_path / run)] for run in ("whole", "halves")]
    assert logs[0] == logs[1]


def test_ctrl_c_lets_the_step_finish(scenes, tmp_path):
    config = TrainConfig(steps=6, batch_size=2)
    whole, halves = detector(small_spec()), detector(small_spec())
    fit(whole, scenes, config, **CPU)

    def losses(images, targets, step):
        terms = halves(images, targets)  # the running statistics have moved, the weights have not
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        yield terms

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(halves, scenes, config, **CPU, folder=tmp_path, losses=losses)
    assert signal.getsignal(signal.SIGINT) is handler
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 3
    fit(halves, scenes, config, **CPU, folder=tmp_path, resume=True)
    assert same(values(whole), values(halves))


@pytest.mark.parametrize("last", [2, 4])
def test_the_step_that_ctrl_c_let_finish_is_in_the_log(scenes, tmp_path, last):
    model, config = Toy(), TrainConfig(steps=4, batch_size=1, log_every=1)

    def losses(images, targets, step):
        if step == last - 1:
            os.kill(os.getpid(), signal.SIGINT)
        yield model(images, targets)

    with pytest.raises(KeyboardInterrupt):
        fit(model, scenes, config, **CPU, folder=tmp_path / "cut", losses=losses)
    resumed = fit(model, scenes, config, **CPU, folder=tmp_path / "cut", resume=True)
    whole = fit(Toy(), scenes, config, **CPU, folder=tmp_path / "whole")
    logs = [[{**row, "step_seconds": 0} for row in rows(tmp_path / run)] for run in ("whole", "cut")]
    assert logs[0] == logs[1] and resumed.losses == whole.losses


def test_an_interruption_in_the_middle_of_a_step_keeps_the_last_checkpoint(scenes, tmp_path):
    def losses(images, targets, step):
        if step == 3:
            raise KeyboardInterrupt
        yield model(images, targets)

    model = Toy()
    config = TrainConfig(steps=6, batch_size=1, checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt):
        fit(model, scenes, config, **CPU, folder=tmp_path, losses=losses)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2


def test_resuming_what_is_finished_does_nothing(scenes, tmp_path):
    config = TrainConfig(steps=4, batch_size=1)
    model, again = Toy(), Toy()
    first = fit(model, scenes, config, **CPU, folder=tmp_path)
    second = fit(again, scenes, config, **CPU, folder=tmp_path, resume=True)
    assert same(values(model), values(again))
    assert (second.steps, second.losses) == (4, first.losses)


def test_a_resumed_training_has_taken_the_time_of_both(scenes, tmp_path):
    config = TrainConfig(steps=4, batch_size=1)
    with pytest.raises(KeyboardInterrupt):
        fit(Toy(), scenes, config, **CPU, folder=tmp_path, progress=interrupt_at(2))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.save({**state, "seconds": 1000.0}, tmp_path / "checkpoint.pt")
    report = fit(Toy(), scenes, config, **CPU, folder=tmp_path, resume=True)
    assert 1000 < report.seconds < 1100 and rows(tmp_path)[-1]["step_seconds"] < 50


def test_resuming_an_empty_folder_starts_from_the_beginning(scenes, tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 9}\n')
    model, plain = Toy(), Toy()
    config = TrainConfig(steps=3, batch_size=1)
    fit(model, scenes, config, **CPU, folder=tmp_path, resume=True)
    fit(plain, scenes, config, **CPU)
    assert same(values(model), values(plain))
    assert [row["step"] for row in rows(tmp_path)] == [1, 3]


def test_the_log_loses_what_comes_after_the_checkpoint(scenes, tmp_path):
    config = TrainConfig(steps=6, batch_size=1, checkpoint_every=2, log_every=1)

    def killed(step, total, losses):
        if step == 3:
            raise MemoryError

    with pytest.raises(MemoryError):
        fit(Toy(), scenes, config, **CPU, folder=tmp_path, progress=killed)
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"step": 4, "lr"')
    fit(Toy(), scenes, config, **CPU, folder=tmp_path, resume=True)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_folder_with_another_run_is_left_alone(scenes, tmp_path):
    config = TrainConfig(steps=2, batch_size=1)
    fit(Toy(), scenes, config, **CPU, folder=tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    model = Toy()
    with pytest.raises(InputError, match=r"holds another run .*resume it or give another folder"):
        fit(model, scenes, config, **CPU, folder=tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert same(values(model), values(Toy()))


def test_refuses_another_config_and_names_what_differs(scenes, tmp_path):
    fit(Toy(), scenes, TrainConfig(steps=2, batch_size=1, lr=1e-3), **CPU, folder=tmp_path)
    settings = {"amp": "bf16", "by_aspect": False, "clip": 1.0, "ema": 0.9, "flip": 0.5, "gamma_l1": 0.0, "seed": 1}
    settings |= {"warmup": 0.2, "lr_end": 0.1, "weight_decay": 0.0, "optimizer": "sgd", "momentum": 0.5, "sizes": (9,)}
    other = TrainConfig(steps=9, batch_size=1, lr=1e-4, cycle_steps=20, cycle_start=3, accumulate=2, **settings)
    with pytest.raises(InputError) as caught:
        fit(detector(small_spec()), scenes, other, **CPU, folder=tmp_path, resume=True)
    assert "lr was 0.001 and is 0.0001; lr_end was" in str(caught.value)
    assert "batch_size" not in str(caught.value)
    changed = {*settings, "steps", "lr", "cycle_steps", "cycle_start", "accumulate"}
    assert {name for name in changed if f"{name} was " not in str(caught.value)} == set()


def test_what_does_not_decide_the_result_may_change_on_resume(scenes, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(
            Toy(),
            scenes,
            TrainConfig(steps=4, batch_size=1),
            **CPU,
            folder=tmp_path,
            progress=interrupt_at(2),
        )
    config = TrainConfig(steps=4, batch_size=1, log_every=3, checkpoint_every=1)
    assert fit(Toy(), scenes, config, **CPU, folder=tmp_path, resume=True).steps == 4


def test_refuses_other_data(scenes, tmp_path):
    config = TrainConfig(steps=2, batch_size=1)
    fit(Toy(), scenes, config, **CPU, folder=tmp_path / "run")
    other = write_scenes(tmp_path / "data", images=5)
    with pytest.raises(InputError, match=r"other data.*images was 12 and is 5"):
        fit(Toy(), other, config, **CPU, folder=tmp_path / "run", resume=True)


def test_refuses_another_model(scenes, tmp_path):
    config = TrainConfig(steps=1, batch_size=1)
    fit(detector(small_spec()), scenes, config, **CPU, folder=tmp_path)
    with pytest.raises(InputError, match=r"does not fit this model.*backbone"):
        fit(detector(small_spec(fpn=8)), scenes, config, **CPU, folder=tmp_path, resume=True)


def test_a_damaged_checkpoint_is_named(scenes, tmp_path):
    config = TrainConfig(steps=1, batch_size=1)
    fit(Toy(), scenes, config, **CPU, folder=tmp_path)
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"checkpoint .*checkpoint\.pt cannot be read"):
        fit(Toy(), scenes, config, **CPU, folder=tmp_path, resume=True)


@pytest.mark.parametrize("content", [{"step": 3}, [1, 2], torch.zeros(2), {"model": {}, "epoch": 1}])
def test_a_foreign_checkpoint_is_refused_and_kept(scenes, tmp_path, content):
    torch.save(content, tmp_path / "checkpoint.pt")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(InputError, match=r"checkpoint\.pt is not one that a training left: it holds"):
        fit(Toy(), scenes, TrainConfig(steps=1, batch_size=1), **CPU, folder=tmp_path, resume=True)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize(("name", "content"), [("step", "two"), ("model", None), ("config", []), ("data", 3)])
def test_a_checkpoint_of_other_kinds_of_fields_is_refused(scenes, tmp_path, name, content):
    config = TrainConfig(steps=1, batch_size=1)
    fit(Toy(), scenes, config, **CPU, folder=tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.save({**state, name: content}, tmp_path / "checkpoint.pt")
    with pytest.raises(InputError, match=f"not one that a training left: its {name} is a {type(content).__name__}"):
        fit(Toy(), scenes, config, **CPU, folder=tmp_path, resume=True)


@pytest.mark.parametrize("content", [b"", b"junk" * 99])
def test_a_checkpoint_that_cannot_be_read_says_what_torch_makes_of_it(scenes, tmp_path, content):
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"checkpoint\.pt cannot be read \(\w+Error.*\); delete it"):
        fit(Toy(), scenes, TrainConfig(steps=1, batch_size=1), **CPU, folder=tmp_path, resume=True)


def test_log_lines_that_are_none_of_ours_are_dropped(scenes, tmp_path):
    config = TrainConfig(steps=2, batch_size=1, log_every=1)
    with pytest.raises(KeyboardInterrupt):
        fit(Toy(), scenes, config, **CPU, folder=tmp_path, progress=interrupt_at(1))
    lines = (tmp_path / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_bytes(
        b'{"loss": 1}\n[1]\n{"step": "two"}\n\xff\nnull\n{"step": true}\n' + lines.encode()
    )
    fit(Toy(), scenes, config, **CPU, folder=tmp_path, resume=True)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def test_another_precision_on_another_device_is_resumed_and_said(scenes, tmp_path):
    config = TrainConfig(steps=2, batch_size=1)
    with pytest.raises(KeyboardInterrupt):
        fit(Toy(), scenes, config, **CPU, folder=tmp_path, progress=interrupt_at(1))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    scaled = torch.amp.GradScaler("cpu", enabled=True).state_dict()
    torch.save({**state, "precision": "float16", "scaler": scaled}, tmp_path / "checkpoint.pt")
    with pytest.warns(Notice, match="begun in float16 and goes on in float32, as amp 'auto' has it on cpu"):
        assert fit(Toy(), scenes, config, **CPU, folder=tmp_path, resume=True).steps == 2


def test_nan_stops_and_keeps_the_last_good_checkpoint(scenes, tmp_path):
    model = Toy()

    def losses(images, targets, step):
        terms = model(images, targets)
        if step == 4:
            terms["loss_bias"] = terms["loss_bias"] * float("nan")
        yield terms

    config = TrainConfig(steps=8, batch_size=1, checkpoint_every=2, lr=0.5)
    with pytest.raises(DivergenceError) as caught:
        fit(model, scenes, config, **CPU, folder=tmp_path, losses=losses)
    message = str(caught.value)
    assert isinstance(caught.value, InputError) and (caught.value.step, caught.value.what) == (5, "loss_bias")
    assert "diverged at step 5 of 8: loss_bias" in message and f"step 4 in {tmp_path}" in message
    assert "lower lr (0.5)" in message
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert kept["step"] == 4
    assert same(kept["model"], values(model)), "the step that diverged must not be taken"


@pytest.mark.parametrize("end", ["a checkpoint is due", "ctrl-c"])
def test_a_divergence_that_was_not_looked_for_yet_is_not_saved(scenes, tmp_path, monkeypatch, end):
    """As on a GPU, where a step does not wait for its losses."""
    monkeypatch.setattr(
        engine._Run, "_see", lambda run, names, values, **_: run.monitor.observe(run.step + 1, names, values)
    )
    model = Toy()

    def losses(images, targets, step):
        return {name: loss * (float("nan") if step == 2 else 1) for name, loss in model(images, targets).items()}

    config = TrainConfig(steps=8, batch_size=1, checkpoint_every=2, log_every=100)
    stop = interrupt_at(3) if end == "ctrl-c" else None
    with pytest.raises(DivergenceError, match="step 3 of 8: loss_fit, loss_bias are not finite"):
        fit(model, scenes, config, **CPU, folder=tmp_path, losses=losses, progress=stop)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2


def test_the_watch_finds_the_first_step_without_looking_at_each():
    monitor = NonFiniteMonitor()
    for step in range(1, 9):
        loss = torch.tensor([1.0, float("inf") if step in (4, 6) else 1.0])
        monitor.observe(step, ("loss_a", "loss_b"), loss)
        monitor.observe(step, ("gradient norm",), torch.tensor([float("nan") if step >= 5 else 1.0]))
        assert monitor.first() == ((4, "loss_b") if step >= 4 else None)


def test_a_full_disk_leaves_the_previous_checkpoint(scenes, tmp_path):
    config = TrainConfig(steps=4, batch_size=1, checkpoint_every=1, log_every=100)
    before, limits = [], resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step, total, losses):
        if step == 2:
            before.append((tmp_path / "checkpoint.pt").read_bytes())
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))

    try:
        with pytest.raises(InputError, match=rf"cannot write {tmp_path}/checkpoint.pt .*too large.*make room"):
            fit(Toy(), scenes, config, **CPU, folder=tmp_path, progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before[0]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoint.pt", "log.jsonl"]
    assert fit(Toy(), scenes, config, **CPU, folder=tmp_path, resume=True).steps == 4


def test_a_file_that_is_no_log_is_left_alone(scenes, tmp_path):
    (tmp_path / "log.jsonl").write_text('{"time": 1}\n')
    with pytest.raises(InputError, match=r"log\.jsonl is not the log of a training"):
        fit(Toy(), scenes, TrainConfig(steps=1), **CPU, folder=tmp_path)
    assert rows(tmp_path) == [{"time": 1}]


def test_a_folder_that_cannot_be_made_is_named(scenes, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"cannot write {tmp_path}/file/run/log.jsonl"):
        fit(Toy(), scenes, TrainConfig(steps=1), **CPU, folder=tmp_path / "file" / "run")
