"""The content of image files as hashes, each file read only once while it stays as it is.

Hashes are remembered in the database that `examined` keeps for each folder, under size, times of modification and
of change, and inode: a copy that restores the time of modification is noticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeAlias

from finetune.examined import Memory
from finetune.hardware import worker_count

_TABLE = "CREATE TABLE IF NOT EXISTS contents (file BLOB PRIMARY KEY, size INT, mtime INT, ctime INT, inode INT, digest TEXT)"
_SETTLED = 2_000_000_000  # ns: a file that changed this recently may change again within one tick of the file system's clock
_BLOCK = 1 << 20

_State: TypeAlias = tuple[int, int, int, int]


class Content(NamedTuple):
    """What a file holds.

    Attributes:
        size: Number of bytes.
        digest: Hash of the bytes, 32 hexadecimal digits; empty if the file cannot be read.
    """

    size: int
    digest: str


def contents(root: Path, files: Sequence[str], workers: int | None = None) -> dict[str, Content]:
    """Hash files, or recall their hashes while they are as they were.

    Args:
        root: The folder.
        files: Paths below it.
        workers: Threads that read; from the cores if None. Hashing and reading release Python's lock.
    """
    if not files:
        return {}
    with Memory(root) as memory:
        known = _recall(memory)
        states = {file: _state(root / file) for file in files}
        new = [file for file, state in states.items() if state and known.get(file, (None, ""))[0] != state]
        with ThreadPoolExecutor(max(1, worker_count() if workers is None else workers)) as pool:
            digests = dict(zip(new, pool.map(lambda file: file_digest(root / file), new, chunksize=64), strict=True))
        _keep(memory, {file: (state, digests[file]) for file in new if (state := states[file]) and digests[file]})
    found = {}
    for file, state in states.items():
        digest = digests[file] if file in digests else known[file][1] if state else ""
        found[file] = Content(state[0] if state else 0, digest)
    return found


def file_digest(path: str | os.PathLike[str]) -> str:
    """Return the hash of a file's bytes, empty if it cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb", buffering=0) as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError:
        return ""
    return digest.hexdigest()


def _recall(memory: Memory) -> dict[str, tuple[_State, str]]:
    try:
        memory.base.execute(_TABLE)
        rows = memory.base.execute("SELECT file, size, mtime, ctime, inode, digest FROM contents").fetchall()
        return {os.fsdecode(row[0]): ((row[1], row[2], row[3], row[4]), str(row[5])) for row in rows}
    except (sqlite3.Error, TypeError):
        return {}


def _keep(memory: Memory, found: dict[str, tuple[_State, str]]) -> None:
    latest = time.time_ns() - _SETTLED
    rows = [(os.fsencode(file), *state, digest) for file, (state, digest) in found.items() if max(state[1:3]) < latest]
    with contextlib.suppress(sqlite3.Error):  # such as a full disk: they are hashed again
        memory.base.executemany("INSERT OR REPLACE INTO contents VALUES (?, ?, ?, ?, ?, ?)", rows)


def _state(path: Path) -> _State | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
