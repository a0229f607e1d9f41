"""The pair of detectors that the tests of distillation share."""

import pytest
import torch
from torch import Tensor, nn

from tests.detectors import detector, small_spec
from tests.train.scenes import write_scenes


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture
def student() -> nn.Module:
    return detector(small_spec()).train()


@pytest.fixture
def teacher() -> nn.Module:
    """Wider and deeper than the student, with the same pyramid."""
    return detector(small_spec("bottleneck"), seed=7)


@pytest.fixture
def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, 64, 80, generator=generator), torch.rand(3, 72, 64, generator=generator)]


@pytest.fixture
def targets() -> list[dict[str, Tensor]]:
    boxes = torch.tensor([[4.0, 4.0, 40.0, 44.0], [20.0, 10.0, 60.0, 50.0]])
    return [
        {"boxes": boxes, "labels": torch.tensor([1, 3])},
        {"boxes": boxes[:1], "labels": torch.tensor([2])},
    ]
