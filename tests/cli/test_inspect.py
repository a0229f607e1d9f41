import json

import pytest


def test_inspects_a_detector_of_torchvision(jdkd, tmp_path):
    answer = jdkd("inspect", "ssdlite320_mobilenet_v3_large", "--json", tmp_path / "topology.json")
    assert answer.code == 0, answer.err
    assert "can be cut" in answer.out and "operators without a rule: none" in answer.out
    assert "…" not in answer.out, "names are whole"
    content = json.loads((tmp_path / "topology.json").read_text())
    assert content["prunable_share"] > 0.95 and not any("disagree" in each["reason"] for each in content["frozen"])


def test_inspects_a_checkpoint_and_a_function_of_ones_own(jdkd, trained, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def net():\n    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))\n"
        "number = 3\n"
        "def text():\n    return 'no model'\n"
        "def flat():\n    return nn.Linear(7, 3)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert "backbone.body.layer1" in jdkd("inspect", trained, "--height", 64, "--width", 64).out
    for name, words in {
        "mine:number": "is a int",
        "mine:text": "returned a str",
        "mine:nothing": "has no attribute 'nothing'",
        "yours:net": "names the module yours",
        "mine:flat": "runs neither on a list of one image",
        "yolo": "none of torchvision's detectors",
    }.items():
        answer = jdkd("inspect", name)
        assert answer.code == 2 and words in answer.err and "Traceback" not in answer.err, answer.err


@pytest.mark.parametrize(("flag", "value"), [("--height", 0), ("--json", "/proc/none/x.json")])
def test_bad_flags_of_inspect(jdkd, trained, flag, value):
    answer = jdkd("inspect", trained, flag, value)
    assert answer.code == 2 and flag in answer.err


def test_a_detector_sees_the_example_at_its_own_size(jdkd, trained, monkeypatch):
    seen = []

    def look(model, example):
        seen.append((model.transform.min_size, model.transform.max_size))
        raise KeyboardInterrupt

    monkeypatch.setattr("jdkd.graph.trace", look)

    assert jdkd("inspect", trained, "--height", 48, "--width", 96).code == 2
    assert seen == [((48,), 96)]
