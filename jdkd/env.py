"""What jdkd runs on: versions, devices, the build, and every operator's backends. See :func:`report`.

``python -m jdkd.env`` prints it.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import platform
from importlib import metadata
from types import ModuleType

import torch

from jdkd import __version__, _backend, _ext, _tuned

_PACKAGES = (
    "triton",
    "torchvision",
    "numpy",
    "pycocotools",
    "faster-coco-eval",
    "safetensors",
    "pillow",
    "scikit-learn",
    "tyro",
    "rich",
    "matplotlib",
    "onnx",
    "onnxruntime",
)
_ON_REQUEST = ("openvino", "tensorrt", "timm", "ray", "optuna", "tensorboard")
"""Packages that are listed where they are installed, as few have a use for them."""
_VARIABLES = {
    "JDKD_BACKEND": f"backend of every operator that has it: {', '.join(_backend.BACKENDS)}",
    "JDKD_BUILD_EXT": "read by setup.py: auto, 1 (a missing toolchain is an error), 0 (pure Python)",
    "JDKD_CACHE": "folder for what checks and timings of kernels found and for indices of annotations, by default "
    "~/.cache/jdkd; where set, also for Triton's compiled kernels, unless TRITON_CACHE_DIR is",
}

ACCELERATE = (
    "each ingredient is checked and timed on the model that is given, or checked alone with timed=False; no table of "
    "this machine tells, as which of them are faster depends on the model"
)
"""From where the choices of :func:`jdkd.patch.accelerate` come."""


def report() -> str:
    """Describes this installation in plain text.

    Returns:
        Lines in sections: versions, devices, the build of ``jdkd._C``, the environment variables, for each operator
        every backend with ``available`` or the reason why not, best first, for each of its forms in float32 the
        backend that runs on each device, with the reason, from where the choices of ``accelerate`` come, and where
        another backend runs as it measured faster. Nothing is checked or timed: ``jdkd check`` and ``jdkd tune`` do.
    """
    sections = {
        "versions": _versions(),
        "devices": _devices(),
        "jdkd._C": _build(),
        "variables": _variables(),
        "operators": _operators(),
        "choices": _choices(),
        "tuned": _tuned_regions(),
    }
    return "\n\n".join(f"{title}\n{_table(rows)}" for title, rows in sections.items())


def _table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}".rstrip() for name, value in rows)


def _version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _versions() -> list[tuple[str, str]]:
    return [
        ("jdkd", __version__),
        ("python", f"{platform.python_version()} ({platform.system()} {platform.machine()})"),
        ("torch", torch.__version__),
        ("CUDA of torch", torch.version.cuda or "none, a CPU build"),
        *((package, _version_of(package) or "not installed") for package in _PACKAGES),
        *((package, version) for package in _ON_REQUEST if (version := _version_of(package))),
    ]


def _devices() -> list[tuple[str, str]]:
    rows = [("cpu", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")]
    if not torch.cuda.is_available():
        return [*rows, ("cuda", "no device is visible")]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        text = (
            f"{device.name}, sm_{device.major}{device.minor}, {device.multi_processor_count} SMs, "
            f"{device.total_memory / 2**30:.0f} GiB"
        )
        rows.append((f"cuda:{index}", text))
    return rows


def _build() -> list[tuple[str, str]]:
    info = _ext.build_info()
    if info is None:
        return [("missing", _ext.why_missing() or "")]
    return [
        ("torch", f"{info['torch']}; serves {'.'.join(map(str, _ext.OLDEST_TORCH))} and later, and every Python"),
        ("CUDA", info["cuda"] or "none: built without a CUDA toolkit, CPU operators only"),
        ("architectures", " ".join(info["arch_list"]) or "none"),
        ("compiler", info["compiler"]),
        ("CPU operators", " ".join(info["cpu_ops"]) or "none"),
        ("CUDA operators", " ".join(info["cuda_ops"]) or "none"),
    ]


def _variables() -> list[tuple[str, str]]:
    return [(name, f"{os.environ.get(name) or '(unset)'}  {meaning}") for name, meaning in _VARIABLES.items()]


def load_operators() -> list[ModuleType]:
    """Imports every file of operators, which registers their backends, and returns them."""
    package = importlib.import_module("jdkd.ops")
    files = [f"{package.__name__}.{file.name}" for file in pkgutil.iter_modules(package.__path__)]
    return [importlib.import_module(file) for file in files]


def _operators() -> list[tuple[str, str]]:
    modules = load_operators()
    rows = []
    for op in _backend.ops():
        reasons = _backend.explain(op)
        for backend, missing in _backend.available(op).items():
            state = missing or "available"
            rows.append((f"{op} / {backend}", f"{state}; {reasons[backend]}" if reasons[backend] else state))
    return rows + [row for module in modules for row in _forms(module)] or [("none", "no operator is registered")]


def _choices() -> list[tuple[str, str]]:
    rows = [
        (f"{op} / {form} on {device}", f"{backend}: {why}")
        for op in _backend.ops()
        for device in devices()
        for form in _backend.forms(op)
        for backend, why in [_backend.choice(op, form, device, torch.float32)]
    ]
    return [*rows, ("accelerate", ACCELERATE)]


def devices() -> list[torch.device]:
    """Returns: the CPU, and every GPU that is visible."""
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]


def _tuned_regions() -> list[tuple[str, str]]:
    """What `jdkd tune` found on each device, and the regions in which a choice comes from there."""
    rows = []
    for device in devices():
        found = [(table, *row) for table, regions in _tuned.regions(device).items() for row in regions.items()]
        others = [(table, name, region.path) for table, name, region in found if region.path != region.default]
        text = f"{len(found)} regions timed, {len(others)} of them not by default; {_tuned.file_of(device)}"
        rows.append((str(device), text if found else "nothing was timed: `jdkd tune` does"))
        for table, name, path in others:
            rows.append((f"{table} on {device}", f"{path} for {name}, {_tuned.told(table, name, device)}"))
    return rows


def _forms(module: ModuleType) -> list[tuple[str, str]]:
    """The forms or kernels by which an operator is computed, where it has several: the first that takes a call."""
    op, _, table = module.__name__.rpartition(".")[2].rpartition("_")
    rows = getattr(module, table.upper(), ()) if table in ("forms", "kernels") else ()
    return [(f"{op}: {row.name}", f"{row.when} ({row.why})") for row in rows]


if __name__ == "__main__":
    print(report())
