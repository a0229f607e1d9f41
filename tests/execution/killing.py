"""Kills a command that can be carried on, and processes of its own, at random moments until it is through."""

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.execution.processes import alive, soon

ROOT = Path(__file__).parents[2]
AT_MOST = 4.0  # seconds from the first sign of work to a kill


@dataclass
class Told:
    """What became of the command: who was killed, and the lines that it printed after each start.

    ``before`` holds for each start what ``finished`` said then.
    """

    killed: list[str] = field(default_factory=list)
    lines: list[list[str]] = field(default_factory=list)
    before: list[set[int]] = field(default_factory=list)


def killed_until_through(
    command: Sequence[str], victims: Sequence[str], finished: Callable[[], set[int]], seed: int = 0
) -> Told:
    """Kills with signal 9 one after the other.

    Args:
        command: prints a line whenever something goes on; the same command carries on after a kill.
        victims: ``"driver"`` or ``"worker"``, in this order; who is left when the command is through is spared.
        finished: says what is finished for good, asked before every start.
        seed: of the moments.

    Raises:
        AssertionError: a process outlived its driver, or the command failed.
    """
    told, left, moments = Told(), list(victims), random.Random(seed)
    alone = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    while True:
        told.before.append(finished())
        told.lines.append([])
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=alone) as driver:
            reader = threading.Thread(target=lambda out=driver.stdout: told.lines[-1].extend(out))
            reader.start()
            while left and driver.poll() is None:
                mark = len(told.lines[-1])
                soon(lambda mark=mark: len(told.lines[-1]) > mark or driver.poll() is not None, 300)
                time.sleep(moments.uniform(0, AT_MOST))
                workers = children(driver.pid)
                if driver.poll() is not None or (left[0] == "worker" and not workers):
                    continue
                told.killed.append(left.pop(0))
                os.kill(driver.pid if told.killed[-1] == "driver" else moments.choice(workers), signal.SIGKILL)
                if told.killed[-1] == "driver":
                    driver.wait()
                    left_alone = soon(lambda workers=workers: not any(map(alive, workers)), 90)
                    assert left_alone, "a worker outlived its driver by more than it takes to load"
            reader.join()
            code = driver.wait()
        if code != -signal.SIGKILL:
            assert code == 0
            return told


def children(pid: int) -> list[int]:
    """The worker processes of a driver."""
    try:
        found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return [child for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    except OSError:
        return []
