"""A detector that is small enough to be accelerated in every test, and what it looks at."""

import pytest
import torch
from torch import Tensor, nn

from tests.latency.conftest import detector


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    return [torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(0))]


@pytest.fixture
def model() -> nn.Module:
    return detector()
