import io

import pytest
from rich.console import Console

from jdkd.cli.live import SearchProgress
from tests.report.made_up import make_search


@pytest.fixture
def on(monkeypatch, tmp_path):
    """The display of a made-up search on a terminal or on a file, what it has shown, and its clock."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def make(terminal, **how):
        shown = io.StringIO()
        console = Console(file=shown, force_terminal=terminal, width=110, height=40)
        monkeypatch.setattr("rich.console.Console", lambda **options: console)
        return SearchProgress(tmp_path / "search", (0.75, 0.53), **how), shown, now

    return make


def _seen(progress):
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(progress.view())
    return console.export_text()


def test_a_terminal_sees_the_best_per_target_the_budget_and_what_is_trained(on, tmp_path):
    make_search(tmp_path / "search", finished=False)
    progress, shown, now = on(True)
    with progress:
        progress("budget", 1000, 5000, {"generations": 9})
        now[0] += 100
        progress("candidate 24: cut 3 of [the neck]", 30, 100, {"loss": 0.5})
        progress("candidate 25: teacher changed", 970, 1000, {"loss": 0.25})
        text = _seen(progress)
    assert "generation 7 of 9 · 23 candidates, 3 failed · 2,000 of 5,000 steps · about 5 min left" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["base", "0.380", "1", "0"] in rows
    assert any(row[:2] == ["0.75", "0.401"] for row in rows) and ["0.53", "–", "none", "so", "far"] in rows
    assert "candidate 24: cut 3 of [the neck]" in text and "30/100" in text and "loss 0.25" in text
    assert "candidate 25" in shown.getvalue()


def test_steps_that_are_archived_are_not_counted_twice(on, tmp_path):
    make_search(tmp_path / "search", finished=False)
    progress, _, _ = on(True)
    progress("budget", 0, 5000)
    progress("pool: largest", 300, 300)
    progress("pool: scoring", 7, 7)
    assert " 300 of 5,000 steps" in progress.state()
    progress("budget", 300, 5000)
    assert " 300 of 5,000 steps" in progress.state() and "left" in progress.state()


def test_what_a_resumed_search_took_before_says_nothing_of_the_time_left(on):
    progress, _, now = on(True)
    progress("budget", 4000, 5000)
    now[0] += 60
    progress("candidate 9: a", 500, 1000)
    assert progress.state() == "4,500 of 5,000 steps · about 60 s left"


def test_a_file_gets_lines(on, tmp_path):
    make_search(tmp_path / "search", finished=False)
    progress, shown, _ = on(False)
    with progress:
        progress("budget", 1000, 5000)
        progress("candidate 24: cut", 100, 100, {"loss": 0.5})
    assert shown.getvalue().splitlines() == [
        "generation 6 · 23 candidates, 3 failed · 1,000 of 5,000 steps",
        "candidate 24: cut  100/100  loss 0.5",
    ]


def test_mirrors_are_refreshed_with_every_generation_and_now_and_then(on):
    called = []
    progress, _, now = on(False, refresh=lambda: called.append(now[0]))
    for step in range(1, 101):
        now[0] += 1
        progress("candidate 1: a", step, 100)
    progress("budget", 100, 200)
    assert called == [130.0, 160.0, 190.0, 200.0]


def test_a_search_whose_generations_are_over_has_no_steps_left_to_wait_for(on, tmp_path):
    make_search(tmp_path / "search", finished=False)
    progress, _, _ = on(True)
    progress("budget", 0, 100)
    progress("budget", 97, 100, {"generations": 6})
    assert progress.state().endswith("97 of 100 steps · the result is being made")
