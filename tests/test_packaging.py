"""What a wheel holds, which installs find the kernels, and how JDKD_BUILD_EXT behaves."""

import importlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from jdkd import __version__ as VERSION
from jdkd import _ext

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("jdkd", "kernels", "csrc", "examples", "setup.py", "pyproject.toml", "constraints.txt")
SOURCES += ("MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile")
DATA = (".json", ".html", ".css", ".typed")
PLATFORM = re.sub(r"\W", "_", sysconfig.get_platform())
SYSTEM = ("libc", "libm", "libgcc_s", "libstdc++", "libpthread", "libdl", "ld-linux-x86-64", "ld-linux-aarch64")
STABLE_HEADERS = ("stable/c/shim.h", "inductor/aoti_torch/c/shim.h")  # C functions, kept as they are for years
NOT_OURS = ("tests", "setup", "benchmarks")  # beside the package in a checkout
FIND_KERNELS = (
    "import importlib, pkgutil, jdkd, jdkd.kernels; from jdkd import kernels; from importlib.util import find_spec;"
    f"found = [name for name in {NOT_OURS!r} if find_spec(f'jdkd.{{name}}')]; assert not found, found;"
    "assert find_spec('jdkd.kernels').submodule_search_locations and kernels is jdkd.kernels;"
    "print(jdkd.__file__, *(importlib.import_module(f'jdkd.kernels.{m.name}').__file__"
    " for m in pkgutil.iter_modules(jdkd.kernels.__path__)), sep='\\n')"
)


def run(
    *arguments: object, cwd: Path, check: bool = True, python: Path | str = sys.executable, **variables: str
) -> subprocess.CompletedProcess:
    """Runs python with arguments, free of the checkout on its path."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JDKD_")}
    environment.pop("PYTHONPATH", None)
    environment |= {"PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **variables}
    command = [str(python), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the sources, without anything built."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in filter(lambda name: (ROOT / name).exists(), SOURCES):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, copy / name)
    for name in ("tests", "benchmarks"):
        (copy / name).mkdir()
        (copy / name / "__init__.py").write_text("")
    return copy


@pytest.fixture(scope="module")
def setup_file() -> dict[str, Any]:
    """What setup.py defines."""
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    """A pure-Python wheel, built although an extension from an earlier build lies in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    stale = checkout / "jdkd" / "_C.so"
    stale.write_text("of another build")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder)
    run("-m", "pip", "wheel", *options, checkout, cwd=folder, JDKD_BUILD_EXT="0")
    stale.unlink()
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_its_kernels_and_nothing_else(wheel):
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    kernels = {f"jdkd/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    data = {path.relative_to(ROOT).as_posix() for path in (ROOT / "jdkd").rglob("*") if path.suffix in DATA}
    assert kernels and kernels | data | {"jdkd/py.typed"} <= set(names) and len(data) > 5
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"jdkd"}
    assert [name for name in names if name.endswith((".so", ".cu", ".cpp")) or "test" in Path(name).name] == [
        name for name in names if name == "jdkd/testing.py"
    ]


def test_the_wheel_declares_what_it_needs(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = archive.read(name).decode()
    required = re.findall(r"^Requires-Dist: ([^;\n]+)$", metadata, flags=re.MULTILINE)
    assert required == ["torch>=2.11"]
    assert "Requires-Python: >=3.11" in metadata and "License-Expression: Apache-2.0" in metadata
    entry_points = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert "jdkd = jdkd.cli:main" in entry_points


def test_a_wheel_with_the_library_is_of_this_platform_and_of_every_python(setup_file):
    from setuptools import Distribution, Extension

    with_library = Distribution({"ext_modules": [Extension("jdkd._C", [])]})
    command = setup_file["wheel_command"]()(with_library)
    command.ensure_finalized()
    assert command.get_tag() == ("py3", "none", PLATFORM)


def test_the_library_asks_for_no_python_and_only_for_what_torch_keeps_stable():
    library = _ext.library()
    if library is None or shutil.which("nm") is None:
        pytest.skip(_ext.why_missing() or "needs nm and readelf")

    def said(*command: object) -> str:
        return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout

    needed = set(re.findall(r"NEEDED.*\[(.+?)\.so", said("readelf", "-d", library)))
    assert needed <= {"libc10", "libtorch", "libtorch_cpu", "libtorch_cuda", "libc10_cuda", "libcudart", *SYSTEM}
    asked = said("nm", "-DC", "--undefined-only", library).split()
    assert not [name for name in asked if re.match(r"_?Py|(at|c10|torch)::", name)]
    torch_functions = {name for name in asked if re.match(r"(aoti_)?torch_", name)}
    headers = (Path(torch.__file__).parent / "include/torch/csrc" / name for name in STABLE_HEADERS)
    stable = {name for header in headers for name in re.findall(r"\w+", header.read_text())}
    assert len(torch_functions) > 20 and torch_functions <= stable


def test_the_source_distribution_holds_what_wheel_and_extension_are_made_of(checkout, wheel, tmp_path):
    backend = f"import setuptools.build_meta as backend; backend.build_sdist({str(tmp_path)!r})"
    run("-W", "ignore", "-c", backend, cwd=checkout, JDKD_BUILD_EXT="0")
    (archive,) = tmp_path.glob("*.tar.gz")
    assert archive.name == f"jdkd-{VERSION}.tar.gz" and wheel.name.startswith(f"jdkd-{VERSION}-")
    with tarfile.open(archive) as opened:
        brought = {name.partition("/")[2] for name in opened.getnames()}
    compiled = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    packed = {name.replace("jdkd/kernels/", "kernels/") for name in zipfile.ZipFile(wheel).namelist()}
    assert compiled | {name for name in packed if ".dist-info/" not in name} <= brought
    assert {"setup.py", "pyproject.toml", "constraints.txt", "Makefile", "LICENSE", "CHANGELOG.md"} <= brought
    assert not [name for name in brought if name.startswith(("tests/", "benchmarks/")) or name.endswith(".so")]
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", tmp_path)
    run("-m", "pip", "wheel", *options, archive, cwd=tmp_path, JDKD_BUILD_EXT="0")
    with zipfile.ZipFile(tmp_path / wheel.name) as made, zipfile.ZipFile(wheel) as known:
        assert {*made.namelist()} == {*known.namelist()}


def test_every_extra_that_is_spoken_of_exists():
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"detect", "search", "ray", "export", "docs", "dev"} <= set(known)
    assert "jdkd[detect]" in known["docs"], "the site imports what it documents"
    texts = [*(ROOT / "jdkd").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "Makefile"]
    for path in texts:
        for said in re.findall(r"(?:jdkd|\"\.|'\.)\[([a-z,]+)\]", path.read_text()):
            assert set(said.split(",")) <= set(known), f"{path}: {said}"


def test_an_installed_wheel_finds_its_kernels(wheel, tmp_path):
    site = tmp_path / "site"
    run("-m", "pip", "install", "--no-deps", "--no-index", "--no-compile", "--target", site, wheel, cwd=tmp_path)
    found = run("-c", FIND_KERNELS, cwd=tmp_path, PYTHONPATH=str(site)).stdout.split()
    assert len(found) > 1 and all(Path(path).is_relative_to(site / "jdkd") for path in found)
    assert not (site / "kernels").exists()


def test_a_bare_checkout_finds_its_kernels(checkout, tmp_path):
    found = run("-c", FIND_KERNELS, cwd=tmp_path, PYTHONPATH=str(checkout)).stdout.split()
    assert len(found) > 1 and all(Path(path).parent == checkout / "kernels" for path in found[1:])


@pytest.mark.parametrize("name", NOT_OURS)
def test_what_lies_beside_the_package_is_no_part_of_it(name):
    with pytest.raises(ModuleNotFoundError, match=f"No module named 'jdkd.{name}'"):
        importlib.import_module(f"jdkd.{name}")


def editable_install(checkout: Path, tmp_path: Path, mode: str) -> str:
    """Code that puts a fresh editable install, in place of the one of this environment, on the path."""
    site = tmp_path / "site"
    editable = tmp_path / "wheel"
    backend = (
        "import setuptools.build_meta as backend, os;"
        f"os.makedirs({str(editable)!r});"
        f"backend.build_editable({str(editable)!r}, {{'editable_mode': {mode!r}}})"
    )
    run("-W", "ignore", "-c", backend, cwd=checkout, JDKD_BUILD_EXT="0")
    (built,) = editable.glob("*.whl")
    run("-m", "pip", "install", "--no-deps", "--no-index", "--target", site, built, cwd=tmp_path)
    # -S keeps out the editable install of the running environment; its packages follow the one under test.
    packages = [path for path in sys.path if path.endswith("site-packages")]
    return f"import site, sys; site.addsitedir({str(site)!r}); sys.path += {packages!r}"


@pytest.mark.parametrize("mode", ["lenient", "strict", "compat"])
def test_an_editable_install_finds_its_kernels(checkout, tmp_path, mode):
    on_path = editable_install(checkout, tmp_path, mode)
    found = run("-S", "-c", f"{on_path}; {FIND_KERNELS}", cwd=tmp_path)
    paths = [Path(line).resolve() for line in found.stdout.split()]
    assert len(paths) > 1 and paths[0].is_relative_to(checkout)
    assert all(path.parent == (checkout / "kernels").resolve() for path in paths[1:])


def test_what_make_setup_installs_is_found_beside_the_clone_too(checkout, tmp_path):
    mode = re.search(r"editable_mode=(\w+)", (ROOT / "Makefile").read_text())
    on_path = editable_install(checkout, tmp_path, mode[1] if mode else "lenient")
    (tmp_path / "jdkd").mkdir()  # as the folder of a clone is called
    found = run("-S", "-c", f"{on_path}; import jdkd; print(jdkd.__file__)", cwd=tmp_path).stdout
    assert Path(found.strip()) == checkout / "jdkd" / "__init__.py"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"JDKD_BUILD_EXT": "yes"}, "JDKD_BUILD_EXT is 'yes', but must be one of auto, 0, 1"),
        ({"JDKD_BUILD_EXT": "1", "CXX": "no-such-compiler"}, "no C++ compiler 'no-such-compiler' was found"),
    ],
)
def test_a_build_that_cannot_be_is_refused_in_one_sentence(checkout, variables, expected):
    result = run("setup.py", "--quiet", "build_ext", "--inplace", cwd=checkout, check=False, **variables)
    assert result.returncode == 1
    assert expected in result.stderr and "Traceback" not in result.stderr
    assert not list((checkout / "jdkd").glob("*.so"))


@pytest.mark.parametrize(("version", "is_refused"), [("65.5.0", True), ("76.1", True), ("77.0.3", False)])
def test_a_setuptools_that_cannot_read_the_metadata_is_refused(setup_file, monkeypatch, version, is_refused):
    monkeypatch.setattr("setuptools.__version__", version)
    if not is_refused:
        return setup_file["require_setuptools"]()
    expected = f'jdkd: setuptools {version} is installed, .* 77 or later: pip install torch "setuptools>=77" ninja'
    with pytest.raises(SystemExit, match=f"^{expected}$"):
        setup_file["require_setuptools"]()


@pytest.mark.parametrize("version", ["2.10.0+cpu", "1.13.1"])
def test_an_older_torch_is_no_toolchain(setup_file, monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    expected = f"the build environment has torch {version}: install torch 2.11 or later"
    with pytest.raises(setup_file["MissingToolchain"], match=f"^{re.escape(expected)}$"):
        setup_file["extension"]("1")


def test_auto_without_a_compiler_builds_pure_python_and_says_why(checkout):
    result = run("setup.py", "--quiet", "build_ext", "--inplace", cwd=checkout, CXX="no-such-compiler")
    assert "pure-Python build, without jdkd._C: no C++ compiler" in result.stderr


def test_a_compile_error_is_not_swallowed(checkout, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(checkout, broken, ignore=shutil.ignore_patterns("csrc"))
    (broken / "csrc").mkdir()
    (broken / "csrc" / "build_info.cpp").write_text("int answer = ;\n")
    result = run("setup.py", "--quiet", "build_ext", "--inplace", cwd=broken, check=False)
    assert result.returncode != 0 and "build_info.cpp:1:14: error" in result.stdout + result.stderr


USE_IT = """
import torch, jdkd
from jdkd import _ext
from jdkd.nn import PKDLoss
assert "site-packages" in jdkd.__file__, jdkd.__file__
x = torch.randn(1, 8, 16, 16, requires_grad=True)
PKDLoss(6.0)([x], [torch.randn(1, 8, 16, 16)]).backward()
assert torch.isfinite(x.grad).all() and (_ext.build_info() is not None) is {compiled}, _ext.why_missing()
"""


@pytest.mark.slow
@pytest.mark.usefixtures("when_asked")
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_both_wheels_work_in_an_empty_environment(checkout, wheel, tmp_path):
    """The pure one brings torch alone, then what its extras say; the compiled one takes its place, with the CPU's
    operators alone, since the others take many minutes to compile. Needs a package registry and 7 GB.
    """
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = ("-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt")

    def inside(*arguments: object) -> str:
        return run(*arguments, cwd=tmp_path, python=python).stdout

    inside(*install, wheel)
    inside("-c", USE_IT.format(compiled=False))
    inside("-m", "jdkd.env")
    inside(*install, f"{wheel}[search,export]")
    assert "No broken requirements" in inside("-m", "pip", "check")
    sources = shutil.copytree(checkout, tmp_path / "sources")
    shutil.rmtree(sources / "csrc" / "cuda")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", tmp_path / "compiled")
    run("-m", "pip", "wheel", *options, sources, cwd=tmp_path, JDKD_BUILD_EXT="1")
    (compiled,) = (tmp_path / "compiled").glob("*.whl")
    inside(*install, "--no-deps", "--force-reinstall", compiled)
    inside("-c", USE_IT.format(compiled=True))
    data = tmp_path / "data"
    inside("-m", "jdkd", "data", "digits", data, "--train", 4, "--val", 2, "--size", 64)
    small = ("--width", 0.25, "--fpn", 64, "--box-head", 32, "--min-size", 64, "--max-size", 64)
    inside(
        "-m", "jdkd", "train", "--model", "fasterrcnn:resnet18", "--data", data, "--out", "base", *small, "--steps", 2
    )
    inside("-m", "jdkd", "export", "base", "--data", data, "--out", "base.onnx")
    inside("-m", "jdkd", "predict", "base.onnx", data / "val2017", "--out", "seen")
    assert list((tmp_path / "seen").iterdir())


TOY = {
    "ops/toy.cpp": """
        #include "common/checks.h"
        STABLE_TORCH_LIBRARY_FRAGMENT(jdkd_C, m) { m.def("toy_twice(Tensor x) -> Tensor"); }
    """,
    "cpu/toy.cpp": """
        #include "common/checks.h"
        using torch::stable::Tensor;
        Tensor twice(const Tensor& x) {
          jdkd::check(x.is_contiguous(), "toy: x of shape ", jdkd::shape_text(x), " is not contiguous");
          Tensor out = torch::stable::empty_like(x);
          const float* from = static_cast<const float*>(x.data_ptr());
          float* to = static_cast<float*>(out.data_ptr());
          for (int64_t i = 0; i < x.numel(); ++i) to[i] = 2 * from[i];
          return out;
        }
        STABLE_TORCH_LIBRARY_IMPL(jdkd_C, CPU, m) { m.impl("toy_twice", TORCH_BOX(&twice)); }
    """,
}
USE_TOY = """
import torch
from jdkd import _ext
assert _ext.build_info()["cpu_ops"] == ["toy"] and _ext.build_info()["cuda_ops"] == []
assert torch.ops.jdkd_C.toy_twice(torch.ones(3)).tolist() == [2, 2, 2]
try:
    torch.ops.jdkd_C.toy_twice(torch.ones(3, 2).T)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.usefixtures("when_asked")
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_a_new_operator_reaches_the_wheel_without_touching_a_shared_file(checkout, tmp_path):
    sources, site = tmp_path / "sources", tmp_path / "site"
    shutil.copytree(checkout, sources)
    for folder in ("ops", "cpu", "cuda"):
        shutil.rmtree(sources / "csrc" / folder, ignore_errors=True)
    for name, text in TOY.items():
        (sources / "csrc" / name).parent.mkdir(exist_ok=True)
        (sources / "csrc" / name).write_text(text)
    options = ("--no-deps", "--no-build-isolation", "--no-index")
    run("-m", "pip", "wheel", *options, "--wheel-dir", tmp_path, sources, cwd=tmp_path)
    (built,) = tmp_path.glob("*.whl")
    assert built.name == f"jdkd-{VERSION}-py3-none-{PLATFORM}.whl"
    assert [name for name in zipfile.ZipFile(built).namelist() if ".so" in name] == ["jdkd/_C.so"]
    run("-m", "pip", "install", *options, "--no-compile", "--target", site, built, cwd=tmp_path)
    answer = run("-c", USE_TOY, cwd=tmp_path, PYTHONPATH=str(site))
    assert answer.stdout.strip() == "toy: x of shape [2, 3] is not contiguous"
