"""Whatever is killed, and whenever: nothing finished is lost, nothing finished is done again, the end is the same."""

import os
import sys

import pytest
import torch

from jdkd.detect import save
from tests.detectors import detector, small_spec
from tests.execution.killing import killed_until_through
from tests.execution.small_driver import archived, drive, outcomes_of
from tests.train.scenes import write_scenes

KILLS = int(os.environ.get("JDKD_TEST_KILLS", "2"))


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Data and base, and what an undisturbed run in this process comes to."""
    folder = tmp_path_factory.mktemp("kills")
    write_scenes(folder / "data")
    save(folder / "base", detector(small_spec()))
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as a worker has
    rows = drive(folder / "out", folder / "data", folder / "base", lambda *state: None)
    torch.set_num_threads(before)
    return folder / "data", folder / "base", rows


def test_kills_at_random_moments_change_nothing(given, tmp_path):
    data, base, expected = given
    out = tmp_path / "out"
    command = [sys.executable, "-m", "tests.execution.small_driver", *map(str, (out, data, base))]
    victims = [("worker", "driver")[kill % 2] for kill in range(KILLS)]
    told = killed_until_through(command, victims, lambda: outcomes_of(out))
    assert told.killed, "somebody was"
    assert archived(out) == expected
    for before, lines in zip(told.before, told.lines, strict=True):
        assert not any(line.startswith(f"candidate {number}:") for number in before for line in lines)
