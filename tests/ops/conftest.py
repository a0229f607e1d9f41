"""What the tests of several operators share."""

from collections.abc import Iterator

import pytest
import torch

from tests.once import shared_folder
from tests.ops.emulated import Emulation, compiled


@pytest.fixture
def exact_products() -> Iterator[None]:
    """Keeps TF32 out of convolutions, so that the 2x rule is about the kernels."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


@pytest.fixture(scope="session")
def _emulated_operators(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    return compiled(shared_folder(tmp_path_factory), "jdkd_emulated")


@pytest.fixture
def emulation(_emulated_operators: Emulation) -> Emulation:
    """The CUDA operators on the host, their threads in an order that is the same in every run."""
    _emulated_operators.reorder(0)
    return _emulated_operators
