"""Knowledge distillation, pruning and architecture search of object detectors, with fast kernels.

``import jdkd`` needs only torch. Its packages are imported when they are first named:
``jdkd.functional.pkd_loss``, ``jdkd.nn.PKDLoss``, ``jdkd.detect.detector`` and so on.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# In a bare checkout or an editable install kernels/ lies beside this package; in a wheel it lies inside. It alone is
# made known: with the checkout's root on __path__, jdkd.tests and jdkd.setup could be imported too.
_BESIDE = Path(__file__).resolve().parents[1] / "kernels"
if _BESIDE.is_dir() and not Path(__file__).with_name("kernels").is_dir():
    _spec = ModuleSpec(f"{__name__}.kernels", None, is_package=True)
    _spec.submodule_search_locations = [str(_BESIDE)]
    kernels = sys.modules[_spec.name] = module_from_spec(_spec)

_PACKAGES = (
    "data",
    "detect",
    "distill",
    "env",
    "errors",
    "experimental",
    "export",
    "functional",
    "graph",
    "latency",
    "morph",
    "nn",
    "notices",
    "ops",
    "patch",
    "pool",
    "reference",
    "report",
    "rewrite",
    "search",
    "testing",
    "train",
)


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PACKAGES})
