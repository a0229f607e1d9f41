"""`jdkd report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jdkd.errors import InputError
from jdkd.run_folder import RunFolder

TRAININGS = ("train", "distill", "swap")  # commands that leave the log of one


@dataclass(frozen=True)
class Report:
    """Write report.html and pareto.png of a search anew, finished or under way, and mirror it.

    Of a training, only the TensorBoard events are written.
    """

    folder: Path
    """Folder of a search, or with --tensorboard of train, distill or swap."""
    optuna: str | None = None
    """Mirror the candidates as an Optuna study in this storage, such as sqlite:///study.db."""
    tensorboard: bool = False
    """Write TensorBoard events to FOLDER/tensorboard."""

    def __call__(self) -> None:
        from jdkd.report import Mirrors, read_outcome, summary, write_report

        kind = (RunFolder(self.folder).read() or {}).get("kind", "search")
        trained = kind in TRAININGS and self.tensorboard and self.optuna is None
        if kind != "search" and not trained:
            raise InputError(
                f"{self.folder} holds a `jdkd {kind}`, and a report is made of a search; of a training, --tensorboard "
                "alone is."
            )
        mirrors = Mirrors(self.folder, self.optuna, self.tensorboard)
        outcome = None if trained else read_outcome(self.folder)
        mirrors.show(outcome)  # which may be refused, and the page is not written then
        files = [] if outcome is None else [*write_report(self.folder)]
        if mirrors.board is not None:
            mirrors.board.close()
            files.append(mirrors.board.where)
        for sentence in summary(outcome) if outcome is not None else ():
            print(sentence)
        for path in files:
            print(path)
