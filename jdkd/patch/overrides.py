"""What a module runs in place of its own forward, for a while: see :class:`Override` and :class:`Overrides`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from jdkd.ops.transforms import is_looked_into

FORWARD = "forward"


class Override:
    """Runs in place of a module's forward; a deep copy or a pickle of the module has the forward of its class.

    Args:
        module: whose forward it stands for.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.inner: Callable[..., Any] = module.forward
        """What it ran before."""

    def __call__(self, *args: Any, **named: Any) -> Any:
        """Runs; where something looks into the call, to count or follow what is done, what the class says."""
        if is_looked_into() or is_in_torch_dispatch_mode():
            return type(self.module).forward(self.module, *args, **named)
        return self.run(*args, **named)

    def run(self, *args: Any, **named: Any) -> Any:
        """What it does."""
        return self.inner(*args, **named)

    def __deepcopy__(self, memo: dict[int, Any]) -> MethodType:
        return MethodType(type(self.module).forward, copy.deepcopy(self.module, memo))

    def __reduce__(self) -> Any:
        return getattr, (self.module, FORWARD)


class Overrides:
    """The overrides of one acceleration, and how the modules were before."""

    def __init__(self) -> None:
        self._before: list[tuple[nn.Module, Any]] = []

    @property
    def modules(self) -> list[nn.Module]:
        """Those that run something else."""
        return [module for module, _ in self._before]

    def put(self, override: Override) -> None:
        """Lets a module run it from now on."""
        self._before.append((override.module, vars(override.module).get(FORWARD)))
        vars(override.module)[FORWARD] = override

    def remove(self) -> None:
        """Leaves every module as it was."""
        for module, before in reversed(self._before):
            if before is None:
                vars(module).pop(FORWARD, None)
            else:
                vars(module)[FORWARD] = before
        self._before.clear()
