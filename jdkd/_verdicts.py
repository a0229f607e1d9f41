"""Whether a kernel computes the right thing on the device at hand: found out once, kept under ``JDKD_CACHE``.

A verdict is one small file, ``verdicts/<environment>/<op>-<form>-<backend>-<dtype>.json``, where the environment is
the device, its driver, the versions that generate code, and the sources. It appears whole or not at all, so processes
need not know of each other; one that cannot be read, or is about another environment, counts as none. Where nothing
can be written, verdicts live as long as the process.

While a check runs, a file ``….checking`` with the process's name lies beside. It stays behind if the kernel ends the
process (a segmentation fault, an illegal instruction); a form that has done so twice is not tried again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from jdkd import __version__, _ext
from jdkd.files import cache_folder

RIGHT, WRONG, FAILED = "right", "wrong", "failed"
# Of the largest exact value: a few roundings of float32, or of the half-precision result. A swapped lane errs by 1.
ALLOWED = {torch.float64: 1e-12, torch.float32: 2.0**-16, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}
CRASHES = 2  # of processes until a form is left alone; one may have been ended from outside
STALE = 600  # seconds after which a check has certainly ended


_known: dict[Subject, Verdict] = {}  # of this process
# Held while a check runs. A check runs no autograd, whose threads may wait for this lock in a backward pass.
_lock = threading.RLock()
_running: list[str] = []  # by the thread that holds the lock
os.register_at_fork(after_in_child=lambda: _lock._at_fork_reinit())


class Subject(NamedTuple):
    """What a verdict is about: a form of an operator on a device."""

    op: str
    form: str
    backend: str
    device: torch.device
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return f"{self.op}-{self.form.replace(' ', '_')}-{self.backend}-{dtype_name(self.dtype)}"

    def __str__(self) -> str:
        return f"{self.backend} {self.op} ({self.form}, {dtype_name(self.dtype)})"


class Compared(NamedTuple):
    """A result of a kernel beside what it should be.

    Args:
        what: name of the result and of its case.
        ours: the kernel's.
        exact: computed in float64 from the same inputs, of the same shape.
        unit: of the errors, broadcastable to the result; the largest exact value if left out.
        allowed: largest error in these units; that of the dtype in :data:`ALLOWED` if left out.
    """

    what: str
    ours: Tensor
    exact: Tensor
    unit: Tensor | None = None
    allowed: float | None = None


class Verdict(NamedTuple):
    """What came of the check of a form.

    Args:
        state: :data:`RIGHT`, :data:`WRONG`, or :data:`FAILED`: it could not be checked.
        what: the result that errs most for what it is allowed, or what went wrong.
        error: of this result, in units of the largest exact value; None where there is none.
        allowed: of this result.
        cached: whether it was read from a file.
    """

    state: str
    what: str
    error: float | None = None
    allowed: float | None = None
    cached: bool = False

    def __str__(self) -> str:
        if self.error is None:
            return self.what
        return f"{self.what} errs by {self.error:.1e}, {self.allowed:.1e} is allowed"


Check = Callable[[str, torch.device, torch.dtype], Iterable[Compared]]  # of a backend


def known(subject: Subject) -> Verdict | None:
    """The verdict of this process or of an earlier one, or None."""
    if subject not in _known and (kept := read(subject.name, subject.device)) is not None:
        _known[subject] = kept
    return _known.get(subject)


def found(subject: Subject, check: Check) -> Verdict | None:
    """The verdict that is known, else that of a check, which takes some hundredths of a second.

    Args:
        subject: what it is about.
        check: yields the results to compare. It runs no autograd, and picks no backend but the given one.

    Returns:
        The verdict; None where nothing can be checked now: while a CUDA graph is captured or a program is traced.
    """
    if subject in _known:
        return _known[subject]
    with _lock:  # others wait, and find the verdict
        verdict = known(subject)
        if verdict is None and _may_check(subject.device):
            verdict = checked(subject, check)
        return verdict


def checked(subject: Subject, check: Check) -> Verdict:
    """The verdict of a check that is run now, and kept."""
    with _lock:
        if crashed(subject.name, subject.device):
            text = f"{CRASHES} processes ended while it was checked; `jdkd check` tries again"
            return _known.setdefault(subject, Verdict(FAILED, text))
        _running.append(subject.name)
        try:
            with marked(subject.name, subject.device), _undisturbed(subject.device):
                verdict = judged(check(subject.backend, subject.device, subject.dtype))
        except Exception as error:
            verdict = _failed(error, subject.device)
        finally:
            _running.pop()
        _known[subject] = verdict
        write(subject.name, subject.device, verdict)
        return verdict


def _may_check(device: torch.device) -> bool:
    if _running or torch.compiler.is_compiling() or torch._guards.TracingContext.try_get() is not None:
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Nothing of what surrounds a call changes what is computed: modes, autocast, a current device."""
    with contextlib.ExitStack() as stack:
        for context in (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            torch._C.DisableTorchFunction(),
            torch.utils._python_dispatch._disable_current_modes(),
        ):
            stack.enter_context(context)
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
            stack.callback(torch.cuda.set_sync_debug_mode, torch.cuda.get_sync_debug_mode())
            torch.cuda.set_sync_debug_mode(0)
        yield


def _failed(error: Exception, device: torch.device) -> Verdict:
    """The verdict on a kernel that raised; one that leaves the device unusable is never tried again."""
    text = next(iter(str(error).strip().splitlines()), "")
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            return Verdict(WRONG, f"it left the device unusable: {type(error).__name__}: {text}")
    return Verdict(FAILED, f"{type(error).__name__}: {text}")


def judged(results: Iterable[Compared]) -> Verdict:
    """The verdict on what a check yields; with a device sync at every result."""
    worst = None
    for what, ours, exact, unit, allowed in results:
        allowed = ALLOWED[ours.dtype] if allowed is None else allowed
        error = _error(ours, exact, unit)
        if worst is None or not error / allowed <= worst.error / worst.allowed:
            worst = Verdict(RIGHT if error <= allowed else WRONG, what, error, allowed)
        if worst.state == WRONG:
            return worst
    return worst or Verdict(FAILED, "its check compares nothing")


def _error(ours: Tensor, exact: Tensor, unit: Tensor | None) -> float:
    if ours.shape != exact.shape:
        return float("inf")
    exact = exact.double()
    unit = (exact.abs().max() if unit is None else unit.double()).clamp(min=1e-30)
    error = ((ours.double() - exact).abs() / unit).max().item()
    return error if error == error else float("inf")  # NaN


@functools.cache
def environment(device: torch.device) -> dict[str, str]:
    """What a verdict depends on, in words that a report can quote."""
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda or torch.version.hip or "none"}
    with contextlib.suppress(metadata.PackageNotFoundError):
        versions["triton"] = metadata.version("triton")
    return {**_device(device), **versions, "jdkd": __version__, "sources": _sources()}


def _device(device: torch.device) -> dict[str, str]:
    if device.type != "cuda":
        return {"device": _processor(), "capability": torch.backends.cpu.get_cpu_capability(), "driver": "none"}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}, {properties.multi_processor_count} SMs",
        "driver": _driver(),
    }


def _driver() -> str:
    with contextlib.suppress(OSError):
        if found := re.search(r"Kernel Module\D*([\d.]+)", Path("/proc/driver/nvidia/version").read_text()):
            return found.group(1)
    return f"for CUDA {torch._C._cuda_getDriverVersion()}"


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _sources() -> str:
    """A hash of what is installed: the compiled extension, the Triton kernels, and what calls and checks them."""
    package = Path(__file__).parent
    folders = (package / "kernels", package.parent / "kernels", package / "ops", package / "reference")
    files = [path for folder in folders for path in sorted(folder.glob("*.py"))]
    if (library := _ext.library()) is not None:
        files.append(library)
    digest = hashlib.sha256()
    for path in files:
        with contextlib.suppress(OSError):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def folder(device: torch.device) -> Path | None:
    """Where the verdicts on a device lie; None where there is no home to keep them in."""
    if (root := cache_folder()) is None:
        return None
    key = json.dumps(environment(device), sort_keys=True)
    return root / "verdicts" / hashlib.sha256(key.encode()).hexdigest()[:16]


def read(name: str, device: torch.device) -> Verdict | None:
    """The verdict that is kept under a name, or None."""
    place = folder(device)
    if place is None:
        return None
    try:
        kept = json.loads((place / f"{name}.json").read_text(encoding="utf-8"))
        if kept["environment"] != environment(device) or kept["state"] not in (RIGHT, WRONG):
            return None
        error, allowed = (None if kept[key] is None else float(kept[key]) for key in ("error", "allowed"))
        return Verdict(kept["state"], str(kept["what"]), error, allowed, cached=True)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def write(name: str, device: torch.device, verdict: Verdict) -> None:
    """Keeps a verdict under a name, if it can; one that could not be reached may be reached next time."""
    place = folder(device)
    if place is None or verdict.state == FAILED:
        return
    content = {**verdict._asdict(), "environment": environment(device)}
    del content["cached"]
    partial = place / f".{name}.{_process()}.partial"
    with contextlib.suppress(OSError):
        place.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content, indent=2), encoding="utf-8")
        os.replace(partial, place / f"{name}.json")


def crashed(name: str, device: torch.device) -> bool:
    """Whether a check has ended so many processes that it is not to be tried again."""
    place = folder(device)
    try:
        return place is not None and sum(map(_left_behind, place.glob(f"{name}.*.checking"))) >= CRASHES
    except OSError:
        return False


def forget(subject: Subject) -> None:
    """Removes what is known of a form, so that it is checked anew."""
    _known.pop(subject, None)
    place, name = folder(subject.device), subject.name
    with contextlib.suppress(OSError):
        for file in (place / f"{name}.json", *place.glob(f"{name}.*.checking")) if place else ():
            file.unlink(missing_ok=True)


@contextlib.contextmanager
def marked(name: str, device: torch.device) -> Iterator[None]:
    """Leaves a file behind if the process ends within the block."""
    place, marker = folder(device), None
    with contextlib.suppress(OSError):
        if place is not None:
            place.mkdir(parents=True, exist_ok=True)
            marker = place / f"{name}.{_process()}.checking"
            marker.touch()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if marker is not None:
                marker.unlink(missing_ok=True)


def _process() -> str:
    return f"{platform.node()}-{os.getpid()}"


def _left_behind(marker: Path) -> bool:
    """Whether a marker's process is gone, as far as can be told; one of another machine is given time."""
    node, _, process = marker.name.removesuffix(".checking").rpartition("-")
    with contextlib.suppress(OSError):
        if time.time() - marker.stat().st_mtime > STALE:
            return True
    if not node.endswith(f".{platform.node()}") or not process.isdecimal():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def report(device: torch.device, **more: Any) -> str:
    """The environment in one line, for someone who reports a fault."""
    return ", ".join(f"{name} {value}" for name, value in {**environment(device), **more}.items())


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype in a word."""
    return str(dtype).removeprefix("torch.")
