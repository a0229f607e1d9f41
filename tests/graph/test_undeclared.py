"""A detector that nobody declared, as people bring one: it learns, is read, cut, saved and loaded like any other."""

import pytest
import torch

from jdkd.detect import read
from jdkd.detect.contract import detections
from jdkd.rewrite import Architecture, Rewrite, build, load_architecture, save_architecture
from jdkd.train import TrainConfig, evaluate, fit
from tests.graph.networks import awake, pan_detector
from tests.train.scenes import write_scenes

BUILDER = "tests.graph.networks:pan_detector"
IMAGES = [torch.rand(3, *size, generator=torch.Generator().manual_seed(7)) for size in ((40, 56), (64, 33))]


def test_it_learns_to_find_things(tmp_path):
    scenes = write_scenes(tmp_path)
    torch.manual_seed(0)
    model = pan_detector(len(scenes.classes))
    fit(model, scenes, TrainConfig(steps=40, batch_size=6, lr=5e-3), device="cpu")
    assert evaluate(model, scenes, device="cpu").map50 > 0.3


def test_it_takes_images_of_any_sizes_and_returns_boxes_inside_of_them():
    model = awake(pan_detector())
    with torch.no_grad():
        found = detections(model, IMAGES)
    for image, each in zip(IMAGES, found, strict=True):
        height, width = image.shape[1:]
        assert len(each["boxes"]) and set(each["labels"].tolist()) <= {1, 2, 3}
        assert each["boxes"].min() >= 0 and (each["boxes"].amax(0)[2:] <= torch.tensor([width, height])).all()
        assert (each["scores"].diff() <= 0).all()


@pytest.mark.parametrize("counts", [(0, 0), (0, 2), (3, 1)])
def test_it_learns_from_images_with_and_without_objects(counts):
    boxes = torch.tensor([[3.0, 3, 12, 14], [5, 2, 30, 36], [1, 1, 3, 3]])
    targets = [{"boxes": boxes[:n], "labels": torch.tensor([1, 2, 3])[:n]} for n in counts]
    losses = pan_detector().train()(IMAGES, targets)
    assert all(map(torch.isfinite, losses.values())) and (losses["bbox_regression"] > 0) == (sum(counts) > 0)


@torch.no_grad()
def test_it_is_cut_by_its_topology_saved_and_loaded(tmp_path):
    architecture = Architecture(BUILDER, {"classes": 3, "width": 16})
    model = awake(build(architecture))
    model.architecture = architecture
    topology = read(model, check=True)
    assert [len(level) for level in topology.followed] == [20, 20, 20]
    assert {name for level in topology.followed for name, _ in level} == {"neck.top_down.1.0"}  # read by one tower
    assert [len(blocks.blocks) for blocks in topology.block_lists] == [2, 2, 2]
    keep = {group.name: range(max(1, round(0.7 * group.units))) for group in topology.groups}
    cut = Rewrite(keep=keep, blocks={topology.block_lists[0].name: [1]}).apply(model, topology).eval()
    save_architecture(tmp_path / "pan", cut, cut.architecture)
    loaded = load_architecture(tmp_path / "pan")
    for ours, theirs in zip(cut(IMAGES), loaded(IMAGES), strict=True):
        assert len(ours["boxes"]) and all(torch.equal(ours[key], theirs[key]) for key in ours)
