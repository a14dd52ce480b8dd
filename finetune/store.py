"""Rows of numbers that are computed once, kept in a memory-mapped file, and found again by what they depend on.

A store is a folder named after a hash of its key: everything that the rows depend on. It is made block by block, by as many
processes as want it at once: each takes a block that nobody has. A block counts when its mark says so, which is written after
it; a process that is killed leaves its finished blocks to the next. The store counts as made when its description is there.

    <cache>/kept/<hash>/about.json   what it is, for people; written when the rows are complete
                        rows         the numbers, row after row
                        done         a byte per block: 1 when its rows are written; until all are
                        lock-N       held by the process that computes block N
                        .resnet-finetune  marks the folder as ours; what has none is never deleted
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import mmap
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from filelock import FileLock, Timeout
from tabulate import tabulate

from finetune.allocation import allocate
from finetune.errors import DataError, FinetuneError
from finetune.file_state import file_state
from finetune.files import MARK, is_ours, mark_folder, remove_ours, write_atomically
from finetune.sample import cache_folder
from finetune.schema import read_json

Rows = np.ndarray[Any, np.dtype[Any]]
Load = Callable[[Sequence[range]], Iterator[Any]]
Compute = Callable[[Any], Rows | list[Rows]]

BLOCK = 64  # rows
_ABOUT, _ROWS, _DONE, _LOCK = "about.json", "rows", "done", "lock"
_NAMES = (_ABOUT, _ROWS, _DONE, _LOCK, f"{_LOCK}-*")  # all that a store may hold, beside its mark
_VERSION = 2  # of the way from a file to a row; a change makes all that is kept void
_FREE = 2**28  # bytes of the disk that are left alone


class _About(TypedDict, total=False):
    what: int | str
    pictures: int | str
    shape: list[int]


@dataclass(frozen=True)
class Kept:
    """One store as `resnet-finetune reuse` lists it.

    Attributes:
        folder: Where it is.
        about: Its description; empty if it was never completed.
        bytes: What it takes on the disk.
        used: When it was last used, in seconds since 1970.
    """

    folder: Path
    about: dict[str, Any]
    bytes: int
    used: float


def kept_folder() -> Path:
    """Return the folder of all stores."""
    return cache_folder() / "kept"


def file_identity(path: str | os.PathLike[str]) -> str:
    """Return what a file is known by: its absolute path and its state.

    Raises:
        DataError: If there is no such file.
    """
    try:
        return "\0".join(map(str, (os.path.abspath(path), *file_state(path))))
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error.strerror or error}. Check the path and its permissions.") from error


def pictures_key(paths: Sequence[str], transform: str, random: Sequence[int] | None = None) -> dict[str, Any]:
    """Return what pictures depend on when they were read and transformed.

    Args:
        paths: The files.
        transform: What was done to them, with its parameters.
        random: What its random choices follow from, if it makes any.
    """
    files = hashlib.blake2b(digest_size=16)
    for path in paths:
        files.update(f"{file_identity(path)}\n".encode("utf-8", "surrogateescape"))
    versions = [_VERSION, *(version(package) for package in ("torch", "torchvision", "pillow"))]
    return {"files": files.hexdigest(), "transform": transform, "random": random, "versions": versions}


def key_hash(key: Mapping[str, Any]) -> str:
    """Hash what rows depend on.

    >>> key_hash({"a": 1, "b": [2.0]}) == key_hash({"b": [2.0], "a": 1})
    True
    """
    text = json.dumps(key, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Store:
    """Rows of one shape, found by their key.

    Args:
        key: All that the rows depend on, as plain values.
        shape: The shape of all rows together: their number first.
        dtype: Their kind of number.
        about: A description for people, as plain values.
        root: The folder of all stores.
        used: Returns the bytes of each row that will be filled, where rows are filled in part only; the rest takes no disk
            space on file systems with sparse files. It is called before rows are made.
    """

    def __init__(
        self,
        key: Mapping[str, Any],
        shape: tuple[int, ...],
        dtype: str = "float32",
        about: Mapping[str, Any] | None = None,
        root: Path | None = None,
        used: Callable[[], Sequence[int]] | None = None,
    ) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        whole = {**key, "shape": list(shape), "dtype": str(self.dtype)}
        self.folder = (root or kept_folder()) / key_hash(whole)
        self._used = used
        self.about = {**(about or {}), "shape": list(shape), "dtype": str(self.dtype)}

    @property
    def bytes(self) -> int:
        """What the rows take on the disk."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def complete(self) -> bool:
        """Whether all rows are there."""
        rows = self.folder / _ROWS
        return (self.folder / _ABOUT).is_file() and rows.is_file() and rows.stat().st_size == self.bytes

    def rows(self) -> Rows:
        """Return the rows, memory-mapped and read-only; the store must be complete."""
        with contextlib.suppress(OSError):
            os.utime(self.folder / _ABOUT)  # last used
        return self._map("r")

    def _map(self, mode: Any) -> Rows:
        return np.memmap(self.folder / _ROWS, self.dtype, mode, shape=self.shape)

    def make(self, load: Load, compute: Compute, first: float = 0.0) -> None:
        """Compute the rows that are not there yet; returns when all are there, whoever made them.

        Args:
            load: Called with the row numbers of each missing block; yields what `compute` needs, block by block.
            compute: Turns that into the rows of a block; a row may be shorter than the others.
            first: Where to begin, as a share of what is missing, so that processes that start together do not meet.

        Raises:
            DataError: If the folder cannot be written, or the disk has too little room.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _mark(self.folder)
            while not self.complete:
                self._prepare()
                missing = self._missing()
                begin = int(first * len(missing))
                self._fill([*missing[begin:], *missing[:begin]], load, compute)
                self._finish()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._no_space() from error
            raise DataError(
                f"What is computed once cannot be kept in {self.folder}: {error.strerror or error}. Set the environment "
                "variable RESNET_FINETUNE_CACHE to a folder that can be written, or switch reuse off."
            ) from error

    def state(self) -> tuple[int, int] | None:
        """Return what tells the rows that are there from ones that are made later; None if the store is not complete."""
        with contextlib.suppress(OSError):
            status = (self.folder / _ROWS).stat()
            return (status.st_ino, status.st_mtime_ns) if self.complete else None
        return None

    def discard(self, state: tuple[int, int] | None) -> None:
        """Delete the rows, unless another process has done so since `state` was asked for.

        Processes that have them open read on in what they opened.
        """
        with FileLock(self.folder / _LOCK):
            if state is not None and self.state() == state:
                (self.folder / _ABOUT).unlink(missing_ok=True)  # first: what is left must not be believed
                (self.folder / _ROWS).unlink(missing_ok=True)

    def _prepare(self) -> None:
        """Make the files, unless an earlier process left some that fit."""
        rows, done = self.folder / _ROWS, self.folder / _DONE
        with FileLock(self.folder / _LOCK):
            fit = rows.is_file() and rows.stat().st_size == self.bytes
            if self.complete or (fit and done.is_file() and done.stat().st_size == self._blocks):
                return
            for path in (done, rows):
                path.unlink(missing_ok=True)
            self._require_space()
            try:
                with rows.open("xb") as file:
                    allocate(file, self.bytes, self._filled)
                write_atomically(done, bytes(self._blocks))
            except OSError:
                rows.unlink(missing_ok=True)
                raise

    @cached_property
    def _filled(self) -> list[tuple[int, int]]:
        """The parts of the file that will be filled: where each begins, and its bytes."""
        if self._used is None:
            return [(0, self.bytes)]
        return [(number * self._row_bytes, size) for number, size in enumerate(self._used())]

    @property
    def _blocks(self) -> int:
        return -(-self.shape[0] // BLOCK)

    def _missing(self) -> list[int]:
        try:
            marks = (self.folder / _DONE).read_bytes()
        except FileNotFoundError:  # another process has just finished
            return []
        return [number for number, mark in enumerate(marks) if not mark]

    def _range(self, block: int) -> range:
        return range(block * BLOCK, min((block + 1) * BLOCK, self.shape[0]))

    def _fill(self, missing: Sequence[int], load: Load, compute: Compute) -> None:
        """Compute the blocks that no other process is at; wait for one of those if there is nothing else to do."""
        busy = []
        for block, loaded in zip(missing, load([self._range(block) for block in missing]), strict=True):
            lock = FileLock(self.folder / f"{_LOCK}-{block}")
            try:
                with lock.acquire(timeout=0):
                    self._fill_block(block, loaded, compute)
            except Timeout:
                busy.append(lock)
        for lock in busy[:1]:
            with lock:
                pass

    def _fill_block(self, block: int, loaded: Any, compute: Compute) -> None:
        try:
            marks = (self.folder / _DONE).open("r+b")
        except FileNotFoundError:  # another process has just finished
            return
        with marks:
            marks.seek(block)
            if marks.read(1) == b"\0":
                self._write(self._range(block), compute(loaded))
                marks.seek(block)
                marks.write(b"\1")

    def _write(self, numbers: Sequence[int], rows: Rows | list[Rows]) -> None:
        """Write rows to their places; not through a memory map, where a full disk would end the process."""
        with (self.folder / _ROWS).open("r+b") as file:
            for number, row in zip(numbers, rows, strict=True):
                data = np.ascontiguousarray(row, self.dtype)
                if data.nbytes > self._row_bytes or (self._used is None and data.shape != self.shape[1:]):
                    raise ValueError(f"Expected rows of shape {self.shape[1:]}, found {data.shape}.")
                file.seek(number * self._row_bytes)
                file.write(data.data)
            file.flush()
            os.fsync(file.fileno())  # before the mark that says so

    def _finish(self) -> None:
        with FileLock(self.folder / _LOCK):
            if self.complete or self._missing() or not (self.folder / _DONE).is_file():
                return
            write_atomically(self.folder / _ABOUT, json.dumps({**self.about, "made": time.time()}, indent=1))
            for path in (self.folder / _DONE, *self.folder.glob(f"{_LOCK}-*")):
                path.unlink(missing_ok=True)

    def _require_space(self) -> None:
        if sum(size for _, size in self._filled) + _FREE > shutil.disk_usage(self.folder).free:
            raise self._no_space()

    def _no_space(self) -> DataError:
        needed = sum(size for _, size in self._filled)
        existing = next(folder for folder in (self.folder, *self.folder.parents) if folder.is_dir())
        return DataError(
            f"Keeping what is computed once needs {format_bytes(needed)} in {self.folder.parent}, where "
            f"{format_bytes(shutil.disk_usage(existing).free)} are free. Make room (resnet-finetune reuse --clear), set "
            "RESNET_FINETUNE_CACHE to a folder on a larger disk, or switch reuse off."
        )


def take(rows: Rows, indices: Sequence[int]) -> Rows:
    """Copy some rows out of memory-mapped ones, without leaving what was read in the memory of this process."""
    taken: Rows = rows[list(indices)]
    _let_go(rows)
    return taken


def _let_go(rows: Rows) -> None:
    """Take pages that were read or written out of this process; they stay in the system's cache while there is room."""
    mapped: Any = rows.base
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def list_kept(root: Path | None = None, unused: float = 0.0) -> list[Kept]:
    """Return all stores that were not used for so many days, the last used first."""
    root = root or kept_folder()
    found = []
    for folder in root.iterdir() if root.is_dir() else []:
        about: dict[str, Any] = {}
        with contextlib.suppress(FinetuneError):
            about = {**read_json(folder / _ABOUT, _About, "what a store holds")}
        files = [path.stat() for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
        if (
            files
            and _is_store(folder)
            and (unused <= 0 or time.time() - max(file.st_mtime for file in files) >= unused * 86400)
        ):
            size = sum(getattr(file, "st_blocks", 0) * 512 or file.st_size for file in files)
            found.append(Kept(folder, about, size, max(file.st_mtime for file in files)))
    return sorted(found, key=lambda kept: -kept.used)


def clear(kept: Kept) -> bool:
    """Delete a store, unless a process is making it just now or it holds anything else; return whether it is gone."""
    if not _is_store(kept.folder):
        return False
    lock = FileLock(kept.folder / _LOCK)
    try:
        with lock.acquire(timeout=0):
            (kept.folder / _ABOUT).unlink(missing_ok=True)  # first: what is left must not be believed
            _mark(kept.folder)  # of an older version, which wrote none
            remove_ours(kept.folder, _NAMES)
    except (Timeout, OSError):
        return False
    return not kept.folder.exists()


def _mark(folder: Path) -> None:
    """Mark the folder of a store, unless it has a mark or is none."""
    if not is_ours(folder) and (not any(folder.iterdir()) or _is_store(folder)):
        mark_folder(folder)


def _is_store(folder: Path) -> bool:
    """Return whether a folder is a store and nothing else: its name is a hash, and all in it are files of a store.

    Versions before the mark wrote none, so the mark alone does not decide.
    """
    named = len(folder.name) == 32 and set(folder.name) <= set("0123456789abcdef")
    if not named or folder.is_symlink() or not folder.is_dir():
        return False
    entries = [entry for entry in os.scandir(folder) if entry.name != MARK]
    plain = all(entry.is_file(follow_symlinks=False) and any(fnmatchcase(entry.name, n) for n in _NAMES) for entry in entries)
    return plain and (is_ours(folder) or any(entry.name == _ROWS for entry in entries))


def kept_table(unused: float = 0.0) -> str:
    """Return the table that `resnet-finetune reuse` prints."""
    found = list_kept(unused=unused)
    if not found:
        return f"Nothing is kept in {kept_folder()}."
    rows = [
        (
            one.about.get("what", "unfinished"),
            one.about.get("pictures", ""),
            " x ".join(map(str, one.about.get("shape", []))),
            format_bytes(one.bytes),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(one.used)),
        )
        for one in found
    ]
    table = tabulate(rows, headers=["what", "of", "numbers", "size", "last used"], disable_numparse=True)
    total = format_bytes(sum(one.bytes for one in found))
    return f"{table}\n{total} in {kept_folder()}. To delete it: resnet-finetune reuse --clear"


def clear_kept(unused: float = 0.0) -> str:
    """Delete what was not used for so many days; return a sentence that says what is gone."""
    found = list_kept(unused=unused)
    gone = [one for one in found if clear(one)]
    busy = f" {len(found) - len(gone)} are in use or cannot be deleted, and stay." if len(gone) < len(found) else ""
    return f"Deleted {len(gone)} of {len(found)}: {format_bytes(sum(one.bytes for one in gone))} are free again.{busy}"


def format_bytes(number: float) -> str:
    """Return a size for people.

    >>> format_bytes(512), format_bytes(3_400_000), format_bytes(2e10)
    ('512 B', '3.4 MB', '20.0 GB')
    """
    units = ("B", "kB", "MB", "GB", "TB")
    power = min(len(units) - 1, max(0, int(math.log10(max(number, 1)) // 3)))
    return f"{number:.0f} B" if power == 0 else f"{number / 1000**power:.1f} {units[power]}"
