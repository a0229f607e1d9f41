"""What every elastic layer holds: the part of it that is active, and since when.

Activation checkpointing runs a forward again inside the backward pass, where a layer would run the subnet active by
then. Shapes cannot reveal it: two lists of equal length give equal shapes, and the reentrant form compares nothing. So
layers note when their subnet was set, see :mod:`jdkd.nn.subnet_epoch`. Outside a backward pass this costs one or two
reads of thread-local state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, overload

import torch
from torch import Tensor, nn

from jdkd.errors import InputError
from jdkd.nn.subnet_epoch import SubnetEpoch
from jdkd.ops.active_channels import Channels, active_part, on_device

Plain = TypeVar("Plain", bound=nn.Module)


class Record(NamedTuple):
    """What is active in a layer: immutable, and replaced as a whole."""

    given: tuple  # as it was set; lists in host memory where the user gave them so
    active: Any  # a layer's own named tuple: the same with its lists beside the weights
    since: SubnetEpoch
    traced: tuple | None = None  # the same with tensors whose lengths are the counts, where compile_elastic wants them


class Elastic(nn.Module):
    """A layer of which a part is active; what a part is, subclasses say, as a named tuple."""

    _record: Record
    part: Callable[..., Any]  # reads what set_active is given
    set_active: Callable[..., None]
    export: Callable[..., nn.Module]
    _in_regions = False  # whether compile_elastic compiles what runs this layer

    def _put(self, given: tuple, since: SubnetEpoch | None = None, moved: dict[tuple, Tensor] | None = None) -> None:
        """Replaces what is active; what stays the same keeps its date, unless one is given.

        ``moved`` collects the lists that were brought to a device, so that layers of one group share them.
        """
        before = vars(self).get("_record")
        epoch = since or SubnetEpoch.current(() if before is None else (before.since,))
        if since is None and epoch.recomputation is None and before is not None and same(before.given, given):
            return
        with torch.inference_mode(False):  # where tensors would be made that no backward pass can save
            given = type(given)(*(_lasting(part) for part in given))
            active = self._beside_the_weights(given, {} if moved is None else moved)
            self._record = Record(given, active, epoch, self._traced(active) if self._in_regions else None)

    def _activate(self, *given: Any) -> None:
        """What a layer's own ``set_active`` does: reads what it is given, and makes that the active part."""
        try:
            part = self.part(*given)
        except InputError as error:
            raise InputError(f"{type(self).__name__}.set_active: {error}") from None
        self._put(part)

    def _now(self) -> Any:
        """What a forward uses.

        Raises:
            InputError: in a recomputation, unless it was surely set before the forward that is recomputed.
        """
        record = self._record
        if torch.compiler.is_compiling():
            return record.active if record.traced is None else self._in_graph(record.traced)
        if torch._C._current_graph_task_id() == -1:
            record.since.observe()
        else:
            self._check_age(record.since)
        return record.active

    def _traced(self, active: Any) -> Any:
        """What is active, with index tensors for its channels, leading ones too."""
        return type(active)(*(self._traced_index(part) if isinstance(part, Channels) else part for part in active))

    def _traced_index(self, channels: Channels) -> Tensor:
        """Active channels as ``[count]`` int64 beside the weights, of a length that compilers take for a symbol."""
        index = on_device(channels.index, self._home())
        if index is None:
            index = torch.arange(channels.count, device=self._home())
        index = index.detach()  # no two layers hold one object, as compilers guard that too
        torch._dynamo.maybe_mark_dynamic(index, 0)
        return index

    def _in_graph(self, traced: Any) -> Any:
        """What a forward uses in a graph whose symbols are the lengths of ``traced``."""
        return type(traced)(*(Channels(part.shape[0], part) if isinstance(part, Tensor) else part for part in traced))

    def _check_age(self, since: SubnetEpoch) -> None:
        if since.is_of_forward():
            return
        if since.is_of_one_thread() or since.recomputation is not None:
            when, remedy = "after the checkpointed forward", "run backward before the next set_subnet"
        else:
            when = "in another thread, and perhaps after the checkpointed forward"
            remedy = "run set_subnet, forward and backward in one thread"
        raise InputError(
            f"{type(self).__name__}: its subnet was set {when} that is being recomputed, and is another one perhaps; "
            f"{remedy}, or use jdkd.nn.checkpoint, which brings back the subnet of the forward"
        )

    def _beside_the_weights(self, given: tuple, moved: dict[tuple, Tensor]) -> tuple:
        listed = [isinstance(part, Channels) and part.index is not None for part in given]
        if not any(listed):
            return given
        home = self._home()
        if home is None or home.type == "meta":  # where lists would lose what they hold
            return given

        def at_home(part: Channels) -> Channels:
            key = id(part.index), home
            if key not in moved:
                moved[key] = on_device(part.index, home)
            return Channels(part.count, moved[key])

        return type(given)(*(at_home(part) if far else part for part, far in zip(given, listed, strict=True)))

    def _home(self) -> torch.device | None:
        tensors = (*self._parameters.values(), *self._buffers.values())
        return next((tensor.device for tensor in tensors if tensor is not None), None)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        home, lists = self._home(), (part.index for part in self._record.active if isinstance(part, Channels))
        if any(index is not None and index.device != home for index in lists):  # another tensor was assigned
            self._put(self._record.given, self._record.since)

    def _apply(self, fn: Callable, recurse: bool = True) -> Elastic:
        super()._apply(fn, recurse)
        self._put(self._record.given, self._record.since)
        return self

    def __getstate__(self) -> dict[str, Any]:  # of copies and pickles, which nobody compiles and no forward has run
        state = {name: value for name, value in super().__getstate__().items() if name != "_in_regions"}
        given = self._record.given
        kept = type(given)(*(_Listed.of(part) if isinstance(part, Channels) else part for part in given))
        return state | {"_record": kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        kept = state["_record"]
        super().__setstate__({name: value for name, value in state.items() if name != "_record"})
        given = type(kept)(*(part.channels() if isinstance(part, _Listed) else part for part in kept))
        self._put(given, SubnetEpoch({}))

    def __prepare_scriptable__(self) -> Any:  # what torch.jit.script asks for
        raise InputError(
            f"torch.jit.script cannot compile {type(self).__name__}, whose active part changes; script what "
            "jdkd.nn.export(model) gives, or use torch.jit.trace or torch.export for the active subnet"
        )


class _Listed(NamedTuple):
    """Channels in a pickle, where a list in host memory is no tensor: no ``map_location`` moves it."""

    count: int
    index: tuple[int, ...] | Tensor | None

    @classmethod
    def of(cls, channels: Channels) -> _Listed:
        count, index = channels
        return cls(count, tuple(index.tolist()) if index is not None and index.device.type == "cpu" else index)

    def channels(self) -> Channels:
        if isinstance(self.index, tuple):
            return Channels(self.count, torch.tensor(self.index, dtype=torch.int64, device="cpu"))
        return Channels(*self)


def _lasting(part: Any) -> Any:
    """A part whose list, if it has one, was not made in inference mode."""
    if isinstance(part, Channels) and part.index is not None and part.index.is_inference():
        return Channels(part.count, part.index.clone())
    return part


def same(a: tuple, b: tuple) -> bool:
    """Whether two parts are known to be the same without a device synchronisation."""
    return type(a) is type(b) and all(_same_entry(p, q) for p, q in zip(a, b, strict=True))


def _same_entry(p: Any, q: Any) -> bool:
    if not isinstance(p, Channels) or not isinstance(q, Channels):
        return p == q
    if p.index is None or q.index is None or p.index is q.index:
        return p.count == q.count and p.index is q.index
    on_host = p.index.device.type == q.index.device.type == "cpu"
    return on_host and torch.equal(p.index, q.index)


@overload
def part_of(vector: Tensor, channels: Channels) -> Tensor: ...
@overload
def part_of(vector: Tensor | None, channels: Channels) -> Tensor | None: ...
def part_of(vector: Tensor | None, channels: Channels) -> Tensor | None:
    """The active part of a vector that may be missing."""
    return None if vector is None else active_part(vector, channels)


def active_over_all(layer: Any, inputs: int, outputs: int) -> str:
    """How many channels of a layer are active, for its repr."""
    return f"active={layer.active_in_channels}/{inputs}->{layer.active_out_channels}/{outputs}, "


def filled(plain: Plain, source: nn.Module, **tensors: Tensor | None) -> Plain:
    """Gives a layer built without memory copies of ``tensors``, and the modes of its source."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        copy = tensor.detach().clone(memory_format=torch.contiguous_format)
        if name in plain._parameters:
            copy = nn.Parameter(copy, requires_grad=getattr(source, name).requires_grad)
        setattr(plain, name, copy)
    return plain.train(source.training)
