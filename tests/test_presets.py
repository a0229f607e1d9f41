"""The published pairs: what they say, and that both sides of each can be built."""

import json
from pathlib import Path

import pytest
import torch

import jdkd.presets
from jdkd.detect import open_model
from jdkd.distill import DistillConfig
from jdkd.errors import InputError
from jdkd.presets import preset, preset_names
from jdkd.train import TrainConfig
from jdkd.train.schedule import named_schedule


def test_are_named_as_the_published_pairs():
    assert preset_names() == [
        "fasterrcnn_r101_fasterrcnn_r50",
        "fcos_x101_retinanet_r50",
        "gfl_r101_gfl_r50",
        "maskrcnn_swin_fcos_r50",
        "maskrcnn_swin_retinanet_r50",
        "reppoints_x101-dcn_reppoints_r50",
        "retinanet_x101_retinanet_r50",
    ]


@pytest.mark.parametrize("name", preset_names())
def test_every_pair_is_built_and_its_recipe_is_one(name):
    found = preset(name)
    steps = named_schedule(found.schedule, 118_287, found.batch_size, found.decay)
    recipe = {name: value for name, value in found.recipe.items() if name not in ("schedule", "decay")}
    assert TrainConfig(**recipe, **steps).steps == {"1x": 88_716, "2x": 177_431}[found.schedule]
    assert found.published.keys() == {"teacher", "student", "distilled"} and found.source and found.differs
    pair = []
    for source in (found.student, found.teacher):
        with torch.device("meta"):
            pair.append(open_model(source, classes=80, min_size=found.min_size, max_size=found.max_size))
    assert {parameter.device.type for model in pair for parameter in model.parameters()} == {"meta"}
    own = DistillConfig().weight(*pair)
    assert found.loss_weight == (6 if name == "gfl_r101_gfl_r50" else own), "auto is what was published"


def test_one_that_does_not_exist_is_told_the_others():
    with pytest.raises(InputError, match="preset 'yolo' is none of fasterrcnn_r101_fasterrcnn_r50, fcos_x101"):
        preset("yolo")


def test_published_figures_are_those_of_the_paper_and_its_code():
    figures = {name: preset(name).published for name in preset_names()}
    assert figures["maskrcnn_swin_retinanet_r50"] == {"teacher": 48.2, "student": 37.4, "distilled": 41.5}
    assert figures["maskrcnn_swin_fcos_r50"] == {"teacher": None, "student": 39.1, "distilled": 43.9}
    assert figures["gfl_r101_gfl_r50"]["distilled"] is None and "not known" in str(preset("gfl_r101_gfl_r50"))


def test_what_is_ours_in_their_recipes_is_said():
    ours = "norm of gradients, 10 (--clip), and that norms"
    assert TrainConfig(steps=1).clip == 10
    for each in map(preset, preset_names()):
        pair, differs = f"{each.teacher} {each.student}", " ".join(each.differs)
        assert ours in differs and each.recipe["gamma_l1"] == 0
        assert ("P6 of a published RetinaNet" in differs) == ("retinanet" in pair)
        assert ("published Swin has a norm" in differs) == ("swin" in pair)


def test_the_files_are_in_the_package():
    folder = Path(jdkd.presets.__file__).parent
    assert {file.stem for file in folder.glob("*.json")} == {*preset_names()}
    assert all(json.loads(file.read_text())["levels"] for file in folder.glob("*.json"))
