"""Results of searches as they are kept: without where anything lay."""

import json

import pytest

from benchmarks import demo
from jdkd.errors import InputError

FOUND = {"map": 0.5, "latency_ratio": 0.8, "latency_ratio_interval": [0.7, 0.9], "params": 7}


def test_what_is_kept_of_a_search_says_no_place(tmp_path):
    part = {"image_folder": "/home/me/data/val", "annotations": "/home/me/data/val.json", "images": 3}
    result = dict.fromkeys(demo.NETWORKS, FOUND) | {
        "seed": 2,
        "selection": part,
        "report": part,
        "command": "/usr/lib/jdkd/__main__.py search --base '/home/me/my runs/base' --steps 24",
    }
    (tmp_path / "result.json").write_text(json.dumps(result))
    (kept,) = demo.collect([tmp_path])
    assert "/" not in json.dumps(kept)
    assert kept["report"] == {"image_folder": "val", "annotations": "val.json", "images": 3}
    assert kept["command"] == "__main__.py search --base base --steps 24"
    assert demo.table([kept]).splitlines()[2] == "| 2 | 0.500 | 0.500 | 0.500 | 0.500 | 0.800 (0.700–0.900) | 1.00× |"


def test_other_names_and_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="'demos' is none of demo, blood_cells"):
        demo.main(["demos"])
    with pytest.raises(InputError, match=r"no result\.json"):
        demo.collect([tmp_path])
