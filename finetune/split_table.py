"""The table of a run's images: which were trained on, which are held out, and with what content.

`split.csv` holds what a run was started with and is never written again. What a resumed run found different is appended to
`split.resumed.csv`, so that every later process knows all that was ever trained on. Columns:

    file     path below the root of the data, with forward slashes
    label    name of the class
    split    train, val or test; unused (known, neither trained on nor measured) or, when the file is gone, removed
    size     bytes
    digest   hash of the content (blake2b, 16 bytes); empty where it is not known
    epoch    in split.resumed.csv: how many epochs were done when the row was written
    base     in split.resumed.csv: the digest of the split.csv that it continues

Tables of older versions have the first three columns only.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, get_args

from finetune.errors import DataError
from finetune.escaping import cells, from_cell
from finetune.files import write_atomically

TABLE, RESUMED = "split.csv", "split.resumed.csv"
Role: TypeAlias = Literal["train", "val", "test", "unused", "removed"]
ROLES: tuple[Role, ...] = get_args(Role)
_FIRST, _MORE, _LAST = ["file", "label", "split"], ["size", "digest"], ["epoch", "base"]


class Row(NamedTuple):
    """An image as a run knew it.

    Attributes:
        file: Path below the root.
        label: Name of its class.
        role: What it was used for.
        size: Bytes; 0 if not known.
        digest: Hash of its content; empty if not known.
        epoch: Epochs that were done when it was written down.
    """

    file: str
    label: str
    role: Role
    size: int = 0
    digest: str = ""
    epoch: int = 0


@dataclass(frozen=True)
class SplitTable:
    """All that a run knew of its images.

    Attributes:
        start: The images that it was started with.
        later: What resumed runs found different, in order.
    """

    start: tuple[Row, ...]
    later: tuple[Row, ...] = ()

    @property
    def rows(self) -> tuple[Row, ...]:
        """All rows, the oldest first."""
        return self.start + self.later

    @cached_property
    def base(self) -> str:
        """The digest of what the run was started with."""
        return _digest(self.start)

    @cached_property
    def digest(self) -> str:
        """The digest of all rows, by which a checkpoint says which table it belongs to."""
        return self._digests[-1]

    @cached_property
    def _digests(self) -> list[str]:
        found, text = [self.base], hashlib.blake2b(self.base.encode(), digest_size=16)
        for row in self.later:
            text.update(_line(row))
            found.append(text.copy().hexdigest())
        return found

    def knows(self, digest: str) -> bool:
        """Return whether this is the table of a checkpoint that noted a digest, perhaps with rows that came later."""
        return digest in self._digests

    def with_rows(self, rows: Iterable[Row]) -> SplitTable:
        """Return the table with more rows at the end."""
        return SplitTable(self.start, self.later + tuple(rows))


def _line(row: Row) -> bytes:
    return "\0".join((row.file, row.label, row.role, row.digest, "")).encode("utf-8", "surrogateescape")


def _digest(rows: Iterable[Row]) -> str:
    """Hash rows in the order of their paths; without the size, which follows from the content."""
    text = hashlib.blake2b(digest_size=16)
    for row in sorted(rows):
        text.update(_line(row))
    return text.hexdigest()


def read_table(run: Path) -> SplitTable | None:
    """Read the table of a run, or return None if it has none.

    Raises:
        DataError: If a file of it cannot be read.
    """
    if not (run / TABLE).is_file():
        return None
    start = SplitTable(tuple(row for row, _ in _read(run / TABLE)))
    if not (run / RESUMED).is_file():
        return start
    return start.with_rows(row for row, base in _read(run / RESUMED) if base == start.base)


def write_table(run: Path, table: SplitTable) -> None:
    """Write what a run was started with, where that is not written yet, and what came later, if anything did."""
    run.mkdir(parents=True, exist_ok=True)
    before = read_table(run)
    if before is None or before.base != table.base:
        full = any(row.size or row.digest for row in table.start)
        _write(run / TABLE, _FIRST + _MORE * full, ([*_texts(row)[: 3 + 2 * full]] for row in table.start))
    if table.later and (before is None or before.digest != table.digest):
        _write(run / RESUMED, _FIRST + _MORE + _LAST, ([*_texts(row), str(row.epoch), table.base] for row in table.later))


def _texts(row: Row) -> list[str]:
    return [*cells([row.file, row.label]), row.role, str(row.size), row.digest]


def _write(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode("utf-8", "surrogateescape"))


def _read(path: Path) -> list[tuple[Row, str]]:
    try:
        with path.open(newline="", encoding="utf-8", errors="surrogateescape") as handle:
            reader = csv.reader(handle)
            columns = next(reader, [])
            if columns[: len(_FIRST)] != _FIRST:
                raise ValueError(f"its columns are {', '.join(columns[:5]) or 'missing'}, expected {', '.join(_FIRST)}")
            return [_row(dict(zip(columns, values, strict=True))) for values in reader]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(
            f"{path} cannot be read as the table of a run's images: {error}. It says which images were trained on: restore it."
        ) from error


def _row(cell: dict[str, str]) -> tuple[Row, str]:
    role = next((each for each in ROLES if each == cell["split"]), None)
    if role is None:
        raise ValueError(f"'{cell['split'][:40]}' is no split, expected {', '.join(ROLES)}")
    row = Row(
        from_cell(cell["file"]),
        from_cell(cell["label"]),
        role,
        int(cell.get("size") or 0),
        cell.get("digest") or "",
        int(cell.get("epoch") or 0),
    )
    return row, cell.get("base") or ""
