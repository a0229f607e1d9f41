"""A cache of the outputs of modules, valid where nothing that they depend on has changed.

Tensors are known by numbers, each for as long as the tensor's version counter stands still. The same function of the
same numbers makes the same values, so its outputs get the numbers that they had before: what follows a function, or
an activation in place, is known again although those run again. What a function takes from memory or draws at random
is new each time. (Value numbering, as compilers do it: Alpern, Wegman and Zadeck, POPL 1988.)
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import pickle
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from io import BytesIO
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as calls_of_all
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakTensorKeyDictionary

from jdkd.experimental.masked import Swap, swapped


class _Entry(NamedTuple):
    """What a module gave last, at one place of a forward."""

    key: Hashable
    structure: bytes  # of its outputs
    tensors: list[Tensor]
    versions: list[int]

    def holds(self, key: Hashable) -> bool:
        return self.key == key and [tensor._version for tensor in self.tensors] == self.versions


class OutputCache(TorchFunctionMode):
    """Caches the outputs of a model's modules, in forwards that run inside :meth:`of`.

    Args:
        model: in evaluation mode.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._above: dict[nn.Module, set[nn.Module]] = defaultdict(set)  # a module and all that it lies in
        paths = dict(model.named_modules(remove_duplicate=False))
        for path, module in paths.items():
            steps = itertools.accumulate(path.split("."), "{}.{}".format)
            self._above[module].update((model, *(paths[step] for step in steps if step)))
        hooked = {over for m in self._above if _has_hooks(m) for over in self._above[m] if over is not m}
        free = [module for module in self._above if module not in hooked]
        self._forwards = [Swap(vars(m), "forward", functools.partial(self._call, m, m.forward)) for m in free]
        self._numbers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # tensor -> its version and number
        tensors = itertools.chain(model.parameters(), model.buffers())
        self._kinds = {"cpu", "cuda", *(tensor.device.type for tensor in tensors)}  # of devices
        self._fresh = itertools.count()
        self._known: dict[Hashable, list[int]] = {}  # numbers of the outputs of a module, or of a function
        self._entries: dict[tuple[nn.Module, int], _Entry] = {}  # by module and how often it had been called

    @contextlib.contextmanager
    def of(self, parts: Iterable[tuple[nn.Module, Hashable]]) -> Iterator[None]:
        """For one forward.

        Args:
            parts: modules that are not whole, and what tells their part apart from others.
        """
        self._called: Counter[nn.Module] = Counter()
        self._parts: dict[nn.Module, set[Hashable]] = defaultdict(set)
        for module, part in parts:
            for above in self._above[module]:
                self._parts[above].add(part)
        with swapped(self._forwards), self:
            yield

    def clear(self) -> None:
        """Drops every cached output."""
        self._entries.clear()

    def _call(self, module: nn.Module, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        place = module, self._called[module]
        self._called[module] += 1
        part = frozenset(self._parts.get(module, ()))
        key = self._key((module, part), args, kwargs)
        entry = self._entries.pop(place, None)
        if entry is not None and entry.holds(key):
            self._entries[place] = entry
            self._number(key, entry.tensors)
            return unflatten(entry.structure, entry.tensors)
        del entry  # before memory is needed
        output = forward(*args, **kwargs)
        made = flatten(output)
        if key is not None and made is not None:
            unwritten = self._key((module, part), args, kwargs) == key
            if unwritten and not _may_alias(made[1], flatten((args, kwargs))[1]):
                self._entries[place] = _Entry(key, *made, [tensor._version for tensor in made[1]])
            self._number(key, made[1])
        return output

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ == "__get__":  # of an attribute
            return func(*args, **kwargs)
        key = self._key(func, args, kwargs) if _is_determined(func.__name__) else None
        output = func(*args, **kwargs)
        made = flatten(output)
        if key is not None and made is not None:
            self._number(key, made[1])
        return output

    def _key(self, function: Hashable, args: tuple, kwargs: dict[str, Any]) -> Hashable:
        """What an output depends on; None if that cannot be told."""
        asked = flatten((args, kwargs))
        return asked and (function, asked[0], self._autocast(), tuple(map(self._number_of, asked[1])))

    def _autocast(self) -> Hashable:
        if not torch._C._is_any_autocast_enabled():
            return None
        return tuple(torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in self._kinds)

    def _number_of(self, tensor: Tensor) -> int:
        version, number = self._numbers.get(tensor, (None, 0))
        if version != tensor._version:
            number = next(self._fresh)
            self._numbers[tensor] = tensor._version, number
        return number

    def _number(self, key: Hashable, tensors: Sequence[Tensor]) -> None:
        """Gives outputs the numbers that they had before."""
        known = self._known.setdefault(key, [self._number_of(tensor) for tensor in tensors])
        for tensor, number in zip(tensors, known, strict=True):
            self._numbers[tensor] = tensor._version, number


def _may_alias(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> bool:
    """Whether a write into an output could be one into an input; then no output of before can stand for it."""
    try:
        with torch._C.DisableTorchFunction():
            taken = {_memory(tensor) for tensor in inputs}
            return any(_memory(tensor) in taken for tensor in outputs)
    except NotImplementedError:
        return True


def _memory(tensor: Tensor) -> int:
    if is_traceable_wrapper_subclass(tensor):  # it holds other tensors; a sparse one raises by itself
        raise NotImplementedError
    return tensor.untyped_storage()._cdata


@functools.cache
def _is_determined(name: str) -> bool:
    """Whether the outputs of a function follow from its inputs; those of memory and of chance do not."""
    name = name.partition(".")[0]  # of an overload
    taken, drawn = ("empty", "resize"), ("dropout", "gumbel", "fractional_max_pool")
    if name == "new" or any(word in name for word in taken + drawn):
        return False
    operator = getattr(torch.ops.aten, name, None)
    if not isinstance(operator, torch._ops.OpOverloadPacket):
        return True
    tags = (getattr(operator, overload).tags for overload in operator.overloads())
    return not any(torch.Tag.nondeterministic_seeded in of_one for of_one in tags)


def _has_hooks(module: nn.Module) -> bool:
    everywhere = calls_of_all._global_forward_hooks or calls_of_all._global_forward_pre_hooks
    return bool(everywhere or module._forward_hooks or module._forward_pre_hooks)


class _Flattener(pickle.Pickler):
    """Writes containers by value, and tensors by their place in a list."""

    def __init__(self, file: BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> int | None:
        if isinstance(value, Tensor) and not value.is_inference():
            self.tensors.append(value)
            return len(self.tensors) - 1
        if isinstance(value, Tensor | nn.Module):
            raise pickle.PicklingError(f"nothing tells when a {type(value).__name__} was written")
        return None


class _Rebuilder(pickle.Unpickler):
    def __init__(self, structure: bytes, tensors: Sequence[Tensor]) -> None:
        super().__init__(BytesIO(structure))
        self.persistent_load = tensors.__getitem__


def flatten(value: Any) -> tuple[bytes, list[Tensor]] | None:
    """Parts what a function takes or gives into its structure and its tensors; None where that cannot be done."""
    flattener = _Flattener(file := BytesIO())
    try:
        with torch._C.DisableTorchFunction():
            flattener.dump(value)
    except (pickle.PicklingError, AttributeError, TypeError):
        return None
    return file.getvalue(), flattener.tensors


def unflatten(structure: bytes, tensors: Sequence[Tensor]) -> Any:
    """The value that :func:`flatten` parted, in containers of its own."""
    return _Rebuilder(structure, tensors).load()
