"""What a search says that it spent its time on."""

import time

import pytest

from jdkd.search.spending import Spending


def test_what_is_done_inside_counts_once(monkeypatch):
    clock = iter([0.0, 0.0, 2.0, 7.0, 8.0, 20.0, 21.0])  # begun; scoring, timing, back, back; scoring again, back
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    spent = Spending()
    spent.seconds |= {"scoring": 100.0}  # of the run that this one resumes
    with spent.on("scoring"):
        with spent.on("timing"):
            pass
    with spent.on("scoring"):
        pass
    assert spent.seconds == {"scoring": 104.0, "timing": 5.0}


def test_what_fails_counts_all_the_same():
    spent = Spending()
    with pytest.raises(KeyError), spent.on("scoring"):
        raise KeyError
    with spent.on("timing"):
        time.sleep(0.01)
    assert spent.seconds["timing"] > 0.009 and spent.seconds["scoring"] < 0.01
