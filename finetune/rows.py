"""A table that is written in pieces: whole or not there under its name, and continued after whatever interrupted it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from finetune.errors import ConfigError
from finetune.files import require_free
from finetune.schema import read_json

Count = Annotated[int, Meta(ge=0)]


@dataclass
class _State:
    """What `NAME.part.json` says."""

    rows: Count
    failed: Count
    last: str
    bytes: Count
    options: dict[str, Any]


class GrowingFile:
    """A file that grows by whole pieces beside its place, `NAME.part`, until it is complete.

    After each piece, a second file (`NAME.part.json`) says how far it goes, so that nothing half written is believed: whoever
    opens the same file again with the same options goes on after the last piece.

    Args:
        target: The place of the complete file.
        options: What the content depends on, as plain values.
        overwrite: Replace what is in the way: a complete file, or an incomplete one of other options.

    Attributes:
        rows: How many rows there are already.
        last: The key of the last of them.
        failed: How many of them say that something failed.

    Raises:
        ConfigError: If something is in the way, or the place cannot be written.
    """

    def __init__(self, target: Path, options: Mapping[str, Any], overwrite: bool = False) -> None:
        if target.is_dir():
            raise ConfigError(f"{target} is a folder, expected the name of a file to write: give another --out.")
        require_free(target, overwrite)
        self.target = target
        self.options = dict(options)
        self.partial = target.with_name(f"{target.name}.part")
        self.progress = target.with_name(f"{target.name}.part.json")
        self._beside = self.progress.with_name(f"{self.progress.name}.part")
        self.rows, self.last, self.failed, self._bytes = 0, "", 0, 0
        self._continue(overwrite)
        with self._telling():
            self._handle = self.partial.open("r+b" if self.rows else "wb")
            self._handle.truncate(self._bytes)
            self._handle.seek(self._bytes)

    def _continue(self, overwrite: bool) -> None:
        try:
            state = asdict(read_json(self.progress, _State, "how far a table goes", error=ConfigError))
            complete = self.partial.stat().st_size >= state["bytes"]
        except (OSError, ConfigError):
            return
        differ = [name for name, value in self.options.items() if state["options"].get(name) != value]
        if differ and not overwrite:
            lines = "".join(f"\n  {name}: {state['options'].get(name)!r} then, {self.options[name]!r} now" for name in differ)
            raise ConfigError(
                f"{self.partial} holds {state['rows']} rows of a run that was interrupted and had other options:{lines}\n"
                "Repeat them to go on with it, give another --out, or --overwrite to begin anew."
            )
        if complete and not differ:
            self.rows, self.last, self.failed, self._bytes = (state[name] for name in ("rows", "last", "failed", "bytes"))

    def begin_anew(self) -> None:
        """Drop the rows that are there already."""
        self.rows, self.last, self.failed, self._bytes = 0, "", 0, 0
        with self._telling():
            self._handle.truncate(0)
            self._handle.seek(0)

    def append(self, content: bytes, rows: int, last: str, failed: int = 0) -> None:
        """Add a piece.

        Args:
            content: What to write.
            rows: How many rows it has.
            last: A key of its last row.
            failed: How many of them say that something failed.

        Raises:
            ConfigError: If it cannot be written; what was there before stays.
        """
        state = {
            "rows": self.rows + rows,
            "failed": self.failed + failed,
            "last": last,
            "bytes": self._bytes + len(content),
            "options": self.options,
        }
        with self._telling():
            self._handle.write(content)
            self._handle.flush()
            self._beside.write_text(json.dumps(state))
            os.replace(self._beside, self.progress)
        self._bytes += len(content)
        self.rows, self.failed, self.last = self.rows + rows, self.failed + failed, last

    def finish(self) -> None:
        """Move the file to its place.

        Raises:
            ConfigError: If that cannot be done.
        """
        with self._telling():
            os.fsync(self._handle.fileno())
            self._handle.close()
            os.replace(self.partial, self.target)
        self.progress.unlink(missing_ok=True)

    def close(self) -> None:
        """Leave the file as far as it is, and nothing if there is nothing in it yet."""
        with contextlib.suppress(OSError):
            self._handle.close()
        for path in (self._beside, *(() if self.rows else (self.partial, self.progress))):
            with contextlib.suppress(OSError):
                path.unlink()

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(f"{self.target} cannot be written: {error.strerror or error}. Give another --out.") from error
