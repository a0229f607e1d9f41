"""Files that appear whole or not at all."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from jdkd.errors import InputError


def write_whole(file: Path, content: str | bytes | memoryview) -> None:
    """Puts ``content`` in the place of ``file`` at once; until then, what was there stays.

    Args:
        file: where to; its folder exists.
        content: text (UTF-8) or bytes.

    Raises:
        InputError: the disk is full, or the folder cannot be written.
    """
    partial = file.with_name(f".{file.name}.partial")
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


def unwritable(file: Path, error: OSError) -> InputError:
    """What to tell the user when ``file`` cannot be written."""
    return InputError(
        f"cannot write {file} ({error.strerror}); what was there before is intact: make room on that disk or give "
        "another folder, then resume."
    )
