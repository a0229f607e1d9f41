"""See :class:`TensorBoardMirror`."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jdkd.files import lock_folder, unlock_folder
from jdkd.report.outcome import Outcome
from jdkd.report.plot import pareto_plot
from jdkd.train.log import row_of

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LOG = "log.jsonl"
EVENTS = "events.out.tfevents.*"


class TensorBoardMirror:
    """Writes what the logs of trainings and the archive of a search say as TensorBoard's events, and what comes new.

    Every training is a run of its own, named by its folder, with its losses, learning rate and gradient norm by step.
    The search is a run `search`: mAP, latency ratio and steps by the number of the candidate, and the front as a plot.
    Logs and archive stay the source: a mirror that is opened writes everything anew, so nothing is there twice.

    Args:
        folder: of a training or a search; the events go into `tensorboard` in it, which belongs to this mirror.
    """

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self.where = folder, folder / "tensorboard"
        self._make, self._writers = SummaryWriter, {}
        self._read: dict[Path, int] = {}  # bytes of each log that are written
        self._candidates = 0

    def update(self, outcome: Outcome | None = None) -> None:
        """Adds what is new.

        Args:
            outcome: of the search in the folder; None where it is a training, or has no candidate yet.

        Raises:
            InputError: the mirror of another process, such as that of the search itself, is at work there.
        """
        logs = sorted(self.folder.rglob(LOG))
        search = outcome if outcome is not None and len(outcome.candidates) > self._candidates else None
        if not self._writers and (logs or search):
            self._begin()
        for log in logs:
            self._add_training(log)
        if search is not None:
            self._add_candidates(search)
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        unlock_folder(self.where)

    def _begin(self) -> None:
        """Takes the folder of events for this process, and what an earlier mirror left there away."""
        self.where.mkdir(parents=True, exist_ok=True)
        lock_folder(self.where, "the folder of events")
        for file in self.where.rglob(EVENTS):
            file.unlink()

    def _writer(self, run: str) -> SummaryWriter:
        if run not in self._writers:
            self._writers[run] = self._make(self.where / run)
        return self._writers[run]

    def _add_training(self, log: Path) -> None:
        """The whole lines that a log has had since it was last read; one that is shorter by now was begun anew."""
        with log.open("rb") as stream:
            content = stream.read()
        at = self._read.get(log, 0)
        new = content[at if at <= len(content) else 0 :]
        whole = new[: new.rfind(b"\n") + 1]
        self._read[log] = len(content) - len(new) + len(whole)
        run = log.parent.relative_to(self.folder)
        for row in map(row_of, whole.splitlines()):
            if not isinstance(row.get("step"), int):  # a line that another has left
                continue
            for name, value in _numbers({key: each for key, each in row.items() if key != "step"}):
                self._writer("training" if run == Path() else str(run)).add_scalar(name, value, row["step"])

    def _add_candidates(self, outcome: Outcome) -> None:
        """The candidates that have come since, and the plot as it is now."""
        import numpy as np
        from PIL import Image

        writer = self._writer("search")
        for one in outcome.candidates[self._candidates :]:
            scores = {"mAP": one.map, "mAP50": one.map50, "latency_ratio": one.latency_ratio, "steps": one.steps}
            for name, value in _numbers(scores):
                writer.add_scalar(f"candidates/{name}", value, one.number)
            teacher = f"; taught by {one.teacher}" if one.teacher is not None else ""
            failed = f"; failed: {one.failure}" if one.failure is not None else ""
            writer.add_text("candidates/action", f"{one.kind}: {one.action}{teacher}{failed}", one.number)
        self._candidates = len(outcome.candidates)
        picture = Image.open(io.BytesIO(pareto_plot(outcome))).convert("RGB")
        writer.add_image("front", np.asarray(picture), outcome.candidates[-1].generation, dataformats="HWC")


def _numbers(row: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    """The finite numbers in a row and in what it holds, by their path."""
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{above}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            yield f"{above}{key}", float(value)
