"""From an architecture to a module."""

from __future__ import annotations

import copy
import importlib
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from jdkd.errors import InputError, said
from jdkd.nn.unwrapping import unwrapped
from jdkd.rewrite.architecture import Architecture, set_architecture
from jdkd.rewrite.blocks import set_children
from jdkd.rewrite.channels import renumber, taken, tensors_by_name

REGISTERED = frozenset(vars(nn.Module()))  # attributes that torch gives a module, its tensors and modules among them
COUNTS = "_pre_nms_top_n", "_post_nms_top_n"  # regions that torchvision's RPN proposes, of a level and of an image


def build(architecture: Architecture, device: torch.device | str = "cpu") -> nn.Module:
    """Builds the module that an architecture describes, with fresh weights.

    Args:
        architecture: who builds it, and what was changed since.
        device: where to. ``"meta"`` makes parameters without memory, to be filled by
            :func:`jdkd.rewrite.load_architecture`; buffers, and tensors that are neither, are real all the same.

    Returns:
        The module. Fresh weights are the builder's own, the first ones of each dimension that was cut; where one has
        grown they begin again.

    Raises:
        InputError: the builder cannot be imported, raises or returns no module, or what was changed is not in it.
    """
    empty = torch.device(device).type == "meta"
    make = _without_weights if empty else _private
    model = make(architecture.builder, architecture.arguments)
    for name, order in architecture.blocks.items():
        arrange_children(model, name, order)
    reshape(model, architecture.shapes)
    for name, value in architecture.attributes.items():
        set_attribute(model, name, value)
    set_architecture(model, architecture)
    return model if empty else model.to(device)


def call(builder: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The module that a builder returns, without torch's wrappers.

    Raises:
        InputError: it cannot be imported, it raised, or it returned something else, or what cannot be looked into.
    """
    function = imported(builder)
    try:
        made = function(**arguments)
    except InputError:
        raise
    except Exception as error:  # whatever a builder of anyone's raises
        raise InputError(f"the builder {builder} with {_shown(arguments)} raised {said(error)}.") from error
    if not isinstance(made, nn.Module):
        raise InputError(f"{builder!r} returned a {type(made).__name__}; it must return a torch.nn.Module.")
    made = unwrapped(made)
    if any(isinstance(module, torch.jit.ScriptModule) for module in made.modules()):
        raise InputError(f"{builder!r} returned a scripted or traced module; return the one that it was made from.")
    if any(is_lazy(tensor) for tensor in (*made.parameters(), *made.buffers())):
        raise InputError(f"{builder!r} returned lazy layers without a size; let it run its module once on an example.")
    return made


def imported(builder: str) -> Callable[..., Any]:
    """What an import path ``"package.module:function"`` names.

    Raises:
        InputError: it cannot be imported, or called.
    """
    module, _, name = builder.partition(":")
    if module.endswith(".py") or "/" in module:
        raise InputError(
            f"{builder!r} names a file; give its module, {Path(module).stem}:{name}, and run in the folder of the file "
            "or put that on PYTHONPATH."
        )
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    remedy = "run where it can be imported: install it, or put its folder on PYTHONPATH"
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            raise InputError(f"{builder!r} names the module {error.name}, which cannot be found; {remedy}.") from None
        raise InputError(f"{builder!r} needs the package {error.name}, which is missing; install it.") from None
    except (AttributeError, ValueError) as error:
        raise InputError(f"{builder!r} cannot be imported ({error}); give package.module:function.") from None
    except Exception as error:  # whatever a module of anyone's raises
        raise InputError(f"{builder!r} cannot be imported: {module} raised {said(error)}.") from error
    if not callable(found):
        raise InputError(f"{builder!r} is a {type(found).__name__}; name a function that returns the model.")
    return found


def _private(builder: str, arguments: Mapping[str, Any]) -> nn.Module:
    """A module that nobody else holds, whatever the builder keeps."""
    with torch.no_grad():
        return copy.deepcopy(call(builder, arguments))


def _without_weights(builder: str, arguments: Mapping[str, Any]) -> nn.Module:
    """A module whose parameters take no memory and no time.

    Only parameters are on the meta device, each from the moment that it is registered: anchors, tables of positions
    and whatever else the builder computes is real, because nobody could say later what it was.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with _parameters_on_meta(), _NoDraws(), torch.no_grad():
                model = call(builder, arguments)
        except InputError:  # it computes with its parameters (torchvision's SSDlite runs its backbone, say)
            return _private(builder, arguments)
        if any(not parameter.is_meta for parameter in model.parameters()) or any(t.is_meta for t in _derived(model)):
            return _private(builder, arguments)  # it keeps its modules, or what it computed of its parameters
        return model


class _NoDraws(TorchFunctionMode):
    """Leaves out what fills a tensor without memory, over which torch takes its time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.normal_ and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Puts every parameter that this thread registers on the meta device; one that is tied stays one."""
    thread, moved = threading.get_ident(), WeakIdKeyDictionary()

    def move(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if type(parameter) is not nn.Parameter or parameter.is_meta or threading.get_ident() != thread:
            return None
        if parameter not in moved:
            moved[parameter] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        return moved[parameter]

    handle = register_module_parameter_registration_hook(cast(Callable[..., None], move))
    try:
        with warnings.catch_warnings():  # a builder that loads weights gets warnings that they go nowhere
            warnings.filterwarnings("ignore", message=".*no-op")
            yield
    finally:
        handle.remove()


def _derived(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that no state dict holds: buffers that are not persistent, and what modules have as attributes."""
    registered = {id(parameter) for parameter in model.parameters()}
    for module in model.modules():
        own = {name: value for name, value in vars(module).items() if name not in REGISTERED}
        leaves = tree_leaves((own, [module._buffers[name] for name in module._non_persistent_buffers_set]))
        objects = [dict(vars(leaf)) for leaf in leaves if hasattr(leaf, "__dict__") and not callable(leaf)]
        for leaf in tree_leaves((leaves, objects)):
            if isinstance(leaf, Tensor) and id(leaf) not in registered:
                yield leaf


def arrange_children(model: nn.Module, name: str, order: Sequence[int]) -> None:
    """Puts the builder's children of a container in another order, without some of them, or with copies."""
    container = _found(model, name, "blocks")
    children = list(container._modules.items())
    if order and max(order) >= len(children):
        raise InputError(
            f"blocks name child {max(order)} of {name!r}, and the builder makes {len(children)} there; give the "
            "architecture the builder that it was made with."
        )
    seen: set[int] = set()
    chosen = []
    for place in order:
        child, block = children[place]
        chosen.append((child, copy.deepcopy(block) if place in seen else block))
        seen.add(place)
    set_children(container, chosen)


def reshape(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Gives tensors of a module that nobody else holds other shapes, in place.

    Raises:
        InputError: there is no such tensor, or it has another number of dimensions.
    """
    tensors, changed = tensors_by_name(model), list[Tensor]()
    for name, shape in shapes.items():
        have = tuple(tensors[name].shape) if name in tensors else None
        if have is None or len(have) != len(shape) or 0 in have:
            raise InputError(
                f"shapes has {name!r} as {list(shape)}, and the builder makes {'none' if have is None else list(have)}"
                "; give the architecture the builder that it was made with."
            )
        others = [dim for dim, wanted in enumerate(shape) if wanted != have[dim]]
        if others:
            gathers = {(name, dim): np.arange(shape[dim]) % have[dim] for dim in others}
            changed += (tensors[name], taken(tensors[name], name, others, gathers, {}))
            exchange(model, *changed[-2:])
    ids = set(map(id, changed))
    for module in model.modules():
        if any(id(tensor) in ids for tensor in (*module._parameters.values(), *module._buffers.values())):
            renumber(module)


def exchange(model: nn.Module, old: Tensor, new: Tensor) -> None:
    """Puts a tensor in the place of another, wherever it is held: in tied modules, and in lists of anyone's."""
    try:
        torch.utils.swap_tensors(old, new)
    except RuntimeError:  # someone has a weak reference to it, as recurrent layers have, which hear of a new attribute
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for name in [name for name, held in table.items() if held is old]:
                    setattr(module, name, new)


def set_attribute(model: nn.Module, name: str, value: Any) -> None:
    """Sets a plain attribute of a module in a model, ``"path.name"``, to a copy; what is a tuple stays one.

    Raises:
        InputError: the model has no such attribute, or it is neither plain nor one of :func:`are_counts`, or is to
            become no such counts.
    """
    owner, _, leaf = name.rpartition(".")
    module = _found(model, owner, "attributes")
    now = getattr(module, leaf, None)
    counted = are_counts(leaf, now)
    if not counted and not isinstance(now, bool | int | float | str | list | tuple):
        raise InputError(
            f"attributes sets {name!r}, and the builder makes {'none' if now is None else f'a {type(now).__name__}'}; "
            "give the architecture the builder that it was made with."
        )
    if counted and not are_counts(leaf, value):
        raise InputError(
            f"attributes sets {name!r} to {value!r:.80}; give how many regions are proposed in training and in "
            'testing, {"training": 2000, "testing": 1000} say.'
        )
    setattr(module, leaf, tuple(value) if isinstance(now, tuple) and isinstance(value, list) else copy.deepcopy(value))


def are_counts(name: str, value: Any) -> bool:
    """Whether an attribute says how many regions an RPN of torchvision's proposes in training and in evaluation.

    It is private, and no plain one, and says what a module does all the same, so it is part of an architecture.
    """
    known = name in COUNTS and isinstance(value, dict) and value.keys() == {"training", "testing"}
    return known and all(type(count) is int and count > 0 for count in value.values())


def _found(model: nn.Module, path: str, what: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise InputError(
            f"{what} names {path!r}, which the builder does not make; give the architecture the builder that it was "
            "made with."
        ) from None


def _shown(arguments: Mapping[str, Any]) -> str:
    listed = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return f"the arguments {listed}"[:200] if listed else "no arguments"
