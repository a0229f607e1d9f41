"""A net that has not caught a planted bug is not a net: the emulation catches these."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from jdkd.ops.active_channels import Channels
from jdkd.ops.pack import Part
from tests.once import shared_folder
from tests.ops import test_pack_emulated, test_pearson_single_emulated, test_pearson_split_emulated
from tests.ops.emulated import Emulation, compiled
from tests.ops.pearson_cases import Case
from tests.ops.planted import BUGS, NETS, planted_sources


@pytest.fixture(scope="session")
def _planted_operators(tmp_path_factory: pytest.TempPathFactory) -> Emulation:
    return compiled(shared_folder(tmp_path_factory), "jdkd_planted", planted_sources)


@pytest.fixture
def planted(_planted_operators: Emulation) -> Iterator[Emulation]:
    """Operators with bugs to switch on."""
    _planted_operators.reorder(0)
    yield _planted_operators
    _planted_operators.plant(0)


def planes(emulation: Emulation) -> None:
    case = Case(shapes=((1, 2, 67, 67), (2, 2, 25, 23), (2, 2, 1, 3)))
    with emulation.memory("end"):
        test_pearson_split_emulated.run(emulation.ops, case, tap=True)
    with emulation.memory("begin"):
        test_pearson_split_emulated.run(emulation.ops, case, (0, 1, 0))
        test_pearson_split_emulated.run(emulation.ops, case, (1, 1, 1), tap=True)


def rows(emulation: Emulation) -> None:
    case = Case(shapes=((1, 33, 71, 71), (2, 36, 9, 7)), channels_last=True)
    with emulation.memory("end"):
        test_pearson_split_emulated.run(emulation.ops, case, tap=True)
        test_pearson_split_emulated.run(emulation.ops, replace(case, r=1 - 5e-7))  # no beta, no digits
    with emulation.memory("begin"):
        test_pearson_split_emulated.run(emulation.ops, case, (1, 0, 0))


def pack(emulation: Emulation) -> None:
    for seed, where, offset in ((0, "begin", 0), (1, "end", 0), (2, "begin", 1)):
        test_pack_emulated.run(emulation, seed, torch.float32, torch.float32, where, offset)
    turned = [((64, 48, 3, 3), False, Part(Channels(64), Channels(48)))]  # pieces that end within a round of vectors
    test_pack_emulated.run_parts(emulation, turned, 1, torch.float32, torch.float32, "end")


def single(emulation: Emulation) -> None:
    cut, one_block = Case(shapes=((3, 2, 37, 41), (3, 5, 19, 21), (3, 20, 5, 3))), Case(shapes=((17, 1, 5, 3),))
    test_pearson_single_emulated.run(emulation, cut, test_pearson_single_emulated.SMALL)
    test_pearson_single_emulated.run(emulation, one_block, (*test_pearson_single_emulated.SPREAD[:3], 1))


TRIALS: dict[str, Callable[[Emulation], None]] = {f.__name__: f for f in (planes, rows, pack, single)}


@pytest.mark.parametrize("trial", TRIALS)
def test_without_a_bug_a_trial_passes(planted, trial):
    TRIALS[trial](planted)


def in_several_orders(emulation: Emulation, trial: Callable[[Emulation], None]) -> None:
    for order in range(4):
        emulation.reorder(order)
        trial(emulation)


@pytest.mark.parametrize("number", range(len(BUGS)), ids=[bug.what for bug in BUGS])
def test_is_caught(planted, number):
    bug = BUGS[number]
    planted.plant(number + 1)
    with pytest.raises((RuntimeError, AssertionError), match=NETS[bug.net]):
        in_several_orders(planted, TRIALS[bug.trial])
