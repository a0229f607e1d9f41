"""Supernets under DistributedDataParallel."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed")
def test_two_processes_make_the_gradients_of_one_and_share_own_statistics():
    command = [sys.executable, "-m", "tests.nn.two_processes"]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
    assert answer.returncode == 0, answer.stderr
    ranks = json.loads(answer.stdout.splitlines()[-1])
    assert len(ranks) == 2
    for found in ranks:
        assert found.pop("main_grad, left alone") == found.pop("copied")
        assert len(found) == 5 and not any(found.values()), found
