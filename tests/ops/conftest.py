"""What the tests of several operators share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def exact_products() -> Iterator[None]:
    """Keeps TF32 out of convolutions, so that the 2x rule is about the kernels."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed
