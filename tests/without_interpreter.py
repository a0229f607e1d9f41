"""Programs that compile Triton's kernels, in a process of their own: under ``TRITON_INTERPRET`` none can be compiled.

One process runs them all, one after the other, as it takes longer to load torch and Triton than to run one.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import json
import os
import runpy
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def printed_by(*module: str) -> str:
    """What ``python -m MODULE ...`` prints where kernels are compiled; a test is skipped where there is no Triton."""
    pytest.importorskip("triton", exc_type=ImportError)
    process = _started()
    process.stdin.write(json.dumps(module) + "\n")
    process.stdin.flush()
    is_well, text = json.loads(process.stdout.readline() or '[false, "the process is gone"]')
    assert is_well, text
    return text


@functools.cache
def _started() -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen([sys.executable, "-m", __name__], cwd=ROOT, env=environment, **pipes)
    atexit.register(process.communicate)  # it ends where its input does
    return process


def _run(module: str, *arguments: str) -> tuple[bool, str]:
    told, sys.argv[1:] = io.StringIO(), arguments
    try:
        with contextlib.redirect_stdout(told):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except BaseException:
        return False, traceback.format_exc()
    return True, told.getvalue()


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(_run(*json.loads(line))), flush=True)
