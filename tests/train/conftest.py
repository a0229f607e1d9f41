"""The scenes that the tests of training share."""

import pytest
import torch

from jdkd.data.coco import CocoDetectionDataset
from tests.detectors import detector, small_spec
from tests.train.scenes import write_scenes


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> CocoDetectionDataset:
    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture
def model() -> torch.nn.Module:
    return detector(small_spec())
