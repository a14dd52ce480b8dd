"""A table that is written in pieces: complete or not there under its name, and continued after whatever interrupted it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from msgspec import Meta

from finetune.errors import ConfigError
from finetune.files import read_plain, require_free, write_atomically
from finetune.schema import decode_json
from finetune.version import __version__

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_FORMAT = 2
_END = 4096  # bytes
_MOST_BYTES = 2**26  # of the state; it repeats the arguments, which may be many
_open: set[tuple[int, int]] = set()  # files that this process writes; locks of the system hold between processes only
Count = Annotated[int, Meta(ge=0)]


@dataclass
class _State:
    """What `NAME.part.json` says; the file is ours only if all of it holds."""

    format: int
    written_by: str
    rows: Count
    failed: Count
    last: str
    bytes: Count
    options: dict[str, Any]
    file: list[int]
    end: str


class GrowingFile:
    """A file that grows by complete pieces beside its target, as `NAME.part`, until it is complete.

    After each piece, a second file (`NAME.part.json`) records how far it goes, so that nothing half written is believed:
    whoever opens the same file again with the same options continues after the last piece. The state also records which file
    it belongs to (device and inode, and a hash of its end, as a system gives the inode of a deleted file to the next): a
    `NAME.part` that is another file, or a link, is not ours and is neither written nor replaced.

    Args:
        target: The path of the complete file.
        options: What the content depends on, as plain values.
        overwrite: Replace what is in the way: a complete file, or an incomplete one of other options.

    Attributes:
        rows: How many rows there are already.
        last: The key of the last of them.
        failed: How many of them report a failure.

    Raises:
        ConfigError: If something is in the way, another process is writing the file, or it cannot be written.
    """

    def __init__(self, target: Path, options: Mapping[str, Any], overwrite: bool = False) -> None:
        require_free(target, overwrite)
        self.target = target
        self.options = dict(options)
        self.overwrite = overwrite
        self.partial = target.with_name(f"{target.name}.part")
        self.progress = target.with_name(f"{target.name}.part.json")
        self.rows, self.last, self.failed, self._bytes = 0, "", 0, 0
        self._created = self._begun = False
        with self._telling():
            self._handle = self._open_or_create()
            try:
                self._continue(overwrite)
                self._handle.truncate(self._bytes)
                self._handle.seek(self._bytes)
                if not self.rows:
                    self._write_state(0, 0, "", 0)  # so that the empty file is known as ours
                self._begun = True
            except BaseException:
                self.close()
                raise

    def _open_or_create(self) -> BinaryIO:
        """Open the partial file if it is ours, or create it; nobody else writes it as long as it is open."""
        state = self._state()
        with contextlib.suppress(OSError):
            found = self.partial.lstat()
            if (found.st_dev, found.st_ino) in _open:
                raise self._busy()
        if os.path.lexists(self.partial) or (state is None and os.path.lexists(self.progress)):
            if state is None:
                raise self._refusal()
            flags = os.O_RDWR
        else:
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        try:
            handle = os.fdopen(os.open(self.partial, flags | _NEVER, 0o666), "r+b")
        except FileExistsError:  # another process has just created it
            raise self._busy() from None
        except OSError as error:
            raise self._refusal() if self.partial.is_symlink() else error from None
        try:
            self._lock(handle)
            self._created = bool(flags & os.O_CREAT)
            if not self._created and not self._is_ours(handle):
                raise self._refusal()
        except BaseException:
            handle.close()
            raise
        _open.add(_identity(handle))
        return handle

    def _lock(self, handle: BinaryIO) -> None:
        if fcntl is not None:
            try:  # a lock of this process alone: those that it starts to read images do not hold it when it is gone
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise self._busy() from None
            except OSError:  # a file system without locks
                pass

    def _is_ours(self, handle: BinaryIO) -> bool:
        """Return whether an open file is the one that the state belongs to, and still the partial file."""
        state = self._state()
        if state is None or state["file"] != list(_identity(handle)) or not self._is_here(handle):
            return False
        if not state["bytes"]:
            return not os.fstat(handle.fileno()).st_size
        return bool(state["end"] == _end_of(handle, state["bytes"]))

    def _is_here(self, handle: BinaryIO) -> bool:
        """Return whether an open file still is the partial file."""
        with contextlib.suppress(OSError):
            found = self.partial.lstat()
            return stat.S_ISREG(found.st_mode) and (found.st_dev, found.st_ino) == _identity(handle)
        return False

    def _refusal(self) -> ConfigError:
        return ConfigError(
            f"{self.partial} or {self.progress} is in the way: they were not written by this version of resnet-finetune for "
            f"{self.target}, so they are neither continued nor replaced. Give another --out, or move them away."
        )

    def _busy(self) -> ConfigError:
        return ConfigError(
            f"Another process is writing {self.target}. Wait until it is done, or stop it; or give another --out."
        )

    def _state(self) -> dict[str, Any] | None:
        """Return the state of the partial file, or None if there is none that we wrote."""
        try:
            text = read_plain(self.progress, _MOST_BYTES)
            state = decode_json(text, _State, "how far a table goes", error=ConfigError, max_bytes=_MOST_BYTES)
        except (OSError, ConfigError):
            return None
        ours = state.format == _FORMAT and state.written_by.startswith("resnet-finetune ")
        return asdict(state) if ours else None

    def _continue(self, overwrite: bool) -> None:
        state = self._state()
        if state is None or self._created:
            return
        differ = [name for name, value in self.options.items() if state["options"].get(name) != value]
        if differ and state["rows"] and not overwrite:
            lines = "".join(f"\n  {name}: {state['options'].get(name)!r} then, {self.options[name]!r} now" for name in differ)
            raise ConfigError(
                f"{self.partial} holds {state['rows']} rows of a run that was interrupted and had other options:{lines}\n"
                "Repeat them to go on with it, give another --out, or --overwrite to begin anew."
            )
        if not differ:
            self.rows, self.last, self.failed, self._bytes = (state[name] for name in ("rows", "last", "failed", "bytes"))

    def begin_anew(self) -> None:
        """Drop the rows that are there already."""
        self.rows, self.last, self.failed, self._bytes = 0, "", 0, 0
        with self._telling():
            self._write_state(0, 0, "", 0)
            self._handle.truncate(0)
            self._handle.seek(0)

    def append(self, content: bytes, rows: int, last: str, failed: int = 0) -> None:
        """Add a piece.

        Args:
            content: What to write.
            rows: How many rows it has.
            last: A key of its last row.
            failed: How many of them report a failure.

        Raises:
            ConfigError: If it cannot be written; what was there before stays.
        """
        with self._telling():
            self._handle.write(content)
            self._handle.flush()
            self._write_state(self.rows + rows, self.failed + failed, last, self._bytes + len(content))
        self._bytes += len(content)
        self.rows, self.failed, self.last = self.rows + rows, self.failed + failed, last

    def _write_state(self, rows: int, failed: int, last: str, size: int) -> None:
        state = {"written_by": f"resnet-finetune {__version__}", "format": _FORMAT, "file": list(_identity(self._handle))}
        state |= {"rows": rows, "failed": failed, "last": last, "bytes": size, "options": self.options}
        state["end"] = _end_of(self._handle, size)
        write_atomically(self.progress, json.dumps(state), sync=False)

    def finish(self) -> None:
        """Move the file to its target.

        Raises:
            ConfigError: If that cannot be done, or something came in the way.
        """
        require_free(self.target, self.overwrite)
        with self._telling():
            os.fsync(self._handle.fileno())
            if not self._is_here(self._handle):
                raise self._refusal()
            os.replace(self.partial, self.target)
            self.progress.unlink(missing_ok=True)
        self._release()

    def close(self) -> None:
        """Leave the file as far as it is, and nothing if there is nothing in it yet."""
        if self._handle.closed:
            return
        with contextlib.suppress(OSError):
            if not self.rows and (self._created or self._begun) and self._is_here(self._handle):
                self.partial.unlink()
                if self._state() is not None:
                    self.progress.unlink()
        self._release()

    def _release(self) -> None:
        _open.discard(_identity(self._handle))
        with contextlib.suppress(OSError):
            self._handle.close()

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(f"{self.target} cannot be written: {error.strerror or error}. Give another --out.") from error


_NEVER = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


def _end_of(handle: BinaryIO, size: int) -> str:
    """Return a hash of the last bytes before a position."""
    handle.seek(max(0, size - _END))
    end = handle.read(min(_END, size))
    handle.seek(size)
    return hashlib.blake2b(end, digest_size=16).hexdigest()


def _identity(handle: BinaryIO) -> tuple[int, int]:
    found = os.fstat(handle.fileno())
    return found.st_dev, found.st_ino
