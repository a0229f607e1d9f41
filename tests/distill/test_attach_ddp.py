"""attach() under DistributedDataParallel, in two real processes."""

import pytest
import torch

from tests.distill.attach_ddp import work
from tests.ranks import found_by_ranks


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed")
def test_distributed_training_needs_no_unused_parameters_and_has_the_teacher_in_no_bucket():
    ranks = found_by_ranks(work)
    for when in ("before", "after", "adapters"):
        first, second = (found[when] for found in ranks)
        assert first["terms"] != second["terms"], "each rank has its own images"
        for found in (first, second):
            assert found["levels"] == [4, 8, 16, 32] and min(found["terms"]) > 0
            assert found["weights agree"] and not found["teacher has gradients"]
            assert found["bytes in buckets"] == found["bytes of the student"]
            assert found["adapters changed"] or when != "adapters"
