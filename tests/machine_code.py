"""Reads machine code with the tools that come with Triton or the CUDA toolkit, without a GPU."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import pytest

from jdkd import _ext


def run_tool(name: str, *arguments: str | Path) -> str:
    """What ``cuobjdump`` or ``nvdisasm`` prints; a test is skipped where there is none."""
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name if triton else Path()
    program = bundled if bundled.is_file() else shutil.which(name)
    if program is None:
        pytest.skip(f"{name} is neither in triton nor on PATH")
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=300, check=True).stdout


def nvidia_package(file: str) -> list[Path]:
    """Where NVIDIA's packages hold a file, such as ``cu13/include``."""
    spec = importlib.util.find_spec("nvidia")
    places = [Path(root) / file for root in (spec.submodule_search_locations if spec else [])]
    return [place for place in places if place.exists()]


@functools.cache
def of_extension(*options: str) -> str:
    """What ``cuobjdump`` says of ``jdkd._C``; a test is skipped where that holds no machine code."""
    if _ext.library() is None:
        pytest.skip(_ext.why_missing())
    if not _ext.build_info()["cuda_ops"]:
        pytest.skip("jdkd._C was built without CUDA code")
    return run_tool("cuobjdump", *options, _ext.library())


@functools.cache
def kernels_of_extension() -> dict[tuple[str, str], str]:
    """The machine code of ``jdkd._C`` by architecture, ``sm_90a`` for example, and mangled name of the kernel."""
    found = {}
    for binary in re.split(r"^arch = ", of_extension("-sass"), flags=re.MULTILINE)[1:]:
        architecture = binary.split(maxsplit=1)[0]
        for kernel in binary.split("Function : ")[1:]:
            found[architecture, kernel.split(maxsplit=1)[0]] = kernel
    return found


@functools.cache
def resources_of_extension() -> dict[tuple[str, str], dict[str, int]]:
    """``REG``, ``STACK``, ``SHARED`` and ``LOCAL`` of every kernel of ``jdkd._C``, by architecture and mangled name."""
    found = {}
    for binary in re.split(r"^arch = ", of_extension("-res-usage"), flags=re.MULTILINE)[1:]:
        architecture = binary.split(maxsplit=1)[0]
        for name, usage in re.findall(r"Function (\S+):\s+(REG:.*)", binary):
            found[architecture, name] = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", usage)}
    return found


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, and bytes of stack and local memory, of a kernel: ``REG``, ``STACK``, ``LOCAL``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        usage = run_tool("cuobjdump", "-res-usage", file.name)
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}


def instructions(cubins: list[bytes]) -> list[str]:
    """The instructions of every kernel for sm_90, two lines each, with their encodings: see ``scheduled_code``.

    The disassembler needs a third of a second to start and next to nothing for a kernel, so all are laid end to end.
    """
    codes = [_code(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        Path(file.name).write_bytes(b"".join(codes))
        text = run_tool("nvdisasm", "--binary", "SM90a", "-hex", file.name)
    lines = re.findall(r"^\s*(/\*[0-9a-f]{4,}\*/.*\n.*)$", text, re.MULTILINE)
    ends = [0]
    for code in codes:
        ends.append(ends[-1] + len(code) // 16)  # bytes an instruction
    assert len(lines) == ends[-1]
    return ["\n".join(lines[start:end]) for start, end in itertools.pairwise(ends)]


def _code(cubin: bytes) -> bytes:
    """The sections of instructions of an ELF file of 64 bits."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    named = cubin[sections[names][4] :]
    return b"".join(
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in sections
        if named[name:].startswith(b".text.")
    )
