"""Where the levels of features come out of a detector, whoever made it; the one place that knows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

NECK, BACKBONE = "neck", "backbone"  # the words of the field; where both are there, the neck comes last
SAYS = "pyramid"  # attribute of a detector that says it itself, a dotted path; adopted ones do


def neck_of(model: nn.Module) -> str | None:
    """Path of the module that returns a detector's levels of features; None without one, or if there are several."""
    found = holders(model)
    if len(found) != 1:
        return None
    prefix, holder = found[0]
    return f"{prefix}.{_own(holder)}".lstrip(".")


def holders(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The outermost modules with a neck or a backbone of their own, and where they are."""
    return outermost(model, lambda module: _own(module) is not None)


def outermost(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[tuple[str, nn.Module]]:
    """Path and module of all that are wanted and are in no other such."""
    found: list[tuple[str, nn.Module]] = []
    waiting = [("", model)]
    while waiting:
        prefix, module = waiting.pop(0)
        if not wanted(module):
            waiting += [(f"{prefix}.{name}".lstrip("."), child) for name, child in module.named_children()]
        elif all(module is not other for _, other in found):
            found.append((prefix, module))
    return found


def backbone_of(module: nn.Module) -> nn.Module | None:
    """A module's own backbone, a child of that name."""
    child = getattr(module, BACKBONE, None)
    return child if isinstance(child, nn.Module) else None


def trunk_of(model: nn.Module) -> list[nn.Module]:
    """The backbone and the neck of a detector, without its heads; empty if there is no telling."""
    path = neck_of(model)
    if path is None:
        return []
    neck, names = model.get_submodule(path), path.split(".")
    chain = [model.get_submodule(".".join(names[:count])) for count in range(len(names))]
    beside = next((found for found in map(backbone_of, reversed(chain)) if found is not None), neck)
    return [neck] if beside is neck else [beside, neck]


def head_of(model: nn.Module) -> str | None:
    """Path of a head that is called with a list of levels which no module returns; None where there is none.

    Ultralytics' models and those before them are a sequence of layers that say in ``f`` which others they read, and the
    last one, the head, reads several.
    """
    for path, layers in model.named_modules():
        if isinstance(layers, nn.Sequential) and len(layers):
            sources = getattr(layers[-1], "f", None)
            if isinstance(sources, list | tuple) and len(sources) > 1:
                return f"{path}.{len(layers) - 1}".lstrip(".")
    return None


def run_until(module: nn.Module, call: Callable[[], Any], *, given: bool = False) -> Any:
    """What a module returns when ``call`` reaches it, or what it is ``given``; nothing runs after that.

    Raises:
        NotReached: the call went by without it.
    """
    handle = module.register_forward_pre_hook(_stop_before) if given else module.register_forward_hook(_stop)
    try:
        call()
    except _Returned as returned:
        if returned.module is not module:
            raise
        return returned.value
    finally:
        handle.remove()
    raise NotReached


class NotReached(Exception):
    """A call went by without the module that it was to be stopped at."""


class _Returned(Exception):
    def __init__(self, module: nn.Module, value: Any) -> None:
        super().__init__("the module has returned")
        self.module, self.value = module, value


def _stop(module: nn.Module, inputs: tuple[Any, ...], value: Any) -> None:
    raise _Returned(module, list(value) if isinstance(value, Iterator) else value)


def _stop_before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    raise _Returned(module, inputs[0] if inputs else None)


def _own(module: nn.Module) -> str | None:
    """Path, in a module, of what returns its levels."""
    said = vars(module).get(SAYS)
    if isinstance(said, str) and said and has_module(module, said):
        return said
    return next((name for name in (NECK, BACKBONE) if isinstance(getattr(module, name, None), nn.Module)), None)


def has_module(module: nn.Module, path: str) -> bool:
    """Whether a module has a submodule of that path; ``""`` is the module itself."""
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True
