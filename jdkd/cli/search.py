"""`jdkd search`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jdkd.cli.failures import keeping
from jdkd.cli.flags import DataFlags, resolve_device, whereabouts
from jdkd.cli.progress import Progress
from jdkd.errors import InputError
from jdkd.run_folder import RunFolder


@dataclass(frozen=True)
class Search:
    """Derive a faster and better student from a base detector.

    Ends with exit code 2 where no student reaches the latency asked for; everything is written all the same.
    """

    base: Path
    """Folder of the base detector, written by `jdkd train`."""
    out: Path
    """Folder for student, result.json, archive.sqlite, pareto.png, report.html."""
    source: DataFlags = field(default_factory=DataFlags)
    teacher_pool: Path | None = None
    """Folder of a finished teacher pool; without it, one is grown from the base."""
    target_latency: float = 0.53
    """End-to-end latency to reach, as a fraction of the base's."""
    steps: int | None = None
    """Training steps in all: pool, candidates and both controls [36 epochs]."""
    candidates: int = 4
    """Students to train."""
    batch_size: int = 8
    """Images per step."""
    lr: float = 1e-3
    """Peak learning rate."""
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    """Mixed precision; auto: on a GPU."""
    latency_seconds: float = 10.0
    """How long the final measurement lasts."""
    seed: int = 0
    """Decides everything that is drawn."""
    workers: int = 0
    """Processes that read images."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    resume: bool = False
    """Carry on what OUT holds."""

    def __call__(self) -> None:
        from rich.console import Console

        from jdkd.report import result_table, write_report
        from jdkd.search import SearchConfig, search

        device, (train, val) = resolve_device(self.device), self.source.splits()
        settings = (
            "base",
            "out",
            "teacher_pool",
            "target_latency",
            "steps",
            "candidates",
            "batch_size",
            "lr",
            "amp",
        )
        settings += ("latency_seconds", "seed", "workers", "resume")
        given = {name: getattr(self, name) for name in settings}
        config = SearchConfig(**given, train=train, val=val, device=device)
        run = RunFolder(self.out)
        with keeping(run, "every finished candidate and the last checkpoint"), Progress() as progress:
            folders = {name: str(path.resolve()) for name in ("base", "teacher_pool") if (path := given[name])}
            same = ("target_latency", "steps", "candidates", "batch_size", "lr", "amp", "seed")
            identity = {name: given[name] for name in same} | folders
            where = {"data": whereabouts(train, val), "device": device}
            run.begin("search", identity, resume=self.resume, command=["jdkd", *sys.argv[1:]], where=where)
            result = search(config, progress=progress)
            plot, page = write_report(self.out)
            run.finish()
        Console().print(result_table(result))
        for path in (self.out / "student", self.out / "result.json", self.out / "archive.sqlite", plot, page):
            print(path)
        if not result["target_met"]:
            raise InputError(
                f"the student in {self.out / 'student'} takes {result['student']['latency_ratio']:.3f} of "
                f"the base's time and misses --target-latency {self.target_latency:g}; it is the best found: "
                "ask for less, or give more --candidates and --steps."
            )
