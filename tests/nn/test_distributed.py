"""Supernets under DistributedDataParallel."""

import pytest
import torch

from tests.nn.two_processes import work
from tests.ranks import found_by_ranks


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed")
def test_two_processes_make_the_gradients_of_one_and_share_own_statistics():
    for found in found_by_ranks(work):
        assert found.pop("main_grad, left alone") == found.pop("copied")
        assert len(found) == 5 and not any(found.values()), found
