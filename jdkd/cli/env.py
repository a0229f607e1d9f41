"""`jdkd env`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Env:
    """Print versions, devices and which backend each operator has."""

    def __call__(self) -> None:
        from jdkd.env import report

        print(report())
