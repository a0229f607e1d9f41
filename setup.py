"""Builds jdkd: the Python package always, the compiled library ``jdkd/_C.so`` where a toolchain is at hand.

The library is no Python module: it holds operators of torch's stable ABI, so that one build serves every Python and
every torch from ``OLDEST_TORCH`` on. Its sources are found by pattern, so a new operator touches no shared file:

* ``csrc/build_info.cpp`` and ``csrc/ops/*.cpp``: what the build knows of itself, argument contracts and schemas;
* ``csrc/cpu/*.cpp``: fused CPU kernels;
* ``csrc/cuda/*.cu`` and ``csrc/cuda/*.cpp``: CUDA kernels, compiled when an ``nvcc`` of torch's CUDA major is
  found. Every file then sees ``JDKD_WITH_CUDA``.

``JDKD_BUILD_EXT`` is ``auto`` (the default: build what the machine can), ``1`` (a missing toolchain is an
error) or ``0`` (pure Python). A compile error always fails the build.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import setuptools
from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "0", "1")
OLDEST_SETUPTOOLS = 77  # which reads the licence in pyproject.toml; without build isolation pip does not see to it
OLDEST_TORCH = (2, 11)  # whose stable ABI the operators are written for: TORCH_TARGET_VERSION in csrc/common/checks.h
# sm_80 code runs on every 8.x device and its PTX is translated for devices newer than Hopper; sm_90a is
# Hopper with the instructions that only Hopper has (its PTX runs nowhere else, so none is kept).
ARCH_LIST = "8.0+PTX;9.0a"
# Vector types cross no library boundary here; and GCC 12 warns of its own AVX-512 intrinsics (its bug 105593).
GCC_NOISE = ("-Wno-psabi", "-Wno-maybe-uninitialized")
METADATA_COMMANDS = {"egg_info", "dist_info", "sdist", "clean"}


class MissingToolchain(Exception):
    """A part of the toolchain is not there; the message names it and the remedy."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: the folder above ``bin/nvcc`` and the release nvcc reports, such as ``13.0``."""

    root: Path
    release: str


def require_setuptools() -> None:
    """Ends the build where setuptools, as new environments of older Pythons have it, cannot read pyproject.toml."""
    found = setuptools.__version__
    if int(found.partition(".")[0]) < OLDEST_SETUPTOOLS:
        raise SystemExit(
            f"jdkd: setuptools {found} is installed, and the build needs {OLDEST_SETUPTOOLS} or later: "
            f'pip install torch "setuptools>={OLDEST_SETUPTOOLS}" ninja'
        )


def say(text: str) -> None:
    print(f"jdkd: {text}", file=sys.stderr, flush=True)


def build_mode() -> str:
    mode = os.environ.get("JDKD_BUILD_EXT", "").strip().lower() or "auto"
    if mode not in MODES:
        raise SystemExit(f"jdkd: JDKD_BUILD_EXT is {mode!r}, but must be one of {', '.join(MODES)}")
    return mode


def relative(pattern: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").glob(pattern))


def sources_hash() -> str:
    """A hash of everything under ``csrc/`` that is compiled."""
    digest = hashlib.sha256()
    for name in relative("**/*.[ch]*"):
        digest.update(name.encode() + b"\0" + (ROOT / name).read_bytes())
    return digest.hexdigest()[:12]


def op_families(sources: list[str]) -> list[str]:
    """The operators that sources implement: ``cuda/pearson_fwd.cu`` belongs to ``ops/pearson.cpp``."""
    stems = [Path(source).stem for source in sources]
    ops = [Path(source).stem for source in relative("ops/*.cpp")]
    return sorted(op for op in ops if any(stem == op or stem.startswith(f"{op}_") for stem in stems))


def nvidia_packages(major: str) -> Path | None:
    """The folder that ``cuda-toolkit``'s packages unpack into, ``site-packages/nvidia/cu13`` for CUDA 13."""
    spec = importlib.util.find_spec("nvidia")
    for location in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(location) / f"cu{major}"
        if folder.is_dir():
            return folder
    return None


def nvcc_release(root: Path) -> str | None:
    nvcc = root / "bin" / "nvcc"
    if not nvcc.is_file() or not (root / "include" / "cuda_runtime.h").is_file():
        return None
    answer = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+\.\d+)", answer)
    return release.group(1) if release else None


def find_toolkit(torch_cuda: str) -> Toolkit:
    """The first complete toolkit of torch's CUDA major: named, system-wide, or from the package registry."""
    major = torch_cuda.split(".")[0]
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc")
    packages = nvidia_packages(major)
    candidates = [
        Path(named) if named else None,
        Path(on_path).resolve().parent.parent if on_path else None,
        Path("/usr/local/cuda"),
        packages,
    ]
    refused = []
    for root in dict.fromkeys(path for path in candidates if path is not None):
        release = nvcc_release(root)
        if release is not None and release.split(".")[0] == major:
            return Toolkit(root, release)
        if root.is_dir():
            refused.append(f"{root} has CUDA {release}" if release else f"{root} is no complete toolkit")
    seen = f" ({'; '.join(refused)})" if refused else ""
    raise MissingToolchain(
        f"no CUDA {major} toolkit was found{seen}: set CUDA_HOME, or install the package "
        f'"cuda-toolkit[nvcc,cccl,crt,nvvm]" of torch\'s CUDA version {torch_cuda}'
    )


def require_host_compiler() -> None:
    if sys.platform != "linux":
        raise MissingToolchain(f"jdkd._C is built on Linux only, and this is {sys.platform}")
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        raise MissingToolchain(f"no C++ compiler {compiler!r} was found: install g++, or set CXX")


def require_torch() -> None:
    if importlib.util.find_spec("torch") is None:
        raise MissingToolchain(
            "torch is not in the build environment: install torch, then use pip install --no-build-isolation"
        )
    import torch

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise MissingToolchain(f"the build environment has torch {torch.__version__}: install torch {oldest} or later")


def late_include_folders(toolkit: Toolkit | None) -> list[str]:
    """Headers that torch's own include and a bare toolkit lacks (cuBLAS, cuSPARSE): to be searched last."""
    packages = nvidia_packages(toolkit.release.split(".")[0]) if toolkit else None
    if packages is None or (toolkit.root / "include" / "cublas_v2.h").is_file():
        return []
    return [str(packages / "include")]


def cudart_folders(toolkit: Toolkit) -> list[Path]:
    packages = nvidia_packages(toolkit.release.split(".")[0])
    return [toolkit.root / "lib64", toolkit.root / "lib", *([packages / "lib"] if packages else [])]


def link_cudart(toolkit: Toolkit, build_temp: Path) -> Path | None:
    """A folder with a ``libcudart.so`` for the linker: the registry's package has ``libcudart.so.13``."""
    if any((folder / "libcudart.so").exists() for folder in cudart_folders(toolkit)[:2]):
        return None
    for folder in cudart_folders(toolkit):
        for library in sorted(folder.glob("libcudart.so*")):
            link = build_temp / "cudart" / "libcudart.so"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(library)
            return link.parent
    raise SystemExit(f"jdkd: libcudart.so* is in none of {', '.join(map(str, cudart_folders(toolkit)))}")


def write_build_config(folder: Path, values: dict[str, str | list[str] | None]) -> None:
    """Write ``jdkd_build_config.h``, and only when it changes, so that nothing is recompiled for nothing."""
    text = f'#pragma once\n#define JDKD_BUILD_CONFIG R"json({json.dumps(values)})json"\n'
    header = folder / "jdkd_build_config.h"
    folder.mkdir(parents=True, exist_ok=True)
    if not header.is_file() or header.read_text() != text:
        header.write_text(text)


def wheel_command() -> type:
    """What makes a wheel with the library, which is of one platform but of no Python."""
    from setuptools.command.bdist_wheel import bdist_wheel

    class WheelForEveryPython(bdist_wheel):
        def get_tag(self) -> tuple[str, str, str]:
            *_, platform = super().get_tag()
            return "py3", "none", platform

    return WheelForEveryPython


def extension(mode: str) -> dict:
    """The keyword arguments of ``setup`` that build ``jdkd._C`` on this machine.

    Raises:
        MissingToolchain: with what is missing; a CUDA toolkit counts only under ``JDKD_BUILD_EXT=1``, since
            the CPU operators build without it.
    """
    require_torch()
    require_host_compiler()
    import torch

    cuda_sources = relative("cuda/*.cu") + relative("cuda/*.cpp")
    toolkit = None
    if torch.version.cuda and cuda_sources:
        try:
            toolkit = find_toolkit(torch.version.cuda)
        except MissingToolchain as missing:
            if mode == "1":
                raise
            say(f"building the CPU operators only: {missing}")
    if toolkit:
        os.environ["CUDA_HOME"] = str(toolkit.root)
        os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCH_LIST
    if importlib.util.find_spec("ninja"):
        import ninja

        os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])
    from torch.utils import cpp_extension

    cpu_sources = relative("cpu/*.cpp")
    macros = [("USE_CUDA", None), ("JDKD_WITH_CUDA", None)] if toolkit else []
    make = cpp_extension.CUDAExtension if toolkit else cpp_extension.CppExtension
    module = make(
        name="jdkd._C",
        sources=relative("*.cpp") + relative("ops/*.cpp") + cpu_sources + (cuda_sources if toolkit else []),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=macros,
        extra_compile_args={
            "cxx": ["-O3", "-fvisibility=hidden", "-g0", "-Wall", *GCC_NOISE],
            "nvcc": ["-O3", "--expt-relaxed-constexpr"],
        },
        py_limited_api=True,  # leaves libtorch_python out, which is of one Python
    )
    arch_list = os.environ["TORCH_CUDA_ARCH_LIST"] if toolkit else ""
    config = {
        "torch": str(torch.__version__),
        "cuda": toolkit.release if toolkit else None,
        "arch_list": re.findall(r"[^;\s]+", arch_list),
        "cpu_ops": op_families(cpu_sources),
        "cuda_ops": op_families(cuda_sources) if toolkit else [],
        "sources": sources_hash(),
    }

    class BuildLibrary(cpp_extension.BuildExtension.with_options(no_python_abi_suffix=True)):
        def build_extensions(self) -> None:
            folder = Path(self.build_temp).resolve()
            write_build_config(folder, config)
            module.include_dirs += [str(folder), *late_include_folders(toolkit)]
            if toolkit and (link_folder := link_cudart(toolkit, folder)):
                module.library_dirs.append(str(link_folder))
            cuda = f"CUDA {toolkit.release} in {toolkit.root} for {arch_list}" if toolkit else "no CUDA"
            say(f"building jdkd._C from {len(module.sources)} files: torch {torch.__version__}, {cuda}")
            super().build_extensions()

    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildLibrary, "bdist_wheel": wheel_command()}}


def extension_or_none() -> dict:
    mode = build_mode()
    if mode == "0" or METADATA_COMMANDS.intersection(sys.argv[1:]):
        return {}
    try:
        return extension(mode)
    except MissingToolchain as missing:
        if mode == "1":
            raise SystemExit(f"jdkd: JDKD_BUILD_EXT=1, but {missing}") from None
        say(f"pure-Python build, without jdkd._C: {missing}")
        return {}


if __name__ == "__main__":
    require_setuptools()
    setup(
        packages=[*find_packages(include=["jdkd", "jdkd.*"]), "jdkd.kernels"],
        package_dir={"jdkd.kernels": "kernels"},
        **extension_or_none(),
    )
