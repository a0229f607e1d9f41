"""Rows of results, the tables made of them, and which cases a run picks."""

import pytest
import torch

from benchmarks import conv_shapes, goals, harness, readme, record, run
from benchmarks.cases import elastic_conv, pearson
from benchmarks.cost import Cost
from benchmarks.harness import Timing

COMMON = {"device": "Some GPU", "copy_bytes_per_s": 4e12}
COST = Cost(peak_bytes=2_000_000, kept_bytes=1000, kernels=3, dispatched_ops=None)


def rows(*timings, mode="tap"):
    case = pearson.case("P6", 2, torch.bfloat16, "NCHW", mode, "cpu")
    return record.rows(case, timings, COMMON)


def test_a_row_says_what_a_call_costs():
    (row,) = rows(Timing("eager", [1e-3] * 3, 0.1, host_seconds=2e-4, cost=COST))
    assert (row["peak_bytes"], row["kept_bytes"], row["kernels"], row["host_us"]) == (2_000_000, 1000, 3, 200)
    assert row["mode"] == "tap" and row["error"] == 0.1


def test_the_copy_of_the_rounds_is_the_yardstick_and_else_that_of_the_process():
    own, of_process = rows(Timing("eager", [1e-3] * 3, 0, cost=COST, copy_bytes_per_s=2e12), Timing("b", [1e-3] * 3, 0))
    assert own["copy_bytes_per_s"] == 2e12 and of_process["copy_bytes_per_s"] == 4e12
    assert own["of_copy"] == pytest.approx(2 * of_process["of_copy"], rel=1e-2)


def test_on_a_cpu_a_plain_copy_takes_its_turn_in_every_round(monkeypatch):
    copies = []
    monkeypatch.setattr(harness, "copying", lambda device: lambda: copies.append(device))
    (timing, *_) = harness.measure(pearson.case("P6", 1, torch.float32, "NCHW", "forward", "cpu"), "cpu", 0)
    assert copies == ["cpu"] * harness.MIN_ROUNDS and timing.copy_bytes_per_s > 0


def test_gains_are_unknown_where_the_baseline_was_left_out():
    (row,) = rows(Timing("jdkd cuda", [1e-3] * 3, 0, cost=COST))
    assert row["times_baseline"] is None
    assert "1 ms (cuda)" in record.table([row]) and " x " not in run.describe(row)


def test_a_table_shows_the_fastest_of_every_family():
    found = rows(
        Timing("eager", [8e-3] * 3, 0, cost=COST),
        Timing("torch.compile", [4e-3] * 3, 0, cost=COST),
        Timing("torch.compile max-autotune", [2e-3] * 3, 0, cost=COST),
        Timing("jdkd triton", [1e-3] * 3, 0, cost=COST),
        Timing("jdkd cuda", [1.6e-3] * 3, 0, cost=COST),
    )
    device, _, heading, _, line = record.table(found).splitlines()
    assert device == "Some GPU:"
    assert heading == "| case | mode | eager | torch.compile | jdkd | of copy | peak memory | kept |"
    assert "| 8 ms | 2 ms (4.0×, max-autotune) | 1 ms (8.0×, triton) |" in line
    assert line.endswith("| 2 → 2 MB | 0.001 → 0.001 MB |")


def test_rows_of_a_numbered_gpu_are_of_that_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Some GPU, as {device}")
    assert [record.device_name(device) for device in ("cuda", "cuda:1")] == ["Some GPU, as cuda", "Some GPU, as cuda:1"]
    assert record.result_file("cuda:1", "latency").parent.name == "some-gpu-as-cuda-1"
    assert record.device_name("cpu", 3).endswith(", 3 threads")


def test_times_have_the_unit_that_reads_best():
    seconds = {1.2: "1.2 s", 3.4e-2: "34 ms", 5.6e-5: "56 µs", 7.8e-7: "0.78 µs"}
    for value, text in seconds.items():
        assert f"| {text} |" in record.table(rows(Timing("eager", [value] * 3, 0)))


def test_rows_of_before_costs_were_measured_make_a_table_too():
    (row,) = rows(Timing("jdkd cpu", [1e-3] * 3, 0))
    old = {name: value for name, value in row.items() if name not in ("peak_bytes", "kept_bytes", "kernels")}
    assert "memory" not in record.table([old])


def test_a_match_picks_cases_by_words_of_their_names(capsys, monkeypatch):
    monkeypatch.setattr(pearson, "compiled", lambda autotuned=False: {})
    words = ["--device", "cpu", "--full", "--match", "P7 N=1 float32 NCHW forward", "--seconds", "0", "pearson"]
    assert run.main(words) == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("pearson ")]
    assert shown == ["pearson P7 N=1 float32 NCHW forward"]


def half_width(device, time="noon", label=elastic_conv.P3, dtype=torch.float32, cuda=None, **seconds):
    case = elastic_conv.case(label, 0.5, False, dtype, "forward", "cpu")
    timings = [Timing(name.replace("_of_", " "), [value] * 3, 0) for name, value in seconds.items()]
    return record.rows(case, timings, {**COMMON, "device": device, "time": time, "cuda": cuda})


def test_a_goal_is_read_off_the_rows_of_its_device():
    found = half_width("Some CPU", mask_multiply=0.17, full_width=0.16, jdkd_of_triton=0.05, jdkd=0.04)
    found += half_width("Another CPU", full_width=0.1)
    device, _, _, _, line, missing, *rest = goals.table("elastic_conv", found).splitlines()
    assert device == "Some CPU:"
    assert "| jdkd 40 ms | full_width 160 ms | 0.250 of the time | at most 0.35 of the time |" in line
    assert "| not measured |" in missing and "x1 N=2" in missing
    assert rest == ["", "On a GPU: not measured."]


def test_rows_of_another_case_say_nothing_to_a_goal():
    found = [{**row, "dtype": "bfloat16"} for row in half_width("Some CPU", full_width=0.16, jdkd=0.04)]
    assert goals.table("elastic_conv", found) == "On a CPU: not measured.\n\nOn a GPU: not measured."


def test_a_goal_compares_rows_of_one_run():
    first = half_width("Some CPU", full_width=0.16, jdkd=0.08, jdkd_of_triton=0.01)
    later = half_width("Some CPU", "one", full_width=0.16, jdkd=0.04)
    goal = goals.GOALS["elastic_conv"][0]
    assert goal.gain(first) == 16 and goal.gain(record.latest(first + later)) == 4
    assert goal.gain(record.latest(first + half_width("Some CPU", "one", full_width=0.16))) is None


def test_a_goal_over_all_convolutions_wants_every_one():
    (overall,) = (goal for goal in goals.GOALS["elastic_conv"] if isinstance(goal, goals.Overall))
    seconds = {"slice_contiguous": 0.2, "jdkd": 0.1}
    found = []
    for number, label in enumerate(conv_shapes.distinct()):
        ours = 0.05 if number == 0 else 0.8 if number == 1 else 0.1  # 4, 1/4 and 2 times as fast
        found += half_width("GPU", label=label, dtype=torch.bfloat16, cuda="13", **{**seconds, "jdkd": ours})
    mean = 2 ** (41 / 43)
    assert overall.cells(found)[4] == f"{mean:.2f}×, 0.25× and more"
    assert overall.cells(found[2:])[4] == "not measured, 42 of 43 were"
    assert overall.cells([])[4:] == ["not measured", "mean at least 1×, none below 0.95×"]


def test_a_limit_is_read_off_a_row_and_its_counts():
    (limit,) = (g for g in goals.GOALS["pack"] if (g.mode, g.layout) == ("unpack", "NCHW"))
    row = {"case": limit.case, "mode": "unpack", "dtype": "bfloat16", "layout": "NCHW", "provider": "jdkd"}
    assert limit.cells([{**row, "median_us": 38, "kernels": 1}])[4:] == ["38 µs, 1 kernels", "at most 40 µs, 1 kernels"]
    assert limit.cells([{**row, "median_us": 38, "kernels": None}])[4] == "38 µs, kernels not measured"
    assert limit.cells([{**row, "provider": "slice_contiguous", "median_us": 38, "kernels": 1}])[4] == "not measured"
    (limit,) = (g for g in goals.GOALS["subnet_change"] if g.ours == "jdkd")
    row = {**row, "case": limit.case, "mode": limit.mode, "layout": limit.layout}
    counts = {"host_syncs": 0, "kernels_compiled": 3, "graphs_compiled": 0}
    assert limit.cells([{**row, "counts": counts}])[4] == "0 host syncs, 3 kernels compiled"


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_a_row_says_whether_convolutions_may_use_tf32(precision, monkeypatch):
    monkeypatch.setattr(record, "device_name", lambda device: "Some GPU")
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        torch.backends.cudnn.conv.fp32_precision = precision
        assert record.environment("cuda", 4e12)["tf32"] is (precision == "tf32")
        assert record.environment("cpu", 4e12)["tf32"] is None
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def test_a_row_says_what_its_provider_counts():
    (row,) = rows(Timing("jdkd", [1e-3] * 3, 0, counts={"host_syncs": 2}))
    assert row["counts"] == {"host_syncs": 2} and run.describe(row).endswith("2 host syncs")


def test_a_row_says_what_its_provider_notes():
    (row,) = rows(Timing("torch.compile", [1e-3] * 3, 0, note="4 graphs"))
    assert row["note"] == "4 graphs" and run.describe(row).endswith("4 graphs")


def test_operators_take_turns_so_that_each_shows_its_goal():
    found = [case.op for case, _ in zip(run.all_cases(["elastic_conv", "pack"], "cpu", False), range(4), strict=False)]
    assert found == ["elastic_conv", "pack"] * 2


def test_a_floor_is_the_time_of_a_copy_of_the_least_bytes():
    (floor,) = (g for g in goals.GOALS["pearson"] if isinstance(g, goals.Floor) and g.case == "P3-P7 N=2")
    row = {"case": floor.case, "mode": floor.mode, "dtype": floor.dtype, "layout": floor.layout}
    found = [
        {**row, "provider": name, "median_us": us, "host_us": None, "of_copy": 16 / us}
        for name, us in (("eager", 16), ("jdkd cuda", 32), ("jdkd single", 20))
    ]
    line = floor.cells(found)
    assert line[2] == "jdkd single 20 µs" and line[4:] == ["1.25 of the time", "at most 1.5 of the time"]
    assert floor.cells(found[:1])[4] == "not measured"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_goal_of_the_pearson_loss_is_a_case_that_a_run_times(device, monkeypatch):
    monkeypatch.setattr(pearson, "compiled", lambda autotuned=False: {"torch.compile": None})
    monkeypatch.setattr(pearson, "inputs", None)
    names = {(case.label, case.mode, str(case.dtype)[6:], case.layout) for case in pearson.cases("cpu", True)}
    wanted = [goal for goal in goals.GOALS["pearson"] if goal.device == device]
    assert wanted and any(isinstance(goal, goals.Goal) for goal in wanted)
    for goal in wanted:
        label = goal.case.replace("N=16", "N=1")
        assert (label, goal.mode, goal.dtype, goal.layout) in names


def test_the_page_says_which_aims_of_the_loss_on_a_cpu_are_missed():
    rows = record.latest(readme.kept("pearson"))
    aims = [goal for goal in goals.GOALS["pearson"] if goal.device == "cpu"]
    kinds = {(goal.dtype, goal.layout) for goal in aims}
    assert len(kinds) == 6
    measured = {(goal.dtype, goal.layout): goal.cells(rows)[4] for goal in aims if isinstance(goal, goals.Floor)}
    near = {kind for kind, found in measured.items() if float(found.split()[0]) <= 1.67}
    compiled = [goal for goal in aims if isinstance(goal, goals.Goal) and goal.theirs == "torch.compile"]
    fast = {(goal.dtype, goal.layout) for goal in compiled if goal.gain(rows) >= goal.least}
    assert near == {("float32", "NCHW")}
    assert kinds - fast == {("bfloat16", "NCHW"), ("float16", "NCHW"), ("float16", "channels-last")}
    said = " ".join((readme.ROOT / "docs" / "results.md").read_text().split())
    assert "float32 NCHW alone reaches the first, and bfloat16 NCHW and float16 miss the second" in said
