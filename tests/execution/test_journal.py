"""An outcome that was there once is never computed again."""

import math

import pytest

from jdkd.errors import InputError
from jdkd.execution import Journal


class Counting:
    def __init__(self):
        self.asked = []

    def run(self, jobs):
        for job in reversed(jobs):
            self.asked.append(job["number"])
            yield job, {"map": math.nan if job["number"] == 2 else 0.5}

    def close(self): ...


JOBS = [{"number": number} for number in (1, 2, 3)]


def test_a_killed_driver_repeats_only_what_had_no_outcome(tmp_path):
    first, again = Counting(), Counting()
    running = Journal(first, tmp_path / "outcomes").run(JOBS)
    next(running), next(running)  # and here it is killed
    done = list(Journal(again, tmp_path / "outcomes").run(JOBS))
    assert (first.asked, again.asked) == ([3, 2], [1])
    assert sorted(job["number"] for job, _ in done) == [1, 2, 3]
    assert math.isnan(next(outcome["map"] for job, outcome in done if job["number"] == 2))


def test_a_job_with_tuples_is_known_again_though_json_has_none(tmp_path):
    job = {"number": 7, "teacher": {"subnet": {"depths": (2, 4), "widths": (1.0, 0.5)}}}
    list(Journal(Counting(), tmp_path / "outcomes").run([job]))
    again = Counting()
    for same in (job, dict(reversed(job.items()))):
        assert list(Journal(again, tmp_path / "outcomes").run([same])) == [(job, {"map": 0.5})] and not again.asked


def test_another_job_with_the_same_number_is_done(tmp_path):
    list(Journal(Counting(), tmp_path / "outcomes").run(JOBS))
    again = Counting()
    list(Journal(again, tmp_path / "outcomes").run([{"number": 1, "seed": 7}, JOBS[1]]))
    assert again.asked == [1]


def test_what_is_cleared_is_done_again(tmp_path):
    counting = Counting()
    journal = Journal(counting, tmp_path / "outcomes")
    for _ in range(2):
        list(journal.run(JOBS))
        journal.clear()
    assert len(counting.asked) == 6 and not (tmp_path / "outcomes").exists()


@pytest.mark.parametrize("damage", ["{", "[]", '{"job": {"number": 1}}', '{"job": {"number": 9}, "outcome": {}}'])
def test_an_outcome_that_is_damaged_is_named(tmp_path, damage):
    journal = Journal(Counting(), tmp_path / "outcomes")
    list(journal.run(JOBS[:1]))
    (file,) = (tmp_path / "outcomes").iterdir()
    file.write_text(damage)
    with pytest.raises(InputError, match=rf"{file.name} is not .*remove it and resume"):
        list(journal.run(JOBS[:1]))
