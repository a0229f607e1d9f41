"""Results of searches as they are kept: without where anything lay."""

import json
from contextlib import closing

import pytest
import torch

from benchmarks import record, searches
from jdkd.errors import InputError
from jdkd.search import Archive
from jdkd.search.archive import ARCHIVE
from tests.search.rows import known, timing

FOUND = {"map": 0.5, "latency_ratio": 0.8, "latency_ratio_interval": [0.7, 0.9], "params": 7, "train_steps": 30}


def result(seed=2, **student):
    part = {"image_folder": "/home/me/data/val", "annotations": "/home/me/data/val.json", "images": 3}
    return {
        "base": FOUND,
        "control": FOUND,
        "students": [FOUND | {"target": 0.8} | student],
        "seed": seed,
        "selection": dict(part),
        "report": dict(part),
        "command": "/usr/lib/jdkd/__main__.py search --base '/home/me/my runs/base' --steps 24",
    }


def test_what_is_kept_of_a_search_says_no_place_and_how_its_student_came_up(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(result(id="002")))
    with closing(Archive(tmp_path / ARCHIVE)) as archive:
        archive.add(timing(), **known(0, kind="base", map=0.6, lineage_steps=0))
        archive.add(timing(), **known(1, map=0.3, parent="000", lineage_steps=5))
        archive.add(timing(), **known(2, map=0.5, parent="001", lineage_steps=9))
    (kept,) = searches.collect([tmp_path])
    assert "/" not in json.dumps(kept)
    assert kept["report"] == {"image_folder": "val", "annotations": "val.json", "images": 3}
    assert kept["command"] == "__main__.py search --base base --steps 24"
    assert kept["lineages"] == {"0.8": [(0, 0.6), (5, 0.3), (9, 0.5)]}
    assert searches.learning({"mine": [result(), kept], "old": [result()]}).splitlines()[2:] == [
        "| mine | 0.8 | 2 | 0.600 | 5: 0.300, 9: 0.500 |"
    ]
    assert kept["candidates"] == 2
    row = searches.table([kept]).splitlines()[2]
    assert row == "| 0.8 | 2 | 0.500 | 0.500 | 0.500 | 0.800 (0.700–0.900) | 1.00× | 30 |"


def test_what_a_search_spent_is_without_its_control_and_all_else_is_what_is_left():
    seconds = {
        "everything else": 3.0,
        "proposing": 5.0,
        "pool": 20.0,
        "scoring": 1.0,
        "timing": 10.0,
        "candidates": 61.0,
    }
    cost = {
        "seconds": seconds | {"control": 50.0},
        "candidate_seconds": {"training": 57.0, "scoring": 2.0, "timing": 4.0},
    }
    counted = result() | {"candidates": 4, "cost": cost | {"pool_steps": 7, "candidate_steps": 9}}
    assert searches.spending({"mine": [result(), counted], "old": [result()]}).splitlines()[2:] == [
        "| mine | 2 | 4 | 16 | 100 | 77.0% | 3.0% | 10.0% | 10.0% | 2.5 s |"
    ]


def test_a_table_has_means_by_target_and_the_later_of_two_results_of_a_seed():
    rows = searches.table([result(0, map=0.1), result(0, map=0.4), result(1, map=0.6), result(1, target=0.5)])
    assert "| 0.8 | 0 | 0.500 | 0.500 | 0.400 |" in rows and "0.100" not in rows
    assert "mean" not in rows, "of one seed each there is no spread"
    assert "| 0.8 | mean ± sd | 0.500 ± 0.000 | 0.500 ± 0.000 | 0.500 ± 0.141 |" in searches.table(
        [result(0, map=0.4), result(1, map=0.6)]
    )


@pytest.mark.parametrize(
    ("interval", "said"), [([0.9, 0.96], "; base itself 0.900–0.960 |"), ([0.99, 1.02], " 0.800 (0.700–0.900) |")]
)
def test_a_clock_that_takes_the_base_for_another_is_told_beside_the_ratio(interval, said):
    assert said in searches.table([result(0) | {"aa": {"ratio": 0.95, "interval": interval}}])


def test_a_result_is_kept_under_the_threads_that_it_was_made_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    threads = torch.get_num_threads() + 1
    made = result(id="none") | {"device": {"device": "cpu", "threads": threads}}
    (tmp_path / "result.json").write_text(json.dumps(made))
    with closing(Archive(tmp_path / ARCHIVE)):
        searches.main(["demo", str(tmp_path)])
    (file,) = (tmp_path / "results").rglob("*.jsonl")
    assert file.parent.name.endswith(f"-{threads}-threads") and file.name == "demo.jsonl"
    assert "| 0.8 | 2 | 0.500 |" in capsys.readouterr().out


def test_other_names_and_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="'demos' is none of demo, digit_scenes, digit_scenes_128"):
        searches.main(["demos"])
    with pytest.raises(InputError, match=r"no result\.json"):
        searches.collect([tmp_path])
