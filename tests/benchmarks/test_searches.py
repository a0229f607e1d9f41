"""Results of searches as they are kept: without where anything lay."""

import json

import pytest

from benchmarks import searches
from jdkd.errors import InputError

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


def test_what_is_kept_of_a_search_says_no_place(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(result()))
    (kept,) = searches.collect([tmp_path])
    assert "/" not in json.dumps(kept)
    assert kept["report"] == {"image_folder": "val", "annotations": "val.json", "images": 3}
    assert kept["command"] == "__main__.py search --base base --steps 24"
    row = searches.table([kept]).splitlines()[2]
    assert row == "| 0.8 | 2 | 0.500 | 0.500 | 0.500 | 0.800 (0.700–0.900) | 1.00× | 30 |"


def test_a_table_has_means_by_target_and_the_later_of_two_results_of_a_seed():
    rows = searches.table([result(0, map=0.1), result(0, map=0.4), result(1, map=0.6), result(1, target=0.5)])
    assert "| 0.8 | 0 | 0.500 | 0.500 | 0.400 |" in rows and "0.100" not in rows
    assert "mean" not in rows, "of one seed each there is no spread"
    assert "| 0.8 | mean ± sd | 0.500 ± 0.000 | 0.500 ± 0.000 | 0.500 ± 0.141 |" in searches.table(
        [result(0, map=0.4), result(1, map=0.6)]
    )


def test_other_names_and_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="'demos' is none of demo, digit_scenes, digit_scenes_128"):
        searches.main(["demos"])
    with pytest.raises(InputError, match=r"no result\.json"):
        searches.collect([tmp_path])
