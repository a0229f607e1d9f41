"""Which processes there are."""

import time
from pathlib import Path


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def soon(condition, seconds=30.0) -> bool:
    """Waits until a condition holds."""
    end = time.monotonic() + seconds
    while not (holds := condition()) and time.monotonic() < end:
        time.sleep(0.01)
    return bool(holds)


def pids(marks, kind="opened") -> set[int]:
    """The processes that left marks of a kind."""
    return {int(file.name.split("-")[-1]) for file in marks.glob(f"{kind}-*")}
