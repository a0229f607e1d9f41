"""Arms of the ablation: what each changes, and where it lies."""

from dataclasses import replace

from benchmarks.ablations import ARMS, POOLLESS
from jdkd.search import Method


def test_every_arm_changes_something_else_and_lies_beside_what_the_proof_leaves():
    methods = {arm: replace(Method(), **changes) for arm, (_, changes) in ARMS.items() if arm != "again"}
    assert len(set(methods.values())) == len(ARMS) - 1 and methods["joint"] == Method() and not ARMS["again"][1]
    assert {arm for arm, (_, changes) in ARMS.items() if changes.get("teaching") in ("base", "none")} == set(POOLLESS)
    assert not {"base", "search", "data", "teacher", "longer"} & ARMS.keys(), "an arm's folder is not one of a seed's"
