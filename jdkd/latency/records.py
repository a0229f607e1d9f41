"""What makes a measurement one that can be found again and compared: which weights, which sources, which machine."""

from __future__ import annotations

import functools
import hashlib
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from jdkd import __version__
from jdkd.errors import InputError
from jdkd.latency.report import LatencyReport, require_same_environment

ROOT = Path(__file__).resolve().parents[2]
RESULTS = "benchmarks/results"  # of the checkout; files of results are no sources
SAME = "runtime", "dtype", "batch_size", "images_sha256"  # of the protocol, where two reports are compared


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


def compared(now: LatencyReport, before: LatencyReport, then: str) -> list[str]:
    """What an earlier measurement said of the same models, a sentence for each and every mode.

    Args:
        now, before: two reports.
        then: what the earlier one is called.

    Raises:
        InputError: they cannot be compared, see :func:`require_comparable`, or have no models in common.
    """
    require_comparable(before, now.environment, now.protocol, then)
    lines = []
    for name in now.models if before.base == now.base else ():
        if name == now.base or name not in before.models:
            continue
        for mode in now.models[name].modes().keys() & before.models[name].modes().keys():
            new, old = now.ratio(name, mode=mode), before.ratio(name, mode=mode)
            apart = new.low > old.high or old.low > new.high
            lines.append(f"{name}, {mode}: {new}, was {old}: {'they differ' if apart else 'they agree'}")
    if not lines:
        raise InputError(
            f"{then} compares {', '.join(before.models)}, and this measurement {', '.join(now.models)}; "
            "give the same base and one of the same students."
        )
    return sorted(lines)


def require_comparable(
    before: LatencyReport, environment: Mapping[str, Any], protocol: Mapping[str, Any], then: str
) -> None:
    """Refuses to compare an earlier report with one of another machine, runtime, dtype or batch, or of other images.

    Args:
        before: the earlier one.
        environment, protocol: of the later one, or of one that is about to be taken.
        then: what the earlier one is called.

    Raises:
        InputError: they differ; the message names in what.
    """
    require_same_environment(before.environment, environment, then, "this measurement")
    for name in SAME:
        if (was := before.protocol.get(name)) != protocol[name]:
            raise InputError(
                f"{then} has {name} {was}, and this measurement {protocol[name]}: they cannot be compared; measure "
                "both alike."
            )


def matching(stored: Sequence[LatencyReport], protocol: Mapping[str, Any], then: str) -> LatencyReport:
    """The stored report of the same runtime, dtype and batch size.

    Raises:
        InputError: there is none.
    """
    keys = SAME[:3]
    for report in stored:
        if all(report.protocol.get(key) == protocol[key] for key in keys):
            return report
    wanted = ", ".join(f"{key} {protocol[key]}" for key in keys)
    raise InputError(f"{then} has no measurement of {wanted}; measure what it holds, or leave --against out.")


def images_sha256(images: Sequence[Tensor]) -> str:
    """SHA-256 of all pixels, with shapes and dtypes."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(f"{tuple(image.shape)} {image.dtype}".encode() + image.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _git(root: Path, *words: str) -> str | None:
    """What git prints; None where it is missing or fails."""
    try:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
