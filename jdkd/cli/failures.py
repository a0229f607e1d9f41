"""From what goes wrong while a command writes to a sentence that helps."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jdkd.errors import InputError
from jdkd.run_folder import RunFolder

_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


class Interrupted(Exception):
    """Ctrl-C during a run that can be carried on; the message says what was kept."""


@contextmanager
def keeping(run: RunFolder, kept: Callable[[], str]) -> Iterator[None]:
    """Say of a run that ends early what became of it.

    Args:
        run: the folder that the block writes to.
        kept: says what is still there after Ctrl-C, in words; asked then.

    Raises:
        Interrupted: in place of KeyboardInterrupt, once the run has begun.
        InputError: in place of errors about a full or forbidden disk. Where the block raised one itself, and
            before anything was written, the folder is given back.
    """
    try:
        yield
    except KeyboardInterrupt:
        if not run.file.is_file():
            raise
        raise Interrupted(f"{run.path} keeps {kept()}") from None
    except InputError:
        run.withdraw()
        raise
    except Exception as error:
        name = getattr(error, "filename", None) or run.path
        if full_disk(error):
            raise InputError(
                f"the disk is full, {name} was not written; make room, then carry on with --resume."
            ) from error
        if isinstance(error, OSError) and error.errno in _FORBIDDEN:
            raise InputError(f"{name} cannot be written ({error.strerror}); give another folder.") from error
        raise


def full_disk(error: BaseException) -> bool:
    """Whether an error says that there is no room; SQLite and safetensors say so in words only."""
    words = str(error).lower()
    return getattr(error, "errno", None) in _FULL or "no space left" in words or "disk is full" in words
