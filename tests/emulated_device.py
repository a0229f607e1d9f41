"""A GPU that is none: tensors that say they are on `cuda:0` and are computed on the CPU.

What it shows is where tensors are: an operator whose tensors are on two devices is refused as CUDA refuses it, a tensor
that is on the GPU has no NumPy form, and code that asks for `device.type == "cuda"` takes that way. What it cannot show
is what a kernel computes there, what is asynchronous, and how long anything takes: events are the host's clock.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # it reads what torch.cuda has as it is imported
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda", 0)
BETWEEN = {"copy_", "_to_copy", "_copy_from", "_copy_from_and_resize"}  # what moves between devices
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}  # its indices may be on the host

ANSWERED = {"_local_scalar_dense", "nonzero", "masked_select", "equal"}  # the host waits for what these say
_waits: list[str] = []


class OnGpu(Tensor):
    """A tensor that says to Python that it is on the GPU; its numbers are in ``held``, on the host.

    To C++ it is on the CPU: autograd runs its nodes on the threads of a device that is there.
    """

    held: Tensor
    device, is_cuda, is_cpu = CUDA, True, False
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGpu:
        known = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        with torch.inference_mode(held.is_inference()):
            made = Tensor._make_wrapper_subclass(cls, held.shape, device=held.device, layout=held.layout, **known)
        made.held = held
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnGpu({self.held!r})"

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, other: OnGpu) -> None:
        torch._C.TensorBase.data.__set__(self, other)
        self.held = other.held

    def get_device(self) -> int:
        return 0

    def new_tensor(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.tensor(*args, **{"dtype": self.dtype, "device": CUDA} | kwargs)

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operator gives, on the device where CUDA would have it."""
    name = func.overloadpacket.__name__
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, OnGpu)]
    here = [each for each in tensors if not isinstance(each, OnGpu) and each.dim() and not hasattr(each, "anywhere")]
    if there and here and name not in BETWEEN and not (name in INDEXED and _may_index(*args)):
        where = ", ".join(f"{[*each.shape]} on {each.device}" for each in tensors)
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got {where}")
    asked = kwargs.get("device")
    on_gpu = bool(there) if asked is None else torch.device(asked).type == "cuda"
    if there and (name == "_to_copy" or name.startswith("new_") or name.endswith("_like")):
        on_gpu = True  # autograd asks for the options of a tensor, which in C++ are the host's
    if name in ("copy_", "_index_put_impl_", "index_put_"):
        on_gpu = isinstance(args[0], OnGpu)
    if there and (name in ANSWERED or (name in INDEXED and _is_masked(args[1]))):
        _waits.append(name)
    wrappers = {id(tensor.held): tensor for tensor in there}
    held = [tree_map(lambda leaf: leaf.held if isinstance(leaf, OnGpu) else leaf, given) for given in (args, kwargs)]
    if asked is not None:
        held[1]["device"] = torch.device("cpu")
    held[1].pop("pin_memory", None)
    out = func(*held[0], **held[1])
    for tensor in there:
        assert tensor.shape == tensor.held.shape, f"{func} changes a shape in place, which is not emulated"

    if name == "zeros" and torch._C._current_graph_task_id() != -1:  # autograd's own, by the options of a tensor
        out.anywhere = True

    def placed(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) in wrappers:
            return wrappers[id(leaf)]
        return OnGpu(leaf) if on_gpu else leaf

    return tree_map(placed, out)


def _may_index(tensor: Tensor, indices: Any, values: Tensor | None = None, *_: Any) -> bool:
    """Whether what is indexed is there, and what is put there too; a number may come from anywhere."""
    return isinstance(tensor, OnGpu) and (values is None or isinstance(values, OnGpu) or not values.dim())


def _is_masked(indices: Any) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, on_gpu: bool) -> Tensor:
        ctx.was = isinstance(tensor, OnGpu)
        held = tensor.held if isinstance(tensor, OnGpu) else tensor
        return OnGpu(held.clone()) if on_gpu else held.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _moved(grads[0], "cuda" if ctx.was else "cpu"), None


def _moved(tensor: Tensor, device: Any, non_blocking: bool = False) -> Tensor:
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu == isinstance(tensor, OnGpu):
        return tensor
    if not (on_gpu and non_blocking):
        _waits.append("to the GPU" if on_gpu else "to the host")
    with torch.utils._python_dispatch._disable_current_modes():
        return _Moved.apply(tensor, on_gpu)


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``Tensor.to``, which in C++ would ask the driver."""
    if args and isinstance(args[0], Tensor):
        args = args[0].device, args[0].dtype, *args[1:]
    copy = kwargs.pop("copy", False)
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    moved = tensor if device is None else _moved(tensor, device, non_blocking)
    kept = {"memory_format": memory_format} if memory_format is not None else {}
    return TO(moved, moved.dtype if dtype is None else dtype, copy=copy, **kept)


TO = Tensor.to


def _on_the_host(function: Any) -> Any:
    """A function of torch that would ask the driver for the device: its result is made on the host, then moved."""

    def called(*args: Any, device: Any = None, **kwargs: Any) -> Any:
        wanted = kwargs.pop("requires_grad", False)
        made = function(*args, **kwargs)
        return (made if device is None else made.to(device)).requires_grad_(wanted)

    return called


def _of_the_host(function: Any, device: str = "cuda", *args: Any, **how: Any) -> Any:
    return function("cpu" if device == "cuda" else device, *args, **how)


class _Event:
    def __init__(self, **_: Any) -> None:
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end.at - self.at)

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class _Stream:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = CUDA

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0

    def wait_stream(self, other: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def synchronize(self) -> None:
        pass


class _Guard(nullcontext):
    """``torch.cuda.device``"""


class _Properties:
    name, uuid, multi_processor_count = "emulated", "emulated", 132
    major, minor, total_memory, L2_cache_size = 9, 0, 140 << 30, 50 << 20


@contextmanager
def waits() -> Iterator[list[str]]:
    """What the host waits for inside: answers of the GPU, and copies that it does not leave to the stream.

    Yields:
        The names of the operators, as they come.
    """
    found: list[str] = []
    before = len(_waits)
    try:
        yield found
    finally:
        found += _waits[before:]


@contextmanager
def emulated_gpu() -> Iterator[torch.device]:
    """Everything inside sees one GPU.

    Yields:
        Its device.
    """
    nothing: Any = lambda *_, **__: None  # noqa: E731
    replaced = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_compiled": lambda: True,
        "_lazy_init": nothing,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": nothing,
        "device": _Guard,
        "synchronize": nothing,
        "empty_cache": nothing,
        "manual_seed": nothing,
        "manual_seed_all": nothing,
        "is_bf16_supported": lambda *_, **__: True,
        "is_current_stream_capturing": lambda: False,
        "get_device_name": lambda *_: _Properties.name,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: _Properties,
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": nothing,
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 1,
        "reset_peak_memory_stats": nothing,
        "current_stream": _Stream,
        "stream": lambda *_: nullcontext(),
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": nothing,
        "get_rng_state_all": lambda: [torch.zeros(16, dtype=torch.uint8)],
        "set_rng_state_all": nothing,
        "Stream": _Stream,
        "Event": _Event,
    }
    with ExitStack() as stack:
        for name, replacement in replaced.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, replacement))
        stack.enter_context(mock.patch.object(torch._C, "_cuda_getDriverVersion", return_value=13000, create=True))
        methods = {
            "to": _to,
            "cpu": lambda tensor, *_, **__: _moved(tensor, "cpu"),
            "cuda": lambda tensor, *_, **__: _moved(tensor, "cuda"),
            "pin_memory": lambda tensor, *_: tensor,
            "record_stream": nothing,
        }
        for name, replacement in methods.items():
            stack.enter_context(mock.patch.object(Tensor, name, replacement))
        for name in ("tensor", "as_tensor"):
            stack.enter_context(mock.patch.object(torch, name, _on_the_host(getattr(torch, name))))
        for name in ("autocast", "is_autocast_enabled", "get_autocast_dtype"):  # for C++ it is the host's
            hosts = partial(_of_the_host, getattr(torch, name))
            stack.enter_context(mock.patch.object(torch, name, hosts))
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)  # a parameter stays the object that it is
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, before)
        # oneDNN's convolutions are none of a GPU's; on one Xeon their gradients of a filter were 4e23 here, at times.
        stack.callback(torch._C._set_mkldnn_enabled, torch._C._get_mkldnn_enabled())
        torch._C._set_mkldnn_enabled(False)
        stack.enter_context(_Mode())
        yield CUDA
