"""A search on a GPU is the search on the CPU, with everything where it has to be."""

import pytest

from jdkd.search import search
from tests.conftest import HAS_GPU
from tests.emulated_device import emulated_gpu
from tests.search.small_search import archived, config_of

pytestmark = pytest.mark.filterwarnings("ignore:.*hold no box of:jdkd.notices.Notice")


@pytest.mark.skipif(HAS_GPU, reason="a GPU is here, and computes in its own order")
def test_the_same_is_decided_with_a_pool_teachers_and_a_control(folder, finished, steady, tmp_path):
    with emulated_gpu():
        search(config_of(folder, tmp_path / "out", device="cuda", amp="off"))
    assert archived(tmp_path / "out") == archived(finished[0])
