"""See :class:`Mirrors`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jdkd.errors import InputError, said
from jdkd.notices import say_once
from jdkd.report.optuna import mirror_to_optuna
from jdkd.report.outcome import Outcome, read_outcome
from jdkd.report.tensorboard import TensorBoardMirror
from jdkd.run_folder import RUN_FILE


class Mirrors:
    """What a run is shown in besides its own files: an Optuna study, TensorBoard's events, both or neither.

    Args:
        folder: of the run; it need not exist yet.
        optuna: storage of the study, `sqlite:///study.db` say.
        tensorboard: whether events are written.

    Raises:
        ModuleNotFoundError: the package of a mirror that is asked for is not installed.
    """

    def __init__(self, folder: Path, optuna: str | None = None, tensorboard: bool = False) -> None:
        self.folder, self.optuna, self.studied = folder, optuna, 0
        if optuna is not None:
            import optuna as _  # noqa: F401  # said before any work if it is missing
        self.board = TensorBoardMirror(folder) if tensorboard else None

    def __bool__(self) -> bool:
        return self.optuna is not None or self.board is not None

    def update(self) -> None:
        """Brings both up to date while the run goes on, which nothing here may end: what fails is said once."""
        if not self or not (self.folder / RUN_FILE).is_file():  # the folder is not the run's yet
            return
        outcome = None
        with self._outlived():
            with suppress(InputError):  # no candidate yet, or no search
                outcome = read_outcome(self.folder)
            self.show(outcome)

    def show(self, outcome: Outcome | None) -> None:
        """Brings both up to date.

        Args:
            outcome: of the search in the folder; None where it has no candidate, or is a training.

        Raises:
            InputError: the storage of the study cannot be used.
        """
        if self.board is not None:
            self.board.update(outcome)
        if self.optuna is not None and outcome is not None and len(outcome.candidates) > self.studied:
            mirror_to_optuna(outcome, self.optuna)
            self.studied = len(outcome.candidates)

    def close(self) -> None:
        """Shows what has come last, the latencies that were measured anew included; what fails is said once."""
        self.studied = 0
        self.update()
        with self._outlived():
            if self.board is not None:
                self.board.close()

    @contextmanager
    def _outlived(self) -> Iterator[None]:
        """Says what fails in the block, each failure once; it ends no run."""
        try:
            yield
        except Exception as error:  # whatever a database, a writer of events or a plot raises
            why = error if isinstance(error, InputError) else said(error)
            say_once(f"the run goes on, but is not mirrored: {why}", key=f"mirrors of {self.folder}: {why}")
