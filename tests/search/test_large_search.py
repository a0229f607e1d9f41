"""The largest search that is meant to run: from R101-FPN for 80 classes, on images of 800 x 1333."""

import pytest
import torch

from jdkd.data import CocoDetectionDataset
from jdkd.detect import detector, load, save
from jdkd.detect.regions import region_count
from jdkd.run_folder import RunFolder
from jdkd.search import Method, SearchConfig, search
from tests.coco_shapes import coco_shapes
from tests.search.small_search import archived


@pytest.mark.slow
@pytest.mark.usefixtures("when_asked", "steady")  # many minutes of a free core; its latencies are made up
@pytest.mark.filterwarnings("ignore::jdkd.notices.Notice")  # one image lacks most of the classes
def test_a_search_from_r101_takes_its_steps_at_the_shapes_of_coco_is_interrupted_and_resumes(tmp_path):
    train = coco_shapes(tmp_path / "data", "train")
    torch.manual_seed(0)
    dataset = CocoDetectionDataset(train)
    RunFolder(tmp_path / "base").begin("train", {"data": {"train": dataset.fingerprint}})
    save(tmp_path / "base", detector("fasterrcnn", "resnet101", dataset.classes))
    asked = {"targets": (0.8,), "steps": 9, "candidates": 1, "proposals": 1, "batch_size": 1, "lr": 1e-6}
    least = {"latency_rounds": 1, "latency_seconds": 0.0, "control": False, "method": Method(teaching="base")}
    parts = {"val": coco_shapes(tmp_path / "data", "val"), "selection": coco_shapes(tmp_path / "data", "selection")}
    config = {"base": tmp_path / "base", "train": train, "out": tmp_path / "out", **parts, **asked, **least}

    def stop(what, *state):
        if what.startswith("candidate 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(SearchConfig(**config), stop)
    before = archived(tmp_path / "out")
    assert len(before) == 2
    result = search(SearchConfig(**config, resume=True))
    assert archived(tmp_path / "out")[:2] == before and result["cost"]["candidate_steps"] == 9
    student = load(tmp_path / "out" / "student", "cpu")  # of a base that finds nothing, in fewer regions no less
    assert region_count(student) < region_count(load(tmp_path / "base", "cpu"))
