"""The environment report, the backend table and the three JDKD_* variables."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import jdkd
from jdkd import _backend, _ext, env
from jdkd._verdicts import Compared
from jdkd.errors import InputError
from jdkd.ops import pearson_forms

ROOT = Path(__file__).resolve().parents[1]
HALF = torch.zeros(2, dtype=torch.float16)
FULL = torch.zeros(2)


@pytest.fixture
def toy(monkeypatch):
    """An operator with an fp32-only compiled CPU backend that the build is made to contain."""
    monkeypatch.setattr(_backend, "_table", {})
    reasons = {"cpu": None, "cuda": "no nvcc"}
    monkeypatch.setattr(_ext, "why_missing", lambda op=None, device="cpu": reasons[device])
    monkeypatch.delenv("JDKD_BACKEND", raising=False)
    checks = {"run": lambda *_: [Compared("one", torch.ones(1), torch.ones(1))]}
    _backend.register("toy", "cuda", dtypes=(torch.float32,), checks=checks)
    _backend.register("toy", "triton", checks=checks)
    _backend.register("toy", "cpu", dtypes=(torch.float32,), checks=checks)
    _backend.register("toy", "reference")
    _backend.register("plain", "reference")
    yield "toy"
    _backend._chosen.clear()


def test_the_best_backend_that_takes_device_and_dtype_is_selected(toy):
    assert _backend.select(toy, FULL) == "cpu"
    assert _backend.select(toy, HALF) == "reference"
    assert _backend.select("plain", FULL) == "reference"
    assert _backend.select(toy, FULL.to("meta")) == "reference"


def test_the_interpreter_runs_only_when_asked_for(toy, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert _backend.select(toy, HALF) == "reference"
    with _backend.use_backend("triton"):
        assert _backend.select(toy, HALF) == "triton"


def test_triton_without_interpreter_refuses_cpu_tensors(toy, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with _backend.use_backend("triton"), pytest.raises(InputError, match="TRITON_INTERPRET=1"):
        _backend.select(toy, FULL)


def test_use_backend_is_strict_nests_and_restores(toy):
    with _backend.use_backend("cpu"):
        with _backend.use_backend("reference"):
            assert _backend.select(toy, FULL) == "reference"
        with pytest.raises(InputError, match=r"it takes float32, and this tensor is float16"):
            _backend.select(toy, HALF)
        with pytest.raises(InputError, match=r"plain has no backend 'cpu'; choose one of reference"):
            _backend.select("plain", FULL)
    assert _backend.select(toy, HALF) == "reference"


def test_an_unavailable_backend_is_refused_with_its_reason(toy):
    with _backend.use_backend("cuda"), pytest.raises(InputError, match="takes tensors on cuda"):
        _backend.select(toy, FULL)
    assert _backend.available(toy)["cuda"] == "no nvcc"
    assert _backend.available(toy)["reference"] is None


def test_the_variable_speaks_for_operators_that_have_the_backend(toy, monkeypatch):
    monkeypatch.setenv("JDKD_BACKEND", "cpu")
    assert _backend.select(toy, FULL) == "cpu"
    assert _backend.select("plain", FULL) == "reference"
    with _backend.use_backend("reference"):
        assert _backend.select(toy, FULL) == "reference"


@pytest.mark.parametrize("name", ["gpu", "CUDA"])
def test_a_backend_that_does_not_exist_lists_the_choices(toy, monkeypatch, name):
    monkeypatch.setenv("JDKD_BACKEND", name)
    with pytest.raises(InputError, match=f"JDKD_BACKEND: there is no backend '{name}'; choose"):
        _backend.select(toy, FULL)
    with pytest.raises(InputError, match="choose one of"), _backend.use_backend(name):
        pass
    with pytest.raises(InputError, match="choose one of"):
        _backend.register(toy, name)


def test_an_unknown_operator_is_named(toy):
    with pytest.raises(InputError, match=r"no operator 'tox'; registered are toy, plain"):
        _backend.select("tox", FULL)


def test_the_report_names_versions_build_and_every_backend():
    text = env.report()
    assert jdkd.__version__ in text and torch.__version__ in text
    assert _ext.library() is None or "serves 2.11 and later, and every Python" in text
    assert _backend.ops()
    for op in _backend.ops():
        for backend, reason in _backend.available(op).items():
            (line,) = (row for row in text.splitlines() if row.strip().startswith(f"{op} / {backend} "))
            assert (reason or "available") in line


def test_what_was_not_installed_is_said_of_what_is_needed_and_the_rest_is_left_out(monkeypatch):
    installed = {"onnx": "1.20", "openvino": "2026.1"}

    def version(package):
        if package not in installed:
            raise metadata.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(metadata, "version", version)
    rows = dict(env._versions())
    assert (rows["onnx"], rows["onnxruntime"], rows["openvino"]) == ("1.20", "not installed", "2026.1")
    assert "tensorrt" not in rows


def test_the_report_says_why_a_backend_and_a_form_are_chosen():
    text = env.report()
    assert _backend.explain("pearson")["cuda"] in text and _backend.explain("elastic_conv")["triton"] in text
    for form in pearson_forms.FORMS:
        (line,) = (row for row in text.splitlines() if row.strip().startswith(f"pearson: {form.name} "))
        assert form.when in line and form.why in line


def test_the_report_says_from_where_the_choices_of_accelerate_come():
    (line,) = (row for row in env.report().splitlines() if row.strip().startswith("accelerate "))
    assert line.endswith(env.ACCELERATE) and "timed on the model that is given" in line


def test_what_was_asked_for_is_known(monkeypatch):
    monkeypatch.delenv("JDKD_BACKEND", raising=False)
    assert _backend.requested() is None
    monkeypatch.setenv("JDKD_BACKEND", "cpu")
    assert _backend.requested() == "cpu"
    with _backend.use_backend("reference"):
        assert _backend.requested() == "reference"


def test_env_runs_as_a_module_without_an_extension(tmp_path):
    script = "from jdkd import _ext; _ext.LIBRARY = _ext.LIBRARY / 'none'; from jdkd import env; print(env.report())"
    variables = {**os.environ, "JDKD_CACHE": str(tmp_path)}
    variables.pop("TRITON_CACHE_DIR", None)
    run = subprocess.run(
        [sys.executable, "-c", f"{script}; import os; print('cache', os.environ['TRITON_CACHE_DIR'])"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=variables,
        check=True,
    )
    assert "jdkd._C is not built" in run.stdout and "--no-build-isolation" in run.stdout
    assert run.stdout.splitlines()[-1] == f"cache {tmp_path}/triton"


def test_build_info_is_complete_where_the_extension_is_built():
    info = _ext.build_info()
    if info is None:
        pytest.skip(_ext.why_missing())
    assert info["torch"] == torch.__version__
    assert set(info) == {"torch", "cuda", "arch_list", "compiler", "cpu_ops", "cuda_ops", "sources"}
    assert bool(info["arch_list"]) == (info["cuda"] is not None)
    for op in info["cpu_ops"]:
        assert _ext.why_missing(op, "cpu") is None
    assert "no cpu code for nothing" in _ext.why_missing("nothing", "cpu")
