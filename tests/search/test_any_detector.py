"""A search from detectors that the package has no code for: torchvision's families over a body of ours, and a PAN."""

from dataclasses import replace

import pytest
import torch

from jdkd.rewrite import load_architecture
from jdkd.search import Method, plan, search
from tests.detectors import hide_own_detectors
from tests.search.small_search import archived, base_of

FAMILIES = {  # with what of the method is not the default
    "RetinaNet": ("tests.search.nets:retinanet", {}, Method()),
    "FCOS": ("tests.search.nets:fcos", {}, Method(teaching="base", imitation="mse", criterion="gamma")),
    "Mask R-CNN": (
        "tests.search.nets:two_stages",
        {"family": "maskrcnn"},
        Method(order="pipelined", teaching="base", criterion="magnitude"),
    ),
    "PAN": ("tests.graph.networks:pan_detector", {"classes": 10}, Method(inherit=False, teaching="none")),
}
ASKED = ("FCOS",)  # which is like RetinaNet, only where slow tests are asked for
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*hold no box of:jdkd.notices.Notice"),  # a handful of scenes, 10 digits
    pytest.mark.filterwarnings("ignore:.*learn from features alone:jdkd.notices.Notice"),
    pytest.mark.filterwarnings("ignore:all teachers of the pool have one width:jdkd.notices.Notice"),
]


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * (name in ASKED)) for name in FAMILIES])
def family(request):
    """A family."""
    if request.param in ASKED:
        request.getfixturevalue("when_asked")
    return request.param


def test_a_search_runs_from_any_detector_and_goes_on_after_an_interruption(
    family, folder, steady, tmp_path, monkeypatch
):
    builder, arguments, method = FAMILIES[family]
    config = base_of(builder, arguments, method, folder, tmp_path)
    pooled = method.teaching == "dynamic"
    for moment in ["pool: scoring"] * pooled + ["candidate 2"]:

        def stop(what, *state, moment=moment):
            if what.startswith(moment):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            search(replace(config, resume=True), stop)
    before, told = archived(config.out), []
    assert (config.out / "pool" / "pool.json").exists() is pooled
    result = search(replace(config, resume=True), lambda what, *_: told.append(what))
    assert not any(what.startswith(("pool: ", "candidate 1:")) for what in told), "nothing finished is redone"
    rows = archived(config.out)
    assert rows[: len(before)] == before
    made = archived(config.out, "generation, teacher")
    rungs = plan(config, 24).rungs
    assert [of for of, _ in made].count(0) == 1 and max(of for of, _ in made) == len(rungs)
    for generation, rung in enumerate(rungs, start=1):
        teachers = [teacher for of, teacher in made if of == generation]
        assert len(teachers) == rung.candidates
    (student,) = result["students"]
    assert student["params"] > 0 and student["train_steps"] > 0 and student["latency_ratio"] < 1
    assert {row[4] for row in rows} <= {"base", "morph", "teacher", "train"} and result["method"] == vars(method)
    hide_own_detectors(monkeypatch)
    (found,) = load_architecture(config.out / "student")([torch.rand(3, 64, 64)])
    assert found["boxes"].shape[1:] == (4,)
