"""What a student would have with more training: the training asked for, and the row and table that come of it."""

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import ablations, gains, longer


def test_a_student_is_trained_on_from_its_end_for_as_long_as_its_lineage(tmp_path, monkeypatch):
    found = {"base": {"map": 0.7}, "control": {"map": 0.75}}
    (tmp_path / "search-3").mkdir()
    student = {"map": 0.6, "folder": "student", "train_steps": 40}
    (tmp_path / "search-3" / "result.json").write_text(json.dumps(found | {"students": [student]}))
    asked = []
    monkeypatch.setattr(longer.proof, "jdkd", lambda *words: asked.append(words))
    monkeypatch.setattr(longer.proof, "images", lambda recipe, folder, data, seed: folder / f"data-{seed}")
    monkeypatch.setattr(longer.gains, "reporting", lambda *where: where)
    monkeypatch.setattr(longer, "load", lambda folder, device: torch.nn.Identity())
    monkeypatch.setattr(longer, "evaluate", lambda model, images, **how: SimpleNamespace(map=0.72))
    row = longer.row("digit_scenes_deep", tmp_path, 3)
    several = longer.row("digit_scenes_deep", tmp_path, 3, (48, 64))
    (command, *words), (_, *at) = asked
    first = at.index("--train-sizes") + 1
    assert at[first : first + 2] == ["48", "64"] and at[at.index("--out") + 1] == tmp_path / "longer-48-64-3"
    given = dict(zip(words[0:-1:2], words[1::2], strict=True))
    assert command == "train" and words[-1] == "--resume" and given["--out"] == tmp_path / "longer-3"
    assert given["--model"] == tmp_path / "search-3" / "student" and given["--steps"] == 40 and given["--seed"] == 3
    assert longer.table([row | {"longer": 0.1}, row, several]).splitlines()[2:] == [
        "| digit_scenes_deep | 3 | 0.700 | 0.750 | 0.600 | 40 | 0.720 | 80 | its own |",
        "| digit_scenes_deep | 3 | 0.700 | 0.750 | 0.600 | 40 | 0.720 | 80 | 48 64 |",
    ]


@pytest.mark.parametrize("module", [longer, gains, ablations])
def test_searches_for_several_students_are_refused_before_anything_is_run(module, tmp_path, capsys):
    with pytest.raises(SystemExit):
        module.main(["blood_cells_deep_front", str(tmp_path)])
    assert "invalid choice: 'blood_cells_deep_front'" in capsys.readouterr().err and not [*tmp_path.iterdir()]
