"""Files that appear whole or not at all, and folders that one process writes to."""

import errno
import fcntl
import hashlib
import json
import os
import platform
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from jdkd.errors import InputError, said

LOCK = ".lock"
Built = TypeVar("Built")


def write_whole(file: Path, content: str | bytes | memoryview, *, shared: bool = False) -> None:
    """Puts ``content`` in the place of ``file`` at once; until then, what was there stays.

    Args:
        file: where to; its folder exists.
        content: text (UTF-8) or bytes.
        shared: whether other processes may write it at the same time; the last one stays.

    Raises:
        InputError: the disk is full, or the folder cannot be written.
    """
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial" if shared else f".{file.name}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
    except OSError as error:
        raise unwritable(file, error) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_json(file: Path, content: Any) -> None:
    """Writes ``content`` as indented JSON; see :func:`write_whole`."""
    write_whole(file, json.dumps(content, indent=2) + "\n")


def read_text(file: Path, remedy: str) -> str:
    """The UTF-8 text in ``file``.

    Args:
        file: what to read.
        remedy: what to do where it cannot be read, for the message.

    Raises:
        InputError: the file cannot be read, or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}); {remedy}.") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}); {remedy}.") from None


def read_json(file: Path, remedy: str) -> Any:
    """The JSON in ``file``; arguments and errors as of :func:`read_text`, and text that is not JSON is refused too."""
    try:
        return json.loads(read_text(file, remedy))
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON ({error}); {remedy}.") from None


def read_as(build: Callable[[Any], Built], file: Path, remedy: str) -> Built:
    """What ``build`` makes of the JSON in ``file``; as :func:`read_json`, and JSON of something else is refused too."""
    content = read_json(file, remedy)
    try:
        return build(content)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{file} holds something else than it should ({said(error)}); {remedy}.") from None


def sha256_of(file: Path) -> str:
    """SHA-256 of a file, as `sha256sum` prints it.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror}); give a file that can.") from None


def content_hash(*files: Path) -> str:
    """What the files hold, wherever they lie: SHA-256 of their own SHA-256, one after the other, in hexadecimal digits.

    Raises:
        InputError: one cannot be read.
    """
    return hashlib.sha256(b"".join(bytes.fromhex(sha256_of(file)) for file in files)).hexdigest()


def cache_folder() -> Path | None:
    """Where what can be made anew is kept: ``JDKD_CACHE``, or ``jdkd`` in the user's cache folder; None without one."""
    if named := os.environ.get("JDKD_CACHE"):
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jdkd"
    except RuntimeError:  # no home
        return None


def claim_folder(folder: Path, name: str) -> bool:
    """Makes sure that ``folder`` is there and can be written to.

    Args:
        folder: made with its parents if it is missing.
        name: the argument that named it, for the message.

    Returns:
        Whether it was made now.

    Raises:
        InputError: it cannot be made or written to: a file stands there or on the way, a link leads nowhere, the
            name is too long, the disk is read-only. Folders that were made on the way are removed again.
    """
    made: list[Path] = []
    try:
        if not folder.is_dir():
            for part in (*reversed(folder.parents), folder):
                if not part.is_dir():
                    part.mkdir()
                    made.append(part)
        probe = folder / f".{os.getpid()}.partial"
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as error:
        for part in reversed(made):
            with suppress(OSError):
                part.rmdir()
        raise InputError(
            f"{name} {_shortened(folder)} cannot be a folder to write to: {_obstacle(folder, error)}; give another."
        ) from None
    return bool(made)


_locks: dict[tuple[int, int], int] = {}  # what this process holds: device and inode of the file -> its descriptor


def lock_folder(folder: Path, name: str) -> None:
    """Keeps other processes out of ``folder`` until this one ends, however it does, or :func:`unlock_folder`.

    The kernel holds the lock (POSIX, on the file ``.lock``), so none outlives its process, and children do not inherit
    it. Where this process has it already, nothing happens; on a file system without locks, neither.

    Args:
        folder: there, and writable.
        name: the argument that named it, for the message.

    Raises:
        InputError: another process holds it.
    """
    file = folder / LOCK
    if _identity(file) in _locks:  # not opened again: to close one descriptor of a file gives up all locks on it
        return
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(descriptor, 100).decode(errors="replace")
        os.close(descriptor)
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return
        raise InputError(
            f"{name} {_shortened(folder)} is written to by another process ({holder}); wait until it has ended, or "
            "give another folder."
        ) from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()} on {platform.node()}".encode())
    _locks[_identity(file)] = descriptor


def unlock_folder(folder: Path) -> None:
    """Lets other processes into ``folder`` again; nothing happens where this one has not locked it."""
    descriptor = _locks.pop(_identity(folder / LOCK), None)
    if descriptor is not None:
        os.close(descriptor)


def _identity(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def starts_with(file: Path, begins: str) -> bool:
    """Whether ``file`` begins so, read no further."""
    with file.open("rb") as stream:
        return stream.read(len(begins.encode())) == begins.encode()


def require_file(file: Path, name: str, begins: str = "", holds: str = "") -> None:
    """Checks before any work that ``file`` can be written afterwards; what stands there is untouched.

    Args:
        file: where a result is to go; its folder exists.
        name: the argument that named it, for the message.
        begins: how every such result begins. A file that begins otherwise is not written over.
        holds: what stands somewhere in every such result; likewise.

    Raises:
        InputError: it cannot, or holds something else, the annotations of a data set for example.
    """
    partial = file.with_name(f".{file.name}.partial")
    try:
        there = file.is_file() and file.stat().st_size
        if there and not (starts_with(file, begins) and (not holds or holds.encode() in file.read_bytes())):
            raise FileExistsError(errno.EEXIST, "it holds something else, which would be lost")
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if file.is_symlink() and not file.exists():
            raise FileNotFoundError(errno.ENOENT, "a link that leads nowhere")
        partial.touch()
        partial.unlink()
    except (OSError, ValueError) as error:
        obstacle, remedy = _obstacle(file, error), "give another file"
        if isinstance(error, FileNotFoundError) and not _parent_is_there(file):
            obstacle, remedy = f"the folder {_shortened(file.parent)} does not exist", "make it, or give another file"
        raise InputError(f"{name} {_shortened(file)} cannot be written: {obstacle}; {remedy}.") from None


def _parent_is_there(file: Path) -> bool:
    """Whether the folder of a file is there, or a link stands in its place or on the way."""
    return file.parent.exists() or any(part.is_symlink() for part in (file, *file.parents))


def _obstacle(path: Path, error: Exception) -> str:
    """Why ``path`` cannot be made, as far as a look tells."""
    with suppress(OSError, ValueError):
        for part in (path, *path.parents):
            if part.is_symlink() and not part.exists():
                return f"{part} is a link to {os.readlink(part)}, which does not exist"
            if part.exists() and not part.is_dir() and part != path:
                return f"{part} is a file"
            if not part.exists() and part.parent.is_dir() and getattr(error, "errno", None) == errno.ENOENT:
                return f"{part} does not exist and cannot be made"
    return getattr(error, "strerror", None) or str(error)


def _shortened(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:90]}...{text[-60:]}"


def unwritable(file: Path, error: OSError) -> InputError:
    """What to tell the user when ``file`` cannot be written."""
    return InputError(
        f"cannot write {file} ({error.strerror}); what was there before is intact: make room on that disk or give "
        "another folder, then resume."
    )
