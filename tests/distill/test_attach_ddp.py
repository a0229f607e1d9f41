"""attach() under DistributedDataParallel, in two real processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed")
def test_distributed_training_needs_no_unused_parameters_and_has_the_teacher_in_no_bucket():
    command = [sys.executable, "-m", "tests.distill.attach_ddp"]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
    assert answer.returncode == 0, answer.stderr
    ranks = json.loads(answer.stdout.splitlines()[-1])
    assert len(ranks) == 2
    for when in ("before", "after", "adapters"):
        first, second = (found[when] for found in ranks)
        assert first["terms"] != second["terms"], "each rank has its own images"
        for found in (first, second):
            assert found["levels"] == [4, 8, 16, 32] and min(found["terms"]) > 0
            assert found["weights agree"] and not found["teacher has gradients"]
            assert found["bytes in buckets"] == found["bytes of the student"]
            assert found["adapters changed"] or when != "adapters"
