"""See :class:`RunFolder`."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from jdkd.errors import InputError
from jdkd.files import LOCK, claim_folder, lock_folder, read_json, unlock_folder, write_json

RUN_FILE = "run.json"
FORMAT = 2  # of the record; 1 told data and weights apart by where they lay


class RunFolder:
    """A folder that belongs to one run, and says which: its `run.json` holds command, settings and state.

    A run is told from another by its kind and its identity: what a resumed run must have in common with the one
    that it carries on. That is what data, weights and settings are (fingerprints, seeds, budgets), never where they
    lie or what they run on: folders may be renamed, the device and the number of workers may change.

    From `begin` until `finish`, `close` or the end of the process, other processes may not begin in it or carry it on.

    Args:
        path: the folder; it need not exist yet.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.file = self.path / RUN_FILE
        self._is_new = self._is_ours = False

    def begin(
        self,
        kind: str,
        identity: Mapping[str, Any],
        *,
        resume: bool = False,
        command: Sequence[str] = (),
        where: Mapping[str, Any] | None = None,
    ) -> bool:
        """Take the folder for a run, or carry on the run that is in it.

        Args:
            kind: `train`, `search` and so on.
            identity: JSON-able settings that make this run the one it is.
            resume: carry on what the folder holds; an empty folder is begun all the same.
            command: how the run was called, for the record.
            where: JSON-able facts that are no part of the identity, such as the paths of the data and the device; a
                resumed run records its own.

        Returns:
            Whether a run that was in the folder is carried on.

        Raises:
            InputError: the folder holds another run, or one with other settings, or files that no run left
                there, or another process is at work in it, or it cannot be written to. Nothing has been written then.
        """
        wanted = json.loads(json.dumps(identity))
        found = self.require(kind, resume=resume)
        if found is None:
            self._is_new = claim_folder(self.path, "the folder of the run")
            lock_folder(self.path, "the folder of the run")
            self._require_empty()  # still, now that nobody else may write
            record = {
                "format": FORMAT,
                "kind": kind,
                "identity": wanted,
                "where": dict(where or {}),
                "command": list(command),
                "versions": versions(),
            }
            self._write({**record, "started": _now(), "finished": None})
            self._is_ours = True
            return False
        self._require_same(found["identity"], wanted)
        claim_folder(self.path, "the folder of the run")
        lock_folder(self.path, "the folder of the run")  # of a finished run too, whose results are written once more
        found = self.read() or found  # which another may have finished before it let go
        if where is not None and json.loads(json.dumps(where)) != found["where"]:
            self._write({**found, "where": dict(where)})
        return True

    def require(self, kind: str, known: Mapping[str, Any] | None = None, *, resume: bool) -> dict[str, Any] | None:
        """Refuses what `begin` would refuse, as far as it can be told by now, and writes nothing.

        Args:
            kind: as for `begin`.
            known: what is known of the identity so far.
            resume: as for `begin`.

        Returns:
            The record of the run that is to be carried on, or None.

        Raises:
            InputError: the folder holds another run, or one with other settings, or files that no run left there.
        """
        found = self.read()
        if found is None:
            self._require_empty()
            return None
        state = "finished" if found["finished"] else "unfinished"
        if not resume:
            raise InputError(
                f"{self.path} already holds a run ({state} `jdkd {found['kind']}` of {found['started']}); "
                "give another folder, or --resume to carry it on."
            )
        if found["kind"] != kind:
            raise InputError(
                f"{self.path} holds a `jdkd {found['kind']}` and cannot be resumed as `jdkd {kind}`; give "
                "its own folder."
            )
        if found["format"] != FORMAT:
            raise InputError(
                f"{self.path} was begun by another version of jdkd, whose record (format {found['format']}, here "
                f"{FORMAT}) does not say what data it was; give another folder."
            )
        wanted = json.loads(json.dumps(known or {}))
        self._require_same({name: found["identity"].get(name) for name in wanted}, wanted)
        return found

    def finish(self, **facts: Any) -> None:
        """Record that the run came to its end, with JSON-able facts beside it."""
        self._write({**(self.read() or {}), **facts, "finished": _now()})
        self.close()

    def close(self) -> None:
        """Let other processes into the folder again; what the run has not finished can be resumed by any."""
        unlock_folder(self.path)

    def withdraw(self) -> None:
        """Undo `begin` where it was this object that began, and nothing else has been written since."""
        if self._is_ours and {entry.name for entry in self.path.iterdir()} <= {RUN_FILE, LOCK}:
            self.file.unlink()
            self.close()
            (self.path / LOCK).unlink()
            if self._is_new:
                self.path.rmdir()

    def read(self) -> dict[str, Any] | None:
        """The record of the run in the folder, or None.

        Raises:
            InputError: there is one that cannot be read.
        """
        try:
            if not self.file.is_file():
                return None
        except OSError:  # a name that no file can have
            return None
        record = read_json(self.file, "give another folder")
        is_whole = isinstance(record, dict) and {"kind", "identity", "started"} <= record.keys()
        if not is_whole or not all(isinstance(record.get(name, {}), dict) for name in ("identity", "where")):
            got = f"has {', '.join(map(str, record))}" if isinstance(record, dict) else f"is a {type(record).__name__}"
            raise InputError(
                f"{self.file} is not the record of a run: it {got}, not kind, identity and started, with objects as "
                "identity and where; give another folder."
            )
        return {"format": 1, "finished": None, "where": {}, **record}

    def _require_same(self, before: Any, now: Any) -> None:
        """Raise InputError where two identities, as JSON has them, differ."""
        if differing := list(_differences(before, now)):
            raise InputError(
                f"{self.path} cannot be resumed with other settings: {'; '.join(differing)}; resume with the "
                "same, or give another folder."
            )

    def _require_empty(self) -> None:
        """Raise InputError where the folder is a file or holds something that is not ours."""
        try:
            if self.path.exists() and not self.path.is_dir():
                raise InputError(f"{self.path} is a file and cannot hold a run; give a folder.")
            if self.file.is_dir():
                raise InputError(f"{self.file} is a folder, so {self.path} is not the folder of a run; give another.")
            found = {entry.name for entry in self.path.iterdir()} if self.path.is_dir() else set()
        except OSError:  # what is wrong with it is said where it is made
            return
        if RUN_FILE in found:
            raise InputError(f"{self.path} was taken for another run just now; give another folder.")
        if strangers := sorted(found - {LOCK}):
            raise InputError(
                f"{self.path} holds {', '.join(strangers[:3])}{' and more' if len(strangers) > 3 else ''} "
                f"but no {RUN_FILE}, so it is not the folder of a run; give an empty or a new one."
            )

    def _write(self, record: Mapping[str, Any]) -> None:
        write_json(self.file, record)


def versions() -> dict[str, str]:
    """Versions of what the numbers of a run depend on; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for package in ("jdkd", "torch", "torchvision", "triton", "numpy", "pycocotools", "faster-coco-eval"):
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Yield `name was ... and is ...` for every leaf that differs between two JSON values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            inner = f"{name}.{key}" if name else key
            yield from _differences(before.get(key), now.get(key), inner)
    elif before != now:
        yield f"{name} was {json.dumps(before)} and is {json.dumps(now)}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
