"""The subnet belongs to a forward: what elastic layers hold, and how a recomputation finds it changed.

Activation checkpointing runs a forward again inside the backward pass, where a layer meets the subnet that is active
by then. Shapes do not tell: two lists of equal length give equal shapes, and the reentrant form compares nothing.
Autograd numbers its nodes in the order of their creation, so a layer notes the number at which its subnet was set. In
a recomputation the node that autograd is at was created with the forward, by either form of checkpointing: if its
number is the smaller one, the subnet is younger than the forward. Outside a backward pass this costs one look at a
thread-local number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import checkpoint as torch_checkpoint

from jdkd.errors import InputError
from jdkd.ops.active_channels import Channels, on_device


class Moment(NamedTuple):
    """When something was set: autograd's next number, and the recomputation it was set in, if any."""

    sequence: int
    recomputation: tuple[int, int] | None  # graph task and node


class Record(NamedTuple):
    """What is active in a layer: immutable, and replaced as a whole."""

    given: tuple  # as it was set; lists in host memory where the user gave them so
    active: tuple  # the same with its lists beside the weights
    since: Moment


def now() -> Moment:
    """Returns: the present moment of this thread."""
    return Moment(torch._C._autograd._get_sequence_nr(), _recomputation())


def _recomputation() -> tuple[int, int] | None:
    task = torch._C._current_graph_task_id()
    return None if task == -1 else (task, torch._C._current_autograd_node()._sequence_nr())


class Elastic(nn.Module):
    """A layer of which a part is active; what a part is, subclasses say, as a named tuple."""

    _record: Record

    def _put(self, given: tuple, since: Moment | None = None, moved: dict[tuple, Tensor] | None = None) -> None:
        """Replaces what is active; what stays the same keeps its date, unless one is given.

        ``moved`` collects the lists that were brought to a device, so that layers of one group share them.
        """
        moment = since or now()
        if (
            since is None
            and moment.recomputation is None
            and "_record" in vars(self)
            and same(self._record.given, given)
        ):
            return
        self._record = Record(given, self._beside_the_weights(given, {} if moved is None else moved), moment)

    def _now(self) -> Any:
        """What a forward uses.

        Raises:
            InputError: in a recomputation, if it was set after the forward that is recomputed.
        """
        record = self._record
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            self._check_age(record.since)
        return record.active

    def _check_age(self, since: Moment) -> None:
        here = _recomputation()
        if since.recomputation == here or (since.recomputation is None and since.sequence <= here[1]):
            return
        raise InputError(
            f"{type(self).__name__}: its subnet was set after the checkpointed forward that is being recomputed, and "
            "is another one perhaps; run backward before the next set_subnet, or use jdkd.nn.checkpoint, which brings "
            "back the subnet of the forward"
        )

    def _beside_the_weights(self, given: tuple, moved: dict[tuple, Tensor]) -> tuple:
        listed = [isinstance(part, Channels) and part.index is not None for part in given]
        if not any(listed):
            return given
        tensors = (*self._parameters.values(), *self._buffers.values())
        home = next((tensor.device for tensor in tensors if tensor is not None), None)
        if home is None:
            return given

        def at_home(part: Channels) -> Channels:
            key = id(part.index), home
            if key not in moved:
                moved[key] = on_device(part.index, home)
            return Channels(part.count, moved[key])

        return type(given)(*(at_home(part) if far else part for part, far in zip(given, listed, strict=True)))

    def _apply(self, fn: Callable, recurse: bool = True) -> Elastic:
        super()._apply(fn, recurse)
        given, _, since = self._record
        self._put(given, since)
        return self


def same(a: tuple, b: tuple) -> bool:
    """Whether two parts are known to be the same without making the host wait."""
    return type(a) is type(b) and all(_same_entry(p, q) for p, q in zip(a, b, strict=True))


def _same_entry(p: Any, q: Any) -> bool:
    if not isinstance(p, Channels) or not isinstance(q, Channels):
        return p == q
    if p.index is None or q.index is None or p.index is q.index:
        return p.count == q.count and p.index is q.index
    on_host = p.index.device.type == q.index.device.type == "cpu"
    return on_host and torch.equal(p.index, q.index)


class Snapshot:
    """The subnet of a model at one moment, to be brought back for the length of a ``with``.

    Args:
        model: holds the elastic layers; and modules whose tuple ``depths`` says how many of their blocks run.
    """

    def __init__(self, model: nn.Module):
        modules = list(model.modules())
        self._kept = [(module, "_record", module._record) for module in modules if isinstance(module, Elastic)]
        self._kept += [(m, "depths", m.depths) for m in modules if isinstance(getattr(m, "depths", None), tuple)]
        self._before: list[list[Any]] = []

    def __enter__(self) -> None:
        self._before.append([getattr(module, name) for module, name, _ in self._kept])
        for module, name, value in self._kept:
            setattr(module, name, value)

    def __exit__(self, *_: object) -> None:
        for (module, name, _), value in zip(self._kept, self._before.pop(), strict=True):
            setattr(module, name, value)


def checkpoint(
    function: Callable[..., Any],
    *inputs: Any,
    model: nn.Module | None = None,
    use_reentrant: bool = False,
    **options: Any,
) -> Any:
    """Runs a function without keeping its activations; it is recomputed with the subnet of this forward.

    ``torch.utils.checkpoint.checkpoint`` is safe too, but raises where a subnet was set between forward and backward.

    Args:
        function: what to run, a module or a function of one.
        inputs: its arguments.
        model: holds every elastic layer that runs; ``function`` itself if it is a module.
        use_reentrant: which of torch's two forms.
        options: for ``torch.utils.checkpoint.checkpoint``.

    Returns:
        What the function returns.

    Raises:
        InputError: if there is no telling which layers run.
    """
    model = function if model is None else model
    if not isinstance(model, nn.Module):
        raise InputError(
            f"checkpoint: {function!r} is no module; give the model whose elastic layers it runs as model="
        )
    subnet = Snapshot(model)

    def run(*inputs: Any) -> Any:
        with subnet:
            return function(*inputs)

    return torch_checkpoint.checkpoint(run, *inputs, use_reentrant=use_reentrant, **options)
