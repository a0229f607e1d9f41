"""The largest pool that is meant to train: R101-FPN for 80 classes on images of 800 x 1333."""

import pytest
import torch

from jdkd.data import CocoDetectionDataset
from jdkd.detect import detector, parameter_count
from jdkd.pool import Phase, PoolTrainConfig, load_pool, train_pool
from jdkd.train import TrainConfig
from tests.coco_shapes import coco_shapes

PHASES = (Phase("largest", 1 / 3, 0.0, 0, 1.0), Phase("full", 2 / 3, 1.0, 0, 0.5, sandwich=True))


@pytest.mark.slow
@pytest.mark.usefixtures("when_asked")  # three minutes of a free core, and 8 GiB
def test_a_pool_of_r101_takes_a_step_at_the_shapes_of_coco_is_interrupted_and_resumes(tmp_path, monkeypatch):
    coco = CocoDetectionDataset(coco_shapes(tmp_path / "data", "train"))
    monkeypatch.setattr("jdkd.pool.shrinking.CALIBRATION_BATCHES", 1)
    torch.manual_seed(0)
    base = detector("fasterrcnn", "resnet101", coco.classes)
    config = PoolTrainConfig(TrainConfig(steps=3, batch_size=1, lr=1e-6), PHASES)
    told = []

    def stop(what, done, total, values):
        told.append((what, done))
        if what == "pool: largest" and told.count((what, done)) == 1:
            raise KeyboardInterrupt

    how = {"scored": 1, "progress": stop}
    with pytest.raises(KeyboardInterrupt):
        train_pool(base, coco, coco, config, tmp_path / "pool", **how)
    assert (tmp_path / "pool" / "training" / "1-largest" / "checkpoint.pt").is_file()
    pool = train_pool(base, coco, coco, config, tmp_path / "pool", resume=True, **how)
    assert told == [("pool: largest", 1), ("pool: full", 1), ("pool: scoring", 1)]
    assert pool.members[0].parameters > 1.5 * parameter_count(base) and pool.steps == 3
    again = load_pool(tmp_path / "pool", base, coco)
    assert again.members == pool.members and again.space == pool.space
