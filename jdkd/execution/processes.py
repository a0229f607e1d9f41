"""Several processes on this machine: see :class:`Processes`."""

import atexit
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any

import torch

from jdkd.errors import InputError
from jdkd.execution.task import Json, Task, named
from jdkd.execution.worker import GLANCE, serve
from jdkd.notices import ProgressCallback, say_once

RETRIES = 2  # of a job whose process ended
GRACE = 60.0  # seconds in which an interrupted worker may save its step


@dataclass
class _Attempt:
    job: Json
    lost: int = 0


class Processes:
    """Worker processes that are started with the first jobs, open the task once, and wait for more.

    All of them have an equal share of this process's threads. As the number of threads decides how torch divides sums
    on a CPU, scores may differ in their last bits between numbers of workers; with one number they are the same,
    whichever worker does a job and when. Workers end with this process, however it ends.

    Args:
        task: what is opened in every worker.
        devices: one for every worker.
        progress: called in this process with what workers report, while :meth:`run` is waited for.
    """

    def __init__(self, task: Task, devices: Sequence[str], progress: ProgressCallback) -> None:
        self.task, self.devices, self.progress = task, list(devices), progress
        self._threads = max(1, torch.get_num_threads() // len(self.devices))
        self._workers: dict[int, _Worker] = {}  # by their place among the devices
        self._stillborn = 0  # workers in succession that were lost before their task was open
        atexit.register(self.close)  # before multiprocessing's own, which waits for workers

    def run(self, jobs: Sequence[Json]) -> Iterator[tuple[Json, Json]]:
        """As :meth:`Executor.run`. A job whose worker dies is given to another, twice at most, then it is a failure."""
        left = deque(map(_Attempt, jobs))
        try:
            while left or any(worker.attempt for worker in self._workers.values()):
                self._hand_out(left)
                for place, message in self._heard():
                    yield from self._handled(place, message, left)
        finally:  # where it was not the last of them that ended this
            self._end([place for place, worker in self._workers.items() if worker.attempt])

    def close(self) -> None:
        """As :meth:`Executor.close`: busy workers save their step, idle ones go; a second Ctrl-C kills them."""
        atexit.unregister(self.close)
        self._end([*self._workers])

    def _end(self, places: Sequence[int]) -> None:
        """Ends these workers: who is busy is interrupted and has time to save."""
        workers, deadline = [self._workers.pop(place) for place in places], time.monotonic() + GRACE
        try:
            for worker in workers:
                worker.dismiss()
            for worker in workers:
                worker.drain(deadline)
        finally:
            for worker in workers:
                worker.kill()

    def _handled(self, place: int, message: tuple | None, left: deque[_Attempt]) -> Iterator[tuple[Json, Json]]:
        """What follows from a message of a worker; yields the job that came to its end, if one did."""
        worker = self._workers[place]
        match message:
            case ("progress", *state):
                self.progress(*state)
            case ("notice", sentence, key):
                say_once(sentence, key)
            case ("ready",):
                self._stillborn, worker.is_ready = 0, True
            case ("outcome", outcome):
                attempt, worker.attempt = worker.attempt, None
                yield attempt.job, outcome
            case ("error", error):
                worker.attempt = None
                if not worker.is_ready:  # it has no task to do others of
                    self._workers.pop(place).kill()
                raise error
            case None:
                del self._workers[place]
                yield from self._lost(worker, left)

    def _hand_out(self, left: deque[_Attempt]) -> None:
        for place, device in enumerate(self.devices):
            worker = self._workers.get(place)
            if left and (worker is None or worker.attempt is None):
                if worker is not None and not worker.process.is_alive():
                    worker.kill()
                    worker = None
                self._workers[place] = worker or _Worker(self.task, device, self._threads)
                self._workers[place].take(left.popleft())

    def _heard(self) -> Iterator[tuple[int, tuple | None]]:
        """Waits until a worker says something; yields its place and the message, None for one that is no more."""
        spoken = connection.wait([worker.pipe for worker in self._workers.values()], timeout=GLANCE)
        for place, worker in [*self._workers.items()]:
            if worker.pipe in spoken or worker.pipe.poll():
                try:
                    yield place, worker.pipe.recv()
                except (EOFError, OSError):
                    yield place, None
            elif not worker.process.is_alive():  # and a child of its own keeps its end of the pipe open
                yield place, None

    def _lost(self, worker: "_Worker", left: deque[_Attempt]) -> Iterator[tuple[Json, Json]]:
        """Puts the job of a worker that ended back, or gives it up."""
        attempt, ended = worker.attempt, worker.kill()
        if not worker.is_ready:
            self._stillborn += 1
            if worker.process.exitcode >= 0 or self._stillborn > RETRIES:
                raise InputError(
                    f"a worker process {ended} before it had loaded base and data; what it printed says why: where "
                    "memory is short, give fewer workers; in a script, call the search under "
                    'if __name__ == "__main__", as every worker imports it.'
                )
        else:
            attempt = attempt and _Attempt(attempt.job, attempt.lost + 1)
        if attempt is None:
            return
        if attempt.lost > RETRIES:
            yield attempt.job, {"failure": f"its worker process {ended}, {attempt.lost} times in succession."}
            return
        left.appendleft(attempt)
        again = f" ({attempt.lost} of {RETRIES})" if attempt.lost else ""
        say_once(
            f"{named(attempt.job)} lost its worker process, which {ended}; another carries it on{again}",
            key=f"lost {worker.process.pid}",
        )


class _Worker:
    """The driver's end of one worker process."""

    def __init__(self, task: Task, device: str, threads: int) -> None:
        spawning = multiprocessing.get_context("spawn")  # as CUDA does not outlive a fork
        self.pipe, theirs = spawning.Pipe()
        self.process = spawning.Process(target=serve, args=(theirs, task, device, threads), name="jdkd search worker")
        self.attempt: _Attempt | None = None
        self.is_ready = False
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited: it is not ours while it starts
        try:
            self.process.start()
        finally:
            theirs.close()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def take(self, attempt: _Attempt) -> None:
        self.attempt = attempt
        with suppress(OSError):  # it has just ended, which is noticed where it is listened to
            self.pipe.send(attempt.job)

    def dismiss(self) -> None:
        """Ends the worker: at once where it waits, after its step where it trains."""
        if self.attempt is None:
            self.pipe.close()
        elif self.process.is_alive():
            os.kill(self.process.pid, signal.SIGINT)

    def drain(self, deadline: float) -> None:
        """Waits for a dismissed worker, whose last reports are not of interest."""
        with suppress(EOFError, OSError):
            while self.attempt and self.process.is_alive() and (left := deadline - time.monotonic()) > 0:
                if self.pipe.poll(min(left, GLANCE)):
                    self.pipe.recv()
        self.process.join(max(0.0, deadline - time.monotonic()))

    def kill(self) -> str:
        """Kills the worker and its children, if there still are any, and says how it ended."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.pipe.close()
        return _ending(self.process.exitcode)


def _ending(exitcode: Any) -> str:
    if exitcode >= 0:
        return f"ended with exit code {exitcode}"
    hint = " (as a system does that runs out of memory)" if exitcode == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-exitcode).name}{hint}"
