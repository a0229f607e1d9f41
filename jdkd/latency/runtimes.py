"""What runs a detector when it is timed: :class:`Runtime`, and torch's own three."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from jdkd.detect.prepared import Prepared
from jdkd.detect.proposals import steady_nms
from jdkd.errors import InputError, said
from jdkd.latency.calls import TimedCall, on_device
from jdkd.latency.precision import in_precision, unknown_dtype
from jdkd.latency.replaying import Replayed
from jdkd.nn.necks import neck_of

Batches = Sequence[Sequence[Tensor]]
"""Lists of images ``[3, H, W]`` on the host, uint8 or float in 0..1."""


@dataclass(frozen=True)
class Artefact:
    """A detector in the form in which a runtime runs it: what is timed, and what is scored.

    Args:
        detector: from images ``[3, H, W]`` in 0..1 on the device to detections, as torchvision's do.
        model_only: runs prepared batch i, without resizing and copies; None where there is no telling them apart.
        inside: what the two modes hold, in words.
        facts: what else a record says of it, such as the SHA-256 of an exported file.
        from_host: whether the detector takes images from the host, and what runs it moves them, unseen by torch.
        reopen: makes the same anew, elsewhere in memory; None where that takes long or changes nothing.
    """

    detector: nn.Module
    model_only: TimedCall | None
    inside: dict[str, str]
    facts: dict[str, Any] = field(default_factory=dict)
    from_host: bool = False
    reopen: Callable[[], Artefact] | None = None

    def images_on(self, device: torch.device) -> torch.device:
        """Where the detector takes images that it is timed with on a device."""
        return torch.device("cpu") if self.from_host else device


class Runtime(Protocol):
    """Something that runs detectors.

    Args:
        name: as the command line and records call it.
        version: of what runs the detector.
    """

    name: str

    @property
    def version(self) -> str: ...

    def why_not(self, device: torch.device, dtype: str) -> str | None:
        """One clause that says why it cannot run here; None where it can."""

    def prepare(self, model: nn.Module, batches: Batches, device: torch.device, dtype: str) -> Artefact:
        """Makes a detector ready to be timed on batches; whatever is compiled or captured is so afterwards.

        Args:
            model: as :func:`jdkd.latency.fuse_for_inference` returns it, in fp32; left as it was.
            batches: what it will be timed on.
            device: where.
            dtype: `float32`, `float16` or `bfloat16`, of weights and features.

        Raises:
            InputError: this detector cannot be run so.
        """

    def steady_nms(self, counts: Sequence[int]) -> AbstractContextManager[None]:
        """Lets what is prepared and run meanwhile keep the boxes of the best scores, as many as it may, unsuppressed.

        Args:
            counts: how many each NMS keeps where that is no fixed number, see :func:`jdkd.detect.proposals.steady_nms`.
        """


HOST_TO_HOST = "copy to the device, resize, normalise, network, NMS, copy to the host"
BATCH_TO_BOXES = "network and NMS, on a batch that was resized and normalised before"


class OfTorch:
    """What all runtimes of torch have in common."""

    version = torch.__version__

    def why_not(self, device: torch.device, dtype: str) -> str | None:
        return unknown_dtype(dtype)

    def steady_nms(self, counts: Sequence[int]) -> AbstractContextManager[None]:
        return steady_nms(counts)


class Eager(OfTorch):
    """torch as it is."""

    name = "eager"

    def prepare(self, model: nn.Module, batches: Batches, device: torch.device, dtype: str) -> Artefact:
        return _of_torch(in_precision(model.to(device), dtype), batches, device)


class Compiled(OfTorch):
    """The backbone and the neck through ``torch.compile``; what follows has shapes that depend on detections: eager.

    Args:
        backend: of ``torch.compile``.
    """

    name = "compile"

    def __init__(self, backend: str = "inductor") -> None:
        self._backend = backend

    def prepare(self, model: nn.Module, batches: Batches, device: torch.device, dtype: str) -> Artefact:
        model = _with_trunk(in_precision(model.to(device), dtype), self._compiled, self.name)
        artefact = _of_torch(model, batches, device, "backbone and neck compiled: ")
        limit = {"recompile_limit": 64, "accumulated_recompile_limit": 1024, "fail_on_recompile_limit_hit": True}
        try:
            with torch._dynamo.config.patch(limit):  # every model and shape once: none is compiled while the clock runs
                _run_once(artefact, batches, device)
        except InputError:
            raise
        except Exception as error:  # whatever a compiler raises
            raise InputError(
                f"torch.compile cannot run this detector's backbone ({said(error)}); leave compile out of --runtimes."
            ) from error
        return artefact

    def _compiled(self, trunk: nn.Module) -> nn.Module:
        return torch.compile(trunk, backend=self._backend)


class CudaGraph(OfTorch):
    """The backbone and the neck as a CUDA graph, one for every size of a batch; what follows is eager."""

    name = "cudagraph"

    def why_not(self, device: torch.device, dtype: str) -> str | None:
        if device.type != "cuda":
            return f"it captures work of an NVIDIA GPU, and the device is {device}"
        return super().why_not(device, dtype)

    def prepare(self, model: nn.Module, batches: Batches, device: torch.device, dtype: str) -> Artefact:
        model = _with_trunk(in_precision(model.to(device), dtype), _Replayed, self.name)
        artefact = _of_torch(model, batches, device, "backbone and neck replayed from a CUDA graph: ")
        try:
            _run_once(artefact, batches, device)
        except RuntimeError as error:  # a backbone that synchronises or allocates in a way that cannot be captured
            raise InputError(
                f"this detector's backbone cannot be captured as a CUDA graph ({said(error)}); leave cudagraph out of "
                "--runtimes."
            ) from error
        return artefact


class _Replayed(nn.Module):
    """See :class:`jdkd.latency.replaying.Replayed`.

    Args:
        module: takes and returns tensors on a GPU, [N, 3, H, W] to levels.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self._replayed = module, Replayed(module)

    def forward(self, images: Tensor) -> Any:
        return self._replayed(images)


def require_runnable(
    names: Sequence[str], known: Mapping[str, Runtime], device: torch.device, dtypes: Sequence[str]
) -> None:
    """Refuses runtimes that cannot run here, before anything else is done.

    Args:
        names: at least one.
        known: all runtimes by name.
        device: where.
        dtypes: in what, at least one.

    Raises:
        InputError: there is none, a name is unknown, or a runtime cannot run here; the message says why.
    """
    if not names or set(names) - set(known):
        raise InputError(f"the runtime is {' '.join(names) or 'none'}; known are {', '.join(known)}.")
    if not dtypes:
        raise InputError("--dtypes is empty; give float32.")
    for name in names:
        for dtype in dtypes:
            if reason := known[name].why_not(device, dtype):
                raise InputError(f"runtime {name} in {dtype} cannot run here: {reason}.")


def _of_torch(model: nn.Module, batches: Batches, device: torch.device, how: str = "") -> Artefact:
    """A torch detector and its two modes."""
    prepared = Prepared.of(model, [on_device(batch, device) for batch in batches])
    inside = {"end_to_end": how + HOST_TO_HOST, "model_only": how + BATCH_TO_BOXES}
    return Artefact(model, None if prepared is None else prepared.run, inside)


def _with_trunk(model: nn.Module, change: Callable[[nn.Module], nn.Module], name: str) -> nn.Module:
    """A copy of a detector whose backbone and neck, one module or the neck alone, is another; weights are shared.

    Raises:
        InputError: there is no telling which module it is.
    """
    path = neck_of(model)
    if not path:
        raise InputError(
            f"runtime {name} runs the module that returns the levels of features, and this {type(model).__name__} does "
            "not say which it is; leave the runtime out, or set model.pyramid to its path."
        )
    *parents, last = path.split(".")
    changed = holder = _shallow(model)
    for parent in parents:
        holder._modules[parent] = _shallow(getattr(holder, parent))
        holder = getattr(holder, parent)
    holder._modules[last] = change(getattr(holder, last))
    return changed


def _shallow(module: nn.Module) -> nn.Module:
    """A copy that shares all children and tensors."""
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    return copied


def _run_once(artefact: Artefact, batches: Batches, device: torch.device) -> None:
    for index, batch in enumerate(batches):
        artefact.detector(on_device(batch, device))
        if artefact.model_only is not None:
            artefact.model_only(index)
