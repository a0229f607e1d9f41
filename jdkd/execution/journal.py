"""See :class:`Journal`."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from jdkd.errors import InputError
from jdkd.execution.task import Executor, Json, fingerprint
from jdkd.files import read_json, write_json


class Journal:
    """An executor that keeps every outcome on disk from the moment it is there, so that no kill repeats a job.

    Args:
        executor: does the jobs.
        folder: where outcomes are kept, a file each; made with the first.
    """

    def __init__(self, executor: Executor, folder: Path) -> None:
        self.executor, self.folder = executor, folder

    def run(self, jobs: Sequence[Json]) -> Iterator[tuple[Json, Json]]:
        """As :meth:`Executor.run`; jobs whose outcome is kept come first, without being done again."""
        kept = [self._file(job).exists() for job in jobs]
        for job in (job for job, known in zip(jobs, kept, strict=True) if known):
            yield job, self._read(job)
        for job, outcome in self.executor.run([job for job, known in zip(jobs, kept, strict=True) if not known]):
            self.folder.mkdir(exist_ok=True)
            write_json(self._file(job), {"job": job, "outcome": outcome})
            yield job, outcome

    def clear(self) -> None:
        """Forgets all outcomes: they are in the archive."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        self.executor.close()

    def _file(self, job: Json) -> Path:
        return self.folder / f"{fingerprint(job)[:16]}.json"

    def _read(self, job: Json) -> Json:
        file, remedy = self._file(job), "remove it and resume: its candidate is trained again"
        entry = read_json(file, remedy)
        known = isinstance(entry, dict) and fingerprint(entry.get("job")) == fingerprint(job)  # JSON has no tuples
        if not known or not isinstance(entry.get("outcome"), dict):
            raise InputError(f"{file} is not the outcome of a job of this search; {remedy}.")
        return entry["outcome"]
