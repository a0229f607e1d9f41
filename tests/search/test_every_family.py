"""A search of one candidate from a detector of each family that the other tests do not begin from."""

import pytest

from jdkd.detect import save
from jdkd.errors import InputError
from jdkd.rewrite import Architecture, build
from jdkd.search import Method, search
from tests.search.small_search import DIGITS, archived, base_of, config_of

FAMILIES = {
    "fasterrcnn_v2": ("two_stages", {"family": "fasterrcnn_v2"}),
    "maskrcnn_v2": ("two_stages", {"family": "maskrcnn_v2"}),
    "retinanet_v2": ("retinanet_v2", {}),
    "ssd": ("ssd", {}),
    "ssdlite": ("ssd", {"lite": True}),
    "atss": ("of_every_place", {"family": "atss"}),
    "gfl": ("of_every_place", {"family": "gfl"}),
    "reppoints": ("of_every_place", {"family": "reppoints"}),
}
QUICK = ("ssd",)  # in every run of the tests; the others where slow ones are asked for
REFUSED = {"keypointrcnn": "a KeypointRCNN trains on keypoints, and those of annotations are not read"}


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in FAMILIES])
def family(request):
    """A family."""
    if request.param not in QUICK:
        request.getfixturevalue("when_asked")
    return request.param


@pytest.mark.filterwarnings("ignore:.*hold no box of:jdkd.notices.Notice")  # a handful of scenes, 10 digits
def test_a_student_of_any_family_is_proposed_trained_scored_and_timed(family, folder, steady, tmp_path):
    builder, arguments = FAMILIES[family]
    config = base_of(f"tests.search.nets:{builder}", arguments, Method(teaching="none"), folder, tmp_path, steps=10)
    (student,) = search(config)["students"]
    assert [kind for (kind,) in archived(config.out, "kind")][:2] == ["base", "morph"]
    assert student["latency_ratio"] < 1 and student["train_steps"] > 0 and student["map"] >= 0
    assert (config.out / student["folder"] / "weights.safetensors").is_file()


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_searched_is_refused_before_anything_is_written(family, folder, tmp_path):
    architecture = Architecture("tests.search.nets:two_stages", {"family": "keypointrcnn"}, classes=DIGITS)
    base = build(architecture)
    base.architecture = architecture
    save(tmp_path / "base", base)
    with pytest.raises(InputError, match=REFUSED[family]):
        search(config_of(folder, tmp_path / "out", base=tmp_path / "base"))
    assert not (tmp_path / "out").exists()
