"""What a reader must know about a timed model: what it is, what it finds, and what it takes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jdkd.detect import parameter_count
from jdkd.detect.architecture import identity
from jdkd.detect.contract import detections
from jdkd.latency.calls import on_device
from jdkd.latency.folding import batch_norms
from jdkd.latency.runtimes import Artefact, Batches

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def known_facts(model: nn.Module, artefact: Artefact) -> dict[str, Any]:
    """Size and layout of a model, and what its runtime says of it, JSON-able; arguments as of :func:`facts_of`."""
    weights = [parameter for parameter in model.parameters() if parameter.ndim == 4]
    return {
        "parameters": parameter_count(model),
        "dtypes": sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}),
        "channels_last": all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights),
        "batch_norms": batch_norms(model),
        "architecture": identity(model),
        "inside": artefact.inside,
        **artefact.facts,
    }


def facts_of(model: nn.Module, artefact: Artefact, batches: Batches, device: torch.device) -> dict[str, Any]:
    """The same, with the detections that a model makes and the memory that it takes.

    Args:
        model: as it was given.
        artefact: what is timed of it.
        batches: what it is timed on; each is run once.
        device: where.
    """
    found: list[int] = []

    def run() -> None:
        for batch in batches:
            images = on_device(batch, artefact.images_on(device))
            found.extend(len(each["scores"]) for each in detections(artefact.detector, images))

    memory = None
    if artefact.from_host and device.type == "cuda":
        run()  # torch counts what it allocates itself, and no other runtime's memory
    else:
        memory = peak_memory(run, device)
    counted = {"detections_per_image": sum(found) / len(found), "peak_memory_bytes": memory}
    return known_facts(model, artefact) | counted


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that a call takes at most beyond what was in use before it.

    On a GPU these are torch's allocations, on a CPU those of the process, as Linux counts them; None where nobody does.

    Args:
        call: is run once.
        device: where it runs.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed counts as in use until it is given back
        CLEAR.write_text("5")  # the peak is now what is in use
        before = _resident("VmRSS")
    except (OSError, AttributeError, KeyError):
        call()
        return None
    call()
    return max(0, _resident("VmHWM") - before)


def _resident(which: str) -> int:
    """Bytes of this process that lie in memory: ``VmRSS``, now, or ``VmHWM``, at most."""
    lines: Sequence[str] = STATUS.read_text().splitlines()
    return 1024 * int(dict(line.split(":", 1) for line in lines)[which].split()[0])
