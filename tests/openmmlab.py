"""Stubs of OpenMMLab's registries, which this project does not depend on, as packages that can be imported."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Registration refuses a name that is taken, and look-up goes up to the parents, as in mmengine 0.10.
MMENGINE = """
import importlib

class Registry:
    def __init__(self, name, parent=None, scope="mmengine"):
        self.name, self.parent, self.scope, self._module_dict = name, parent, scope, {}

    @property
    def module_dict(self):
        return self._module_dict

    def import_from_location(self):
        importlib.import_module(f"{self.scope}.models")

    def register_module(self, name=None, force=False, module=None):
        if not isinstance(force, bool):
            raise TypeError("force must be a boolean")
        def register(module):
            key = name or module.__name__
            if not force and key in self._module_dict:
                raise KeyError(f"{key} is already registered in {self.name}")
            self._module_dict[key] = module
            return module
        return register(module) if module is not None else register

    def get(self, key):
        found = self._module_dict.get(key)
        return self.parent.get(key) if found is None and self.parent else found

    def build(self, cfg):
        return self.get(cfg["type"])(**{name: value for name, value in cfg.items() if name != "type"})

MODELS = Registry("model")
"""
MMRAZOR = """
from mmengine.registry import MODELS, Registry

MODELS = Registry("model", MODELS, "mmrazor")
"""
PUBLIC_LOSS = """
from mmrazor.registry import MODELS

@MODELS.register_module()
class PKDLoss:
    theirs = True
"""
THEIRS = {
    "mmengine": {"registry.py": MMENGINE, "models.py": ""},
    "mmrazor": {
        "registry.py": MMRAZOR,
        "models.py": PUBLIC_LOSS,
    },
}


@contextmanager
def installed(folder: Path, *packages: str) -> Iterator[None]:
    """Puts the named packages, and no others of theirs, on the path; jdkd.patch is imported afresh inside."""
    for package, files in THEIRS.items():
        (folder / package).mkdir()
        missing = f"raise ImportError('No module named {package}')"
        (folder / package / "__init__.py").write_text("" if package in packages else missing)
        for name, source in files.items():
            (folder / package / name).write_text(source)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    _forget()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        _forget()


def _forget() -> None:
    for name in list(sys.modules):
        if name.split(".")[0] in THEIRS or name in ("jdkd.patch", "jdkd.patch.losses"):
            del sys.modules[name]
