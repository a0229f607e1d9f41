"""The parts of the page by themselves: the tree, the stages, what is seen on images, the charts."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from jdkd.data import write_digit_scenes
from jdkd.detect import load, read, save
from jdkd.detect.regions import region_attributes
from jdkd.distill.responses import responses
from jdkd.pool import Subnet
from jdkd.report.lineage import arranged
from jdkd.report.outcome import Outcome, signed
from jdkd.report.predictions import examples, predictions_section
from jdkd.report.search_page import page
from jdkd.report.stages import Layer, stages
from jdkd.report.svg import Axes, colour, spread, ticks
from jdkd.report.taught import taught_section
from jdkd.report.teachers import teachers_section
from jdkd.rewrite import Architecture, Rewrite
from tests.detectors import detector, small_spec
from tests.report.made_up import ARCHITECTURE, CUT, candidate, entry

DIGITS = tuple(str(digit) for digit in range(10))


def _family(*parents):
    """Candidates by the numbers of their parents; the first is the base."""
    return [candidate(number, parent) for number, parent in enumerate(parents)]


def test_a_line_of_descent_that_leads_to_a_student_runs_straight_and_the_others_branch_off_first():
    places = list(arranged(_family(None, 0, 0, 1, 3), {"000", "001", "003", "004"}))
    assert [(place.candidate.number, place.lane, place.parent) for place in places] == [
        *((0, 0, None), (2, 1, 0), (1, 0, 0), (3, 0, 0), (4, 0, 0))
    ]
    assert [place.through for place in places] == [frozenset(), frozenset({0}), *[frozenset()] * 3]
    assert [place.goes_on for place in places] == [True, False, True, True, False]


@pytest.mark.parametrize("seed", range(5))
def test_no_line_of_a_tree_runs_through_another(seed):
    rng = random.Random(seed)
    family = _family(None, *(rng.randrange(number) for number in range(1, 60)))
    places = list(arranged(family, {"000", "007"}))
    assert sorted(place.candidate.number for place in places) == [*range(60)]
    rows = {place.candidate.id: row for row, place in enumerate(places)}
    for row, place in enumerate(places):
        assert place.lane not in place.through
        if place.parent is not None:
            first = rows[place.candidate.parent]
            assert first < row and places[first].lane == place.parent
            held = {other.lane for other in places[first + 1 : row]}
            assert place.parent not in held  # nobody else stands where the line to the parent runs
            assert all(place.parent in other.through for other in places[first + 1 : row])


def test_a_chain_of_a_thousand_is_a_tree_too():
    assert [place.lane for place in arranged(_family(None, *range(1000)), set())] == [0] * 1001


def test_stages_stand_beside_each_other_with_what_was_cut_and_added():
    found = {stage.name: stage for stage in stages(ARCHITECTURE, CUT)}
    assert list(found) == ["stem", "stages.0", "stages.1", "head"]
    assert [found["stages.0"].blocks, found["stages.1"].blocks, found["stem"].blocks] == [(3, 2), (2, 3), None]
    first = found["stages.0"].layers
    assert first[:2] == (Layer("block 0.0", 32, 24), Layer("block 0.1", 32, 32))
    assert first[4:] == (Layer("block 2.0", 32, None), Layer("block 2.1", 32, None))
    added = [layer for layer in found["stages.1"].layers if layer.base is None]
    assert [layer.student for layer in added] == [32, 32] and len(found["stages.1"].layers) == 6
    assert found["head"].layers == (Layer("scores", 3, 3), Layer("boxes", 4, 4)) and not found["head"].changed
    assert sum(stage.params[0] for stage in found.values()) == sum(
        p.numel() for p in torch.nn.ModuleList([_built(ARCHITECTURE)]).parameters()
    )


def _built(architecture):
    from jdkd.rewrite import build

    return build(architecture, "meta")


def test_every_parameter_of_a_detector_is_in_one_stage():
    known = detector(small_spec()).architecture
    made = stages(known, known)
    assert sum(stage.params[0] for stage in made) == sum(p.numel() for p in _built(known).parameters())
    assert not any(stage.changed for stage in made) and sum(stage.blocks is not None for stage in made) >= 3


@pytest.mark.parametrize(("changed", "told"), [(None, "64 px, short side<br>50 regions"), (12, "50 → 12 regions")])
def test_the_input_and_the_regions_of_base_and_student_are_told(changed, told):
    from jdkd.report.architecture import architecture_section

    base = detector(small_spec())
    student = Rewrite(attributes=region_attributes(base, changed)).apply(base, read(base)) if changed else base
    child = replace(candidate(1, 0, architecture=student.architecture), latency_ratio=0.5)
    family = [candidate(0, architecture=base.architecture), child]
    assert told in architecture_section(Outcome(None, {}, family))


def test_an_architecture_that_cannot_be_built_is_said_and_the_page_goes_on():
    from jdkd.report.architecture import architecture_section

    gone = Architecture("nowhere.at_all:make")
    family = [candidate(0, architecture=gone), candidate(1, 0, architecture=gone)]
    told = architecture_section(Outcome(None, {}, family))
    assert "The architecture is not drawn" in told and "nowhere.at_all" in told


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """A folder of scenes, and a finished search whose base and student are detectors of their digits."""
    folder = tmp_path_factory.mktemp("seen")
    write_digit_scenes(folder / "data", train=1, val=4, size=64, seed=0)
    save(folder / "base", detector(small_spec(classes=DIGITS)))
    save(folder / "student", detector(small_spec(classes=DIGITS), seed=1))
    images = folder / "data/val2017"
    part = {"image_folder": str(images), "annotations": str(folder / "data/annotations/instances_val2017.json")}
    names = sorted(file.name for file in images.iterdir())
    result = {"report": part | {"examples": names[1:3]}, "students": [entry(0.1, 5.0, 0.5, 3, target=0.53)]}
    family = [candidate(0, architecture=detector(small_spec(classes=DIGITS)).architecture)]
    result["students"][0] |= {"target_met": True, "id": "000", "folder": "student"}
    return Outcome(folder, result, family, [], {"where": {"base": str(folder / "base")}})


def test_predictions_stand_beside_the_truth_with_each_picture_once(seen):
    text = predictions_section(seen)
    truth = json.loads((seen.folder / "data/annotations/instances_val2017.json").read_text())
    ids = {image["file_name"]: image["id"] for image in truth["images"]}
    counts = [
        sum(one["image_id"] == ids[name] for one in truth["annotations"]) for name in seen.result["report"]["examples"]
    ]
    assert text.count("data:image/jpeg;base64,") == 2 and text.count("<use ") == 4
    assert [int(n) for n in re.findall(r"truth: (\d+) boxes", text)] == counts
    assert text.count('class="box truth"') == sum(counts)
    for title in ("base", "student for 0.53"):
        assert [int(n) for n in re.findall(rf"{title}: \d+ of (\d+) found", text)] == counts
    drawn = len(re.findall(r'class="box (?:found|wrong)"', text))
    assert 0 < drawn <= 2 * sum(counts)


def test_a_detection_is_found_where_class_and_place_are_right_and_each_truth_once():
    from jdkd.report.predictions import _judged

    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [20, 20, 30, 30], [0, 0, 10, 9]])
    found = {"boxes": boxes, "labels": torch.tensor([1, 2, 2, 1]), "scores": torch.tensor([0.9, 0.8, 0.7, 0.6])}
    truth = {"boxes": torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 31]]), "labels": torch.tensor([1, 2])}
    judged = _judged(found, truth, ("a", "b"))
    assert [(box.kind, box.label) for box in judged] == [("found", "a 0.90"), ("wrong", "b 0.80")]
    several = {name: tensor[[0, 3, 2]] for name, tensor in found.items()}
    three = {"boxes": truth["boxes"][[0, 1, 1]], "labels": truth["labels"][[0, 1, 1]]}
    assert [box.kind for box in _judged(several, three, ("a", "b"))] == ["found", "found", "wrong"]


def test_images_that_are_gone_are_said(seen):
    moved = Outcome(seen.folder, json.loads(json.dumps(seen.result)), seen.candidates, [], seen.run)
    moved.result["report"]["annotations"] = "nowhere.json"
    assert "Not shown: " in predictions_section(moved) and "nowhere.json" in predictions_section(moved)
    del moved.result["report"]["examples"]
    assert predictions_section(moved) == ""


def _taught(seen, teacher, where=None):
    """The same search, in which someone taught the student's parent."""
    base, architecture = seen.candidates[0], seen.candidates[0].architecture
    family = [base, candidate(1, 0, architecture=architecture, teacher=teacher)]
    family.append(candidate(2, 1, architecture=architecture, teacher=None))
    student = seen.result["students"][0] | {"id": "002"}
    run = {"where": seen.run["where"] | (where or {})}
    told = seen.result["report"] | {"images": 4, "boxes": 9, "which": "all"}
    return Outcome(seen.folder, {"report": told, "students": [student]}, family, [], run)


def test_what_student_and_teacher_respond_to_stands_side_by_side(seen):
    text = taught_section(_taught(seen, "base"))
    assert "its last teacher (base) on the left and student for 0.53 on the right" in text and "over 2 images" in text
    assert re.findall(r"<h3>stride (\d+)</h3>", text) == ["4", "8", "16", "32"]
    assert text.count("<figcaption>channel ") == 4 * 8 and text.count("data:image/png;base64,") == 4
    images = [image.float() / 255 for image, _ in examples(seen.result["report"], seen.result["report"]["examples"])]
    expected = responses(load(seen.folder / "student"), load(seen.folder / "base"), images)
    for level in expected:
        assert " ".join(f"{r:.2f}" for r in level.r.tolist()) in text


def test_other_teachers_are_found_where_the_search_has_them(seen, monkeypatch):
    elsewhere = {"teachers": {"a": str(seen.folder / "base")}}
    assert "its last teacher (a)" in taught_section(_taught(seen, "a", elsewhere))
    opened = []

    def pool(folder, base, dataset):
        opened.append((folder, base, len(dataset)))
        return SimpleNamespace(teacher=lambda member: load(seen.folder / "base"))

    monkeypatch.setattr("jdkd.report.taught.load_pool", pool)
    assert "its last teacher (3x1)" in taught_section(_taught(seen, Subnet((3,), (1.0,))))
    taught_section(_taught(seen, Subnet((3,), (1.0,)), {"pool": "given"}))
    assert opened == [(seen.folder / "pool", None, 2), (Path("given"), None, 2)]
    (seen.folder / "pool").mkdir()
    taught_section(_taught(seen, Subnet((3,), (1.0,)), {"pool": "where the search lay when it grew the pool"}))
    (seen.folder / "pool").rmdir()
    assert opened[2:] == [(seen.folder / "pool", None, 2)]


def test_teachers_that_are_gone_are_said_and_without_one_there_is_no_section(seen):
    text = taught_section(_taught(seen, Subnet((3,), (1.0,))))
    assert text.startswith('<p class="faint">Not shown: ') and "holds no finished teacher pool" in text
    assert taught_section(seen) == taught_section(_taught(seen, None)) == ""
    assert 'id="responses"' in page(_taught(seen, "base")) and 'id="responses"' not in page(_taught(seen, None))


def test_teachers_are_told_with_whom_they_taught_and_whether_they_were_ahead():
    big = Subnet((3,), (1.0,))
    taught = ((0, 0.42, big), (1, 0.47, "a <foreign> one"), (2, 0.46, "base"))
    family = [candidate(0)]
    family += [candidate(k, parent, score, 0.9, teacher=by) for k, (parent, score, by) in enumerate(taught, start=1)]
    members = [{"subnet": big.to_json(), "map": 0.45, "parameters": 2_000_000}]
    members.append({"foreign": "a <foreign> one", "map": 0.5, "parameters": 9_000_000})
    text = teachers_section(Outcome(None, {}, family, members))
    rows = re.findall(r'<tr><td class="text">(.*?)</td>(.*?)</tr>', text)
    told = {name: re.findall(r">([^<]*)</td>", cells) for name, cells in rows}
    assert told["a &lt;foreign&gt; one"] == ["0.500", "9.00", "1", "+0.050", "2"]
    assert told[str(big)] == ["0.450", "2.00", "1", "+0.020", "1"]
    assert told["base"][:1] == ["0.400"] and told["base"][2:] == ["1", "−0.010", "3"]
    assert "1 of 3 candidates ended at or above their teacher" in text


@pytest.mark.parametrize("range_", [(0.0, 1.0), (0.5, 0.53), (-3.0, 4.0), (0.0, 1234.0), (1e-6, 2e-6)])
def test_ticks_are_few_round_numbers_inside_the_range(range_):
    found = ticks(*range_)
    assert 3 <= len(found) <= 8 and range_[0] <= found[0] and found[-1] <= range_[1]
    assert all(len(f"{value:g}") <= 8 for value in found)


def test_axes_put_the_range_on_the_frame():
    axes = Axes(spread([1.0, 2.0, float("nan")], 0.0), spread([5.0], 0.1), ("x", "y"))
    assert (axes.x(1.0), axes.x(2.0)) == (axes.left, axes.right)
    assert axes.top < axes.y(5.0) < axes.bottom and spread([]) == (0.0, 1.0)
    assert colour(-1) == colour(0) != colour(1) == colour(2)


def test_who_is_the_student_of_two_targets_is_shown_once(tmp_path):
    about = [{"target": target, "target_met": True, "id": "001", "folder": "x"} for target in (0.75, 0.53)]
    outcome = Outcome(tmp_path, {"students": about}, [candidate(0), candidate(1, 0, ratio=0.5)])
    assert outcome.chosen == {"001": "student for 0.75 and 0.53"} and outcome.targets == [0.75, 0.53]
    assert [[one.number for one in line] for line in outcome.lines] == [[0, 1]]


@pytest.mark.parametrize(("value", "told"), [(0.1, "+0.100"), (-0.1, "−0.100"), (-0.0004, "0.000"), (0.0, "0.000")])
def test_changes_have_a_sign_where_they_are_any(value, told):
    assert signed(value) == told
