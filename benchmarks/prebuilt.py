"""The compiled extension for another Python: what of it touches Python compiled anew, and all of it linked again.

    python -m benchmarks.prebuilt INCLUDE       the folder with that Python's Python.h, such as include/python3.12

It needs an extension that was built in place here (``setup.py build_ext --inplace``), whose objects it takes from
``build/``, and leaves ``build/prebuilt/_C.cpython-VERSION...so`` and the hash of its sources. Where a checkout has that
folder, the GPU check puts the file in its place, if it is of the Python and of the sources there. The same version of
torch is needed there, since the operators are its.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "prebuilt"
OF_PYTHON = ("module.cpp", "ops/pearson_plan_bindings.cpp")  # in csrc/; no other file includes Python.h


def sources() -> str:
    """A hash of everything under ``csrc/`` that is compiled."""
    digest = hashlib.sha256()
    for path in sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def installed(suffix: str, folder: Path = FOLDER, package: Path = ROOT / "jdkd") -> str:
    """Puts a prebuilt extension in its place.

    Args:
        suffix: of extensions of the Python at hand.
        folder: with the extension and the hash of its sources.
        package: where it belongs.

    Returns:
        What was done, or why nothing was.
    """
    carried, noted = folder / f"_C{suffix}", folder / "sources"
    if not carried.is_file():
        return f"no prebuilt extension _C{suffix} was carried in {folder.name}/"
    theirs = noted.read_text().strip() if noted.is_file() else "unknown"
    if theirs != sources():
        return f"the prebuilt {carried.name} is left alone: it is of sources {theirs}, and here are {sources()}"
    try:
        shutil.copyfile(carried, package / carried.name)
    except OSError as error:
        return f"the prebuilt {carried.name} could not be put into {package}: {error.strerror}"
    return f"the prebuilt {carried.name} is used, of sources {theirs}"


def version_of(include: Path) -> str:
    """The version that a folder of headers is of, such as ``312``."""
    header = include / "patchlevel.h"
    if not (include / "Python.h").is_file() or not header.is_file():
        raise SystemExit(f"{include} has no Python.h and patchlevel.h; give the folder of a Python's headers")
    found = dict(re.findall(r"#define PY_(MAJOR|MINOR)_VERSION\s+(\d+)", header.read_text()))
    return found["MAJOR"] + found["MINOR"]


def build(include: Path) -> Path:
    """Builds the extension for the Python of these headers. Returns: its path."""
    import torch  # whose libraries it is linked with

    version = version_of(include)
    suffix = re.sub(r"cpython-\d+", f"cpython-{version}", sysconfig.get_config_var("EXT_SUFFIX"))
    objects = sorted(ROOT.glob("build/temp.*/csrc/**/*.o")) or sorted(ROOT.glob("build/temp.*/**/csrc/**/*.o"))
    config = next(ROOT.glob("build/temp.*/jdkd_build_config.h"), None)
    if not objects or config is None:
        raise SystemExit("build/ has no objects; first run: python setup.py --quiet build_ext --inplace")
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*") if path.is_file())
    if min(path.stat().st_mtime for path in objects) < newest:
        print("some sources are newer than their objects: make sure that the build in place is up to date")
    scratch = FOLDER / f"objects-{version}"
    scratch.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CXX", "c++").split()
    own = []
    for source in OF_PYTHON:
        target = scratch / f"{Path(source).stem}.o"
        flags = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-g0", "-DTORCH_EXTENSION_NAME=_C"]
        folders = [include, ROOT / "csrc", config.parent, *_pybind11()]
        _run([*compiler, *flags, *(f"-I{folder}" for folder in folders), "-c", ROOT / "csrc" / source, "-o", target])
        own.append(target)
    replaced = {Path(source).with_suffix(".o").parts[-1] for source in OF_PYTHON}
    kept = [path for path in objects if path.name not in replaced]
    if len(kept) != len(objects) - len(OF_PYTHON):
        raise SystemExit(
            f"build/ has {len(objects)} objects, and not one each of {', '.join(OF_PYTHON)}: clean it first"
        )
    cuda = 'JDKD_CUDA_VERSION ""' not in config.read_text()
    libraries = ["c10", "torch", "torch_cpu", *(["c10_cuda", "torch_cuda"] if cuda else [])]
    torch_libraries = Path(torch.__file__).parent / "lib"  # they bring the CUDA runtime along
    target = FOLDER / f"_C{suffix}"
    _run([*compiler, "-shared", "-fopenmp", *kept, *own, f"-L{torch_libraries}", *(f"-l{n}" for n in libraries),
          "-o", target])  # fmt: skip
    (FOLDER / "sources").write_text(sources() + "\n")
    shutil.rmtree(scratch)
    print(f"{target.relative_to(ROOT)}: {target.stat().st_size / 1e6:.1f} MB, torch {torch.__version__}")
    return target


def _pybind11() -> list[str]:
    """Where pybind11's headers are; torch has a copy."""
    try:
        import pybind11
    except ImportError:
        import torch

        return [str(Path(torch.__file__).parent / "include")]
    return [pybind11.get_include()]


def _run(words: Sequence[object]) -> None:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prebuilt", description=__doc__.partition("\n")[0])
    parser.add_argument("include", type=Path)
    build(parser.parse_args().include)
    sys.exit(0)
