"""Arms of the ablation: what each changes, and where it lies."""

from dataclasses import replace

from benchmarks.ablations import ARMS, POOLLESS, table
from jdkd.search import Method


def test_every_arm_changes_something_else_and_lies_beside_what_the_proof_leaves():
    methods = {arm: replace(Method(), **changes) for arm, (_, changes) in ARMS.items() if arm != "again"}
    assert len(set(methods.values())) == len(ARMS) - 1 and methods["joint"] == Method() and not ARMS["again"][1]
    assert {arm for arm, (_, changes) in ARMS.items() if changes.get("teaching") in ("base", "none")} == set(POOLLESS)
    assert not {"base", "search", "data", "teacher", "longer"} & ARMS.keys(), "an arm's folder is not one of a seed's"


def test_a_difference_to_the_method_is_paired_by_seed_and_has_an_interval():
    def row(arm, seed, map):
        return {"arm": arm, "seed": seed, "map": map, "latency_ratio": 0.5, "base": 0.3, "control": 0.4}

    joint = [row("joint", seed, 0.5 + seed / 10) for seed in range(3)]
    scratch = [row("scratch", seed, 0.5 + seed / 10 + less) for seed, less in enumerate((-0.01, -0.02, -0.03))]
    told = table([*joint, *scratch, row("none", 1, 0.5)])
    assert "| -0.020 ± 0.010 (-0.045 to +0.005) | 0.500 |" in told, "4.303 times 0.01 over the root of 3"
    assert "| nobody teaches | 1 | 0.500 | -0.100 | 0.500 |" in told, "of one seed there is no interval"
