"""Whether published pairs learn: what is read off their logs, what the table says of them, and the trainings."""

import pytest
import torch

from benchmarks import presets
from jdkd.detect import save
from jdkd.presets import preset_names
from tests.detectors import detector, small_spec


def line(step, box, pkd, norm=1.0):
    return {"step": step, "grad_norm": norm, "losses": {"box": box, "class": 1.0, "loss_pkd": pkd}}


LOG = [line(step, 2.0 - step / 100, 20.0 - step / 10) for step in (1, 10, 20, 30, 90, 95, 100)]


def test_a_loss_is_the_mean_of_three_lines():
    found = presets.ends(LOG)
    assert found["steps"] == 100
    assert found["losses"] == pytest.approx([3 - 31 / 300, 2.05], abs=1e-4)
    assert found["pkd"] == pytest.approx([20 - 31 / 30, 10.5], abs=1e-4)


def test_what_was_logged_and_what_was_saved_must_be_finite(tmp_path):
    model = detector(small_spec())
    save(tmp_path / "good", model)
    assert presets.finite(tmp_path / "good", LOG)
    assert not presets.finite(tmp_path / "good", [*LOG, line(110, 1.0, 1.0, norm=None)])  # as JSON has an infinity
    assert not presets.finite(tmp_path / "good", [*LOG, line(110, float("nan"), 1.0)])
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.bias[0] = float("nan")
    save(tmp_path / "bad", model)
    assert not presets.finite(tmp_path / "bad", LOG)


def row(name, amp, **changes):
    made = {"preset": name, "amp": amp, "narrow": 0.125, "losses": [2.0, 1.0], "pkd": [20.0, 5.0], "map": 0.02}
    made |= {"map_first": 0.001, "steps": 200, "finite": True, "device": "Some CPU, 1 threads"}
    return made | changes


@pytest.mark.parametrize("changes", [{"losses": [1.0, 1.0]}, {"pkd": [5.0, 6.0]}, {"map": 0.001}])
def test_a_pair_learns_if_both_losses_fall_and_the_map_rises(changes):
    assert presets.learns(row("one", "off")) and not presets.learns(row("one", "off", **changes))


def test_the_table_has_the_latest_row_of_each_training_and_counts_pairs():
    first, second, *_ = preset_names()
    rows = [row(first, "off", map=0.0), row(first, "bf16"), row(first, "off"), row(second, "bf16", finite=False)]
    said, _, _, _, *lines = presets.table(rows).splitlines()
    assert "200 steps of 4 images on 1 of 1 measured pairs; 500 steps of 2 images in bf16" in said
    assert "are finite on 1 of 2 measured**; the published pairs are 7." in said
    assert lines == [
        f"| {first} | 2.00 → 1.00 | 20.00 → 5.00 | 0.001 → 0.020 | all finite | 2.00 → 1.00 | 20.00 → 5.00 |",
        f"| {second} | not measured | not measured | not measured | not finite | 2.00 → 1.00 | 20.00 → 5.00 |",
    ]
    assert presets.table([]) == "Not measured."


@pytest.mark.slow
@pytest.mark.usefixtures("when_asked")  # minutes of a free core for each
@pytest.mark.parametrize("name", preset_names())
def test_a_narrowed_pair_learns_the_digits_and_stays_finite_in_bf16(tmp_path, name):
    taught = presets.row(name, "off", tmp_path)
    assert presets.learns(taught) and taught["steps"] == 200, taught
    half = presets.row(name, "bf16", tmp_path)
    assert half["finite"] and half["steps"] == 500, half
