"""Arms of the ablation: what each changes, and where it lies."""

from dataclasses import replace

from benchmarks.ablations import ARMS, POOLLESS
from jdkd.search import Method


def test_every_arm_changes_something_else_and_lies_beside_what_the_proof_leaves():
    methods = [replace(Method(), **changes) for _, changes in ARMS.values()]
    assert len(set(methods)) == len(ARMS) and methods[list(ARMS).index("joint")] == Method()
    assert {arm for arm, (_, changes) in ARMS.items() if changes.get("teaching") in ("base", "none")} == set(POOLLESS)
    assert not {"base", "search", "data", "teacher", "longer"} & ARMS.keys(), "an arm's folder is not one of a seed's"
