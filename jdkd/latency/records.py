"""What makes a measurement one that can be found again and compared: which weights, which sources, which machine."""

from __future__ import annotations

import functools
import hashlib
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from jdkd import __version__
from jdkd.errors import InputError
from jdkd.latency.report import LatencyReport, require_same_environment

ROOT = Path(__file__).resolve().parents[2]
RESULTS = "benchmarks/results"  # files of results, which are no sources
SAME = "runtime", "dtype", "batch_size", "images_sha256"  # of the protocol, where two reports are compared


def sha256_of(file: Path) -> str:
    """SHA-256 of a file, as `sha256sum` prints it.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}); give a file that can.") from None


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers of a model, with their names: for one that lies in no file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(-1).numpy().tobytes())
    return digest.hexdigest()


@functools.cache
def sources(root: Path = ROOT) -> dict[str, Any]:
    """Version of this package, the commit that its sources are at, and whether they were changed since.

    Args:
        root: folder that holds ``jdkd``.

    Returns:
        ``version``, ``commit`` and ``dirty``; the last two None outside of a checkout, or where git is missing.
    """
    tracked = _git(root, "ls-files", "--error-unmatch", "jdkd/__init__.py")
    if not tracked:
        return {"version": __version__, "commit": None, "dirty": None}
    changed = _git(root, "status", "--porcelain", "--", ".", f":(exclude){RESULTS}")
    return {"version": __version__, "commit": _git(root, "rev-parse", "HEAD"), "dirty": changed != ""}


def require_published(file: Path, root: Path = ROOT) -> None:
    """Refuses to add to the files of results what no commit can repeat.

    Args:
        file: where results are to go; outside of the checkout's results anything may.
        root: of the checkout.

    Raises:
        InputError: the sources were changed since the last commit, or there is no telling.
    """
    if not file.resolve().is_relative_to(root / RESULTS):
        return
    found = sources(root)
    if found["dirty"] is not False:
        state = (
            "is no checkout of git" if found["dirty"] is None else f"has changes since commit {found['commit'][:12]}"
        )
        raise InputError(
            f"{file} is among the published results, and {root} {state}, so nobody could repeat them; commit first, or "
            "give --out elsewhere."
        )


def compared(now: LatencyReport, before: LatencyReport, then: str) -> list[str]:
    """What an earlier measurement said of the same models, a sentence for each and every mode.

    Args:
        now, before: two reports.
        then: what the earlier one is called.

    Raises:
        InputError: they were taken on different machines, in different runtimes, dtypes or batches, or on different
            images; or they have no model in common.
    """
    require_same_environment(before.environment, now.environment, then, "this measurement")
    for name in SAME:
        if (was := before.protocol.get(name)) != (is_ := now.protocol.get(name)):
            raise InputError(
                f"{then} has {name} {was}, and this measurement {is_}: they cannot be compared; measure both alike."
            )
    lines = []
    for name in now.models:
        if name == now.base or name not in before.models or before.base != now.base:
            continue
        for mode in sorted({*now.models[name].modes()} & {*before.models[name].modes()}):
            new, old = now.ratio(name, mode=mode), before.ratio(name, mode=mode)
            apart = new.low > old.high or old.low > new.high
            lines.append(f"{name}, {mode}: {new}, was {old}: {'they differ' if apart else 'they agree'}")
    if not lines:
        raise InputError(
            f"{then} compares {', '.join(before.models)}, and this measurement {', '.join(now.models)}; "
            "give the same base and one of the same students."
        )
    return lines


def matching(now: LatencyReport, stored: Sequence[Mapping[str, Any]], then: str) -> LatencyReport:
    """The stored report of the same runtime, dtype and batch size.

    Raises:
        InputError: there is none.
    """
    keys = SAME[:3]
    for entry in stored:
        if all(entry["protocol"].get(key) == now.protocol[key] for key in keys):
            return LatencyReport.from_json(entry)
    wanted = ", ".join(f"{key} {now.protocol[key]}" for key in keys)
    raise InputError(f"{then} has no measurement of {wanted}; measure what it holds, or leave --against out.")


def _git(root: Path, *words: str) -> str | None:
    """What git prints; None where it is missing or fails."""
    try:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
