import io
from pathlib import Path

import pytest
from rich.console import Console

from jdkd.cli.flags import RecipeFlags, TrainingFlags
from jdkd.cli.progress import Progress
from jdkd.cli.training import Job
from jdkd.train import TrainConfig


@pytest.fixture
def on(monkeypatch):
    """A progress display on a terminal or on a file, and what it has shown."""

    def make(terminal):
        shown = io.StringIO()
        console = Console(file=shown, force_terminal=terminal, width=120)
        monkeypatch.setattr("rich.console.Console", lambda **options: console)
        return Progress(), shown

    return make


def test_a_file_gets_one_line_for_a_quick_task(on):
    progress, shown = on(False)
    with progress:
        for done in range(1001):
            progress.task("train")(done, 1000, {"loss": 0.123456})
    assert shown.getvalue() == "train  1000/1000  loss 0.1235\n"


def test_a_file_gets_a_line_every_quarter_of_a_minute(on, monkeypatch):
    progress, shown = on(False)
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with progress:
        for done in range(1, 101):
            now[0] += 1.0
            progress("pool", done, 100)
    assert [line.split()[1] for line in shown.getvalue().splitlines()] == [
        *("16/100", "31/100", "46/100", "61/100", "76/100", "91/100", "100/100")
    ]


def test_what_begins_again_under_its_name_is_timed_anew(on, monkeypatch):
    progress, shown = on(False)
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with progress:
        for _ in range(3):
            for done in range(11):
                progress("timing", done, 10)
                now[0] += 6.0
            now[0] += 10_000.0
    lines = shown.getvalue().splitlines()
    assert lines == lines[:4] * 3
    assert [line.partition("about ")[2] for line in lines[:4]] == ["42 s left", "24 s left", "6 s left", ""]


def test_a_bar_that_begins_again_is_seen_again_and_timed_anew(on):
    progress, _ = on(True)
    with progress:
        progress("timing", 10, 10)
        (task,) = progress._bars.tasks
        progress._bars.update(task.id, visible=False)
        begun = task.start_time
        progress("timing", 10, 10)
        assert task.finished and not task.visible
        progress("timing", 1, 10)
    assert task.visible and not task.finished and task.start_time > begun


def test_a_terminal_gets_bars_and_keeps_few_of_them(on):
    progress, shown = on(True)
    with progress:
        for number in range(12):
            progress(f"candidate [{number}]", 5, 5, {"mAP": 0.5})
    assert "candidate [11]" in shown.getvalue() and "mAP 0.5" in shown.getvalue()
    assert sum(task.visible for task in progress._bars.tasks) <= 7


def test_a_training_tells_its_images_per_second_and_what_is_left(on, monkeypatch):
    progress, shown = on(False)
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    report = progress.training("train", 4)
    for step in range(1, 61):
        report(step, 60, {"loss": 0.5})
        now[0] += 2.0
    first, *_, last = shown.getvalue().splitlines()
    assert first == "train  9/60  loss 0.5 images/s 2  about 102 s left".replace("102 s", "2 min")
    assert last == "train  60/60  loss 0.5 images/s 2"


def test_the_images_per_second_are_those_of_a_step(on, monkeypatch):
    progress, shown = on(False)
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    config = TrainConfig(steps=2, batch_size=3, accumulate=4)
    job = Job("train", Path(), None, None, None, config, RecipeFlags(), TrainingFlags(), "cpu")
    report = job.shown(progress, "train")
    for step in (1, 2):
        report(step, 2, {})
        now[0] += 2.0
    assert shown.getvalue().splitlines()[-1] == "train  2/2  images/s 6"
