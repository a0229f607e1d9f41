"""The compiled library: how it is loaded, what is said where it cannot be, and that torch's modes leave it alone."""

import re
import runpy
import tomllib
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from jdkd import _ext
from jdkd.errors import InputError
from jdkd.ops import pearson_planner

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def needs_library() -> None:
    if _ext.library() is None:
        pytest.skip(_ext.why_missing())


@pytest.mark.parametrize("version", ["1.13.1", "2.9.1+cpu", "2.10.0a0+git1234"])
def test_an_older_torch_is_refused_in_one_sentence(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    expected = f"jdkd needs torch 2.11 or later, and torch {version} is installed: pip install --upgrade 'torch>=2.11'"
    with pytest.raises(InputError, match=f"^{re.escape(expected)}$"):
        runpy.run_path(_ext.__file__)


@pytest.mark.parametrize("version", ["2.11.0a0+git1234", "2.11.0", "2.15.1+cu130", "3.0.0"])
def test_every_later_torch_is_taken(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    runpy.run_path(_ext.__file__)


def test_the_oldest_torch_is_the_same_everywhere():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    header = (ROOT / "csrc" / "common" / "checks.h").read_text()
    target = re.search(r"\(0ULL \+ (\d+)\) << 56\) \| \(\(0ULL \+ (\d+)\) << 48", header)
    assert declared == [f"torch>={'.'.join(map(str, _ext.OLDEST_TORCH))}"]
    assert tuple(map(int, target.groups())) == _ext.OLDEST_TORCH
    assert runpy.run_path(str(ROOT / "setup.py"))["OLDEST_TORCH"] == _ext.OLDEST_TORCH


def test_a_library_that_is_not_there_or_does_not_load_is_told_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(_ext, "LIBRARY", tmp_path / "_C.so")
    why = _ext._why_not_loaded.__wrapped__
    assert why() == "jdkd._C is not built: build it with `pip install --no-build-isolation .` in a checkout"
    _ext.LIBRARY.write_text("of another machine")
    built_for = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    begin = f"jdkd._C does not load with torch {torch.__version__} {built_for} ({_ext.LIBRARY}: "
    assert why().startswith(begin)
    assert why().endswith("): rebuild it with `pip install --no-build-isolation .` in a checkout")


def test_operators_without_tensors_answer_under_every_mode(needs_library):
    def answers() -> tuple:
        return torch.ops.jdkd_C.build_info(), pearson_planner.plan([(2, 256, 4200)], 2, (132, 232_448, 233_472, 16))

    expected = answers()
    assert expected[1].fits and len(expected[1].launches) == 1
    with FakeTensorMode():
        assert answers() == expected
    with torch.device("meta"), torch.inference_mode():
        assert answers() == expected
    assert torch.vmap(lambda x: (answers() == expected) * x)(torch.ones(2)).tolist() == [1, 1]
