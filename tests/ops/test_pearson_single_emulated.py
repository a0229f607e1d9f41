"""The single-pass kernel itself, compiled for the host and run thread by thread, against the 2x rule."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths

from jdkd import _ext
from jdkd.reference import pearson as reference
from jdkd.testing import assert_within_twice
from tests.ops.pearson_cases import CASES, PLAIN, WEIGHT, Case, eager, gradient_unit

ROOT = Path(__file__).parents[2]
DTYPES = (torch.float32, torch.bfloat16)
# SMs, shared memory per block and per SM, largest cluster. The smaller the memory, the larger the clusters.
HOPPER = (1, 232_448, 233_472, 16)
SMALL = (1, 9_216, 24_576, 16)
TINY = (1, 3_072 + 2_048, 18_432, 16)
SPREAD = (10_000, 232_448, 233_472, 8)


_SIZES = ("n", "c", "hw", "ranks", "teams", "chunk", "room", "first_cluster", "first_column", "first_part")


class Level(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("s", "t", "ds")),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("scale", ctypes.c_double),
    )


def cuda_headers() -> list[str]:
    """Folders that hold cuda_bf16.h: the toolkit's, or that of the package."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(root) / "cu13" / "include" for root in (spec.submodule_search_locations if spec else [])]
    return [str(folder) for folder in (*folders, Path("/usr/local/cuda/include")) if (folder / "cuda_bf16.h").is_file()]


@pytest.fixture(scope="module")
def emulate(tmp_path_factory):
    compiler, headers = shutil.which("g++"), cuda_headers()
    if compiler is None or not headers or not hasattr(_ext.module(), "pearson_plan"):
        pytest.skip("needs g++, the headers of CUDA and jdkd._C")
    library = tmp_path_factory.mktemp("emulation") / "emulation.so"
    folders = [flag for folder in (*include_paths("cpu"), *headers) for flag in ("-isystem", folder)]
    source = ROOT / "tests/ops/pearson_single_emulation.cpp"
    command = [compiler, "-O1", "-std=c++17", "-shared", "-fPIC", "-w", f"-I{ROOT / 'csrc'}", *folders]
    subprocess.run([*command, str(source), "-o", str(library)], check=True, timeout=300)
    return ctypes.CDLL(str(library)).emulate


def single_pass(
    emulate,
    students: list[Tensor],
    teachers: list[Tensor],
    weights,
    chip=HOPPER,
    eps=1e-6,
    skip_constant=False,
    vector=0,
):
    """What jdkd_C::pearson_single returns, and the plan; ``vector`` 1 is the path of unaligned tensors."""
    itemsize = students[0].element_size()
    shapes = [(s.shape[0], s.shape[1], s.shape[2] * s.shape[3]) for s in students]
    plan = _ext.module().pearson_plan(shapes, itemsize, *chip)
    assert plan["fits"]
    first = [sum(shape[1] for shape in shapes[:i]) for i in range(len(shapes))]
    columns = sum(shape[1] for shape in shapes)
    table = torch.full((2, reference.ROWS, columns), float("nan"))
    counts = [shape[1] * level["ranks"] for shape, level in zip(shapes, plan["levels"], strict=True)]
    parts = torch.full((sum(counts),), float("nan"), dtype=torch.float64)
    gradients = [torch.full_like(s, float("nan")) for s in students]
    for launch in plan["launches"]:
        args = (Level * len(launch["levels"]))()
        for arg, i in zip(args, launch["levels"], strict=True):
            arg.s, arg.t, arg.ds = (side[i].data_ptr() for side in (students, teachers, gradients))
            arg.n, arg.c, arg.hw = shapes[i]
            for name in ("ranks", "teams", "chunk", "room", "first_cluster"):
                setattr(arg, name, plan["levels"][i][name])
            arg.first_column, arg.first_part, arg.scale = first[i], sum(counts[:i]), weights[i] / shapes[i][1]
        emulate(
            args, len(args), itemsize, vector or 16 // itemsize, ctypes.c_void_p(table.data_ptr()),
            ctypes.c_void_p(parts.data_ptr()), ctypes.c_int64(columns), ctypes.c_double(eps), int(skip_constant),
            ctypes.c_int64(launch["clusters"]), launch["cluster"], launch["warps"],
            ctypes.c_int64(launch["shared_bytes"]),
        )  # fmt: skip
    losses = torch.stack([part.sum() for part in parts.split(counts)])
    return losses.sum().float(), losses.float(), table, gradients, plan


def check(emulate, case: Case, **how) -> dict:
    """Holds loss and students' gradients to the 2x rule, with an upstream of 1, and the table to the reference's."""
    students, teachers = ([level.detach() for level in side] for side in replace(case, upstream=1.0).levels())
    weights = [WEIGHT] * len(students)
    loss, losses, table, gradients, plan = single_pass(emulate, students, teachers, weights, **how)
    exact, rough = (eager(students, teachers, dtype, 1.0) for dtype in (torch.float64, torch.float32))
    assert_within_twice(loss, rough[0], exact[0], what="loss", scale=exact[0].clamp(min=1e-2))
    for i, (x, y, dx) in enumerate(zip(students, teachers, gradients, strict=True)):
        unit = gradient_unit(x, y, 1.0)
        assert_within_twice(dx, rough[i + 1].to(x.dtype), exact[i + 1], what=f"gradient {i}", scale=unit)
    _, expected_losses, expected, _ = reference.pearson_fwd(students, teachers, weights)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(table[:, 3:], expected[:, 3:], rtol=1e-6, atol=1e-6)
    return plan


@pytest.mark.parametrize("vector", [0, 1], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_is_as_exact_as_the_eager_formula_in_float32(emulate, name, dtype, vector):
    check(emulate, replace(CASES[name], dtype=dtype), vector=vector)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("chip", "shapes", "cluster"),
    [
        (SMALL, ((2, 3, 20, 20),), 2),
        (SMALL, ((3, 2, 37, 41), (3, 5, 19, 21), (3, 20, 5, 3)), 16),
        (TINY, ((16, 2, 16, 16), (16, 3, 8, 8), (16, 5, 1, 1)), 16),
        (TINY, ((5, 2, 23, 29),), 16),
        (SPREAD, ((2, 3, 40, 20), (2, 9, 7, 11)), 8),
    ],
)
def test_channels_may_be_cut_over_clusters_or_packed_into_them(emulate, dtype, chip, shapes, cluster):
    plan = check(emulate, Case(shapes=shapes, mean=3.0, dtype=dtype), chip=chip)
    most = max(launch["cluster"] for launch in plan["launches"])
    assert most == (cluster if dtype == torch.float32 or chip is SPREAD else most)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 2, 100, 168), (4, 1, 200, 336), (16, 9, 25, 42)])
def test_channels_of_a_detector_keep_the_rule_on_the_chip_they_are_meant_for(emulate, dtype, shape):
    check(emulate, Case(shapes=(shape,), mean=300.0, dtype=dtype))


def test_a_loss_near_a_correlation_of_one_keeps_its_digits(emulate):
    case = Case(shapes=((2, 3, 31, 33),), mean=300.0, r=1 - 5e-7)
    students, teachers = ([level.detach() for level in side] for side in case.levels())
    loss = single_pass(emulate, students, teachers, [1.0], chip=SMALL)[0]
    exact = reference.pkd_loss([s.double() for s in students], [t.double() for t in teachers])
    assert exact < 1e-6 and abs(loss - exact) < 1e-3 * exact


def test_weights_eps_and_constant_channels_are_as_in_the_reference(emulate):
    students, teachers = (
        [level.detach() for level in side] for side in Case(shapes=((2, 3, 9, 7), (1, 4, 6, 5))).levels()
    )
    students[0][:, 1], teachers[1][:, 2] = 0.7, -3.0
    students[0][0, 2, 0, 0] = float("nan")
    for skip_constant in (True, False):
        settings = [0.5, 2.0], 1e-3, skip_constant
        _, losses, table, gradients, _ = single_pass(
            emulate, students, teachers, settings[0], eps=settings[1], skip_constant=skip_constant
        )
        _, expected, expected_table, _ = reference.pearson_fwd(students, teachers, *settings)
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
        expected_gradients = reference.pearson_bwd(torch.tensor(1.0), students, teachers, expected_table[0])
        for dx, expected_dx in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(dx, expected_dx, rtol=1e-4, atol=1e-6, equal_nan=True)
        assert losses[0].isnan() and losses[1].isfinite()
        if skip_constant:
            assert (table[:, :3, 1] == 0).all() and (gradients[0][:, 1] == 0).all() and (gradients[1][:, 2] == 0).all()


def test_two_runs_with_copies_landing_in_another_order_give_the_same_bits(emulate):
    students, teachers = ([level.detach() for level in side] for side in Case(shapes=((3, 2, 60, 41),)).levels())
    runs = [single_pass(emulate, students, teachers, [1.0], chip=SMALL) for _ in range(2)]
    (loss, _, table, (gradient,), plan), (again, _, table_again, (gradient_again,), _) = runs
    assert plan["launches"][0]["cluster"] == 16
    assert torch.equal(loss, again) and torch.equal(table, table_again) and torch.equal(gradient, gradient_again)


def test_the_plain_case_fills_every_cell(emulate):
    students, teachers = ([level.detach() for level in side] for side in PLAIN.levels())
    _, losses, table, gradients, _ = single_pass(emulate, students, teachers, [1.0, 1.0])
    assert all(t.isfinite().all() for t in (losses, table, *gradients))
