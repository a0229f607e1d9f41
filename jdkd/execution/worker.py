"""The worker's side of :class:`jdkd.execution.processes.Processes`, and what every worker process needs."""

import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from jdkd.errors import InputError, said
from jdkd.execution.task import Task, outcome_of
from jdkd.notices import told_to

PAUSE = 0.2  # seconds between two reports of one thing
GLANCE = 1.0  # seconds between two looks at whether the driver lives, where its end is not heard of at once


def serve(connection: Connection, task: Task, device: str, threads: int) -> None:
    """Opens a task and answers jobs until the driver hangs up, interrupts or is gone.

    Sends ``("ready",)`` once the task is open, then for every job ``("outcome", outcome)`` or ``("error", error)``, and
    ``("progress", what, done, total, values)`` and ``("notice", sentence, key)`` in between.
    """
    os.setsid()  # Ctrl-C in the terminal reaches the driver alone, which passes it on, once
    threading.Thread(target=_end_with_the_driver, daemon=True).start()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with (
        suppress(KeyboardInterrupt, EOFError, BrokenPipeError),
        told_to(lambda sentence, key: connection.send(("notice", sentence, key))),
    ):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        try:
            torch.set_num_threads(threads)
            if torch.device(device).type == "cuda":
                torch.cuda.set_device(device)
            evaluate = task.open(device, Reports(lambda *state: connection.send(("progress", *state))))
        except Exception as error:
            connection.send(("error", portable(error)))
            return
        connection.send(("ready",))
        while True:
            job = connection.recv()
            try:
                answer = ("outcome", outcome_of(evaluate, job, device))
            except Exception as error:
                answer = ("error", portable(error))
            connection.send(answer)


class Reports:
    """A progress callback that passes on the first report of a thing, the last, and now and then one in between."""

    def __init__(self, send: Callable[..., None], pause: float = PAUSE) -> None:
        self._send, self._pause = send, pause
        self._what, self._told = "", 0.0

    def __call__(self, what: str, done: int, total: int, values: Mapping[str, Any] | None = None) -> None:
        now = time.monotonic()
        if done >= total or what != self._what or now - self._told >= self._pause:
            self._what, self._told = what, now
            self._send(what, done, total, dict(values or {}))


def portable(error: Exception) -> Exception:
    """The error, or one that says the same, such that it survives a pipe; where it arose stands in a note."""
    error.add_note("in a worker process:\n" + "".join(traceback.format_exception(error)))
    with suppress(Exception):
        pickle.loads(pickle.dumps(error))
        return error
    plain = InputError(str(error)) if isinstance(error, InputError) else RuntimeError(said(error))
    for note in error.__notes__:
        plain.add_note(note)
    return plain


def _end_with_the_driver() -> None:
    """Kills this process and its children once the process that started it is gone."""
    driver = multiprocessing.parent_process()
    while driver.is_alive() and os.getppid() == driver.pid:
        driver.join(GLANCE)
    os.killpg(0, signal.SIGKILL)
