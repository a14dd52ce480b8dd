"""Looking at many pictures: in several processes, with a progress bar, and each file only once.

What came out is kept in a small database per folder, `<cache>/checked/<hash>.sqlite`, under the file's state (size, times,
inode). A check that was interrupted goes on where it was, and after pictures were added it looks at the new ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import PIL
import torch
import torchvision
from filelock import FileLock, Timeout
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from finetune.console import say
from finetune.errors import DataError, FinetuneError
from finetune.examine import Examined, examine
from finetune.file_state import file_state
from finetune.hardware import worker_count
from finetune.sample import cache_folder
from finetune.schema import convert, decode_json

_VERSION = 2  # of what a look says; a change makes what is kept void
_FEW = 256  # below this number of files, starting processes takes longer than looking
_BATCH = 32


class _Look(NamedTuple):
    """A row of the table, without the file."""

    state: str
    full: int
    said: str
    digest: bytes


_TABLE = "CREATE TABLE IF NOT EXISTS looks (file BLOB PRIMARY KEY, state TEXT, full INT, said TEXT, digest BLOB)"


class _Looks(Dataset[Examined]):
    def __init__(self, root: str, files: Sequence[str], full: bool) -> None:
        self.root, self.files, self.full = root, files, full

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Examined:
        return examine(os.path.join(self.root, self.files[index]), self.full)


def examine_all(root: Path, files: Sequence[str], full: bool, workers: int | None = None) -> Iterator[tuple[str, Examined]]:
    """Look at pictures, or remember what a look came to while the file is as it was; yields them in their order.

    Args:
        root: The folder.
        files: Paths below it.
        full: Decode them all, see `examine`.
        workers: Processes; from the cores and the number of files if None.

    Raises:
        DataError: If one of the processes ends.
    """
    with Memory(root) as memory:
        new = [file for file in files if memory.recall(root, file, full) is None]
        workers = (worker_count() if len(new) > _FEW else 0) if workers is None else workers
        looks = _look(root, new, full, workers)
        waiting = set(new)
        for file in files:
            known = None if file in waiting else memory.recall(root, file, full)
            if known is None:
                known = next(looks) if file in waiting else examine(str(root / file), full)
                memory.keep(root, file, full, known)
            yield file, known


def _look(root: Path, files: Sequence[str], full: bool, workers: int) -> Iterator[Examined]:
    if not files:
        return
    own = torch.Generator()  # nothing is random here, yet a loader draws a number from torch's own, and what follows changes
    loader = DataLoader(_Looks(str(root), files, full), _BATCH, num_workers=workers, collate_fn=list, generator=own)
    with tqdm(total=len(files), unit="picture", desc="checked", leave=False, disable=None) as bar:
        try:
            for batch in loader:
                bar.update(len(batch))
                yield from batch
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            near = ", ".join(files[int(bar.n) :][:3])
            raise DataError(
                f"A process that looked at pictures ended ({str(error).partition(chr(10))[0]}), perhaps for want of memory. It "
                f"was at about {near}. Try it again with one process: resnet-finetune check {root} --workers 0"
            ) from error


class Memory:
    """What is known of the pictures of a folder; where it cannot be kept it lasts for this call only."""

    def __init__(self, root: Path) -> None:
        name = hashlib.blake2b(os.fsencode(os.path.realpath(root)), digest_size=16).hexdigest()
        self.path = cache_folder() / "checked" / f"{name}.sqlite"
        self.lock: FileLock | None = None

    def __enter__(self) -> Memory:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(f"{self.path}.lock")  # processes of one run take turns; all but the first find everything
            try:
                self.lock.acquire(timeout=5)
            except Timeout:
                say(f"Another process is checking the same folder: waiting for it ({self.path.name})", error=True)
                self.lock.acquire()
            self.base = sqlite3.connect(self.path, isolation_level="IMMEDIATE")
            self._open()
        except (OSError, ValueError, sqlite3.Error):  # ValueError: bytes that are no text
            self.base = sqlite3.connect(":memory:")
            self._open()
        self.pending = 0
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(sqlite3.Error):  # such as a full disk: it is looked at again
            self.base.commit()
        self.base.close()
        if self.lock is not None:
            self.lock.release()

    def _open(self) -> None:
        stamp = json.dumps([_VERSION, PIL.__version__, torchvision.__version__])
        self.base.execute("CREATE TABLE IF NOT EXISTS stamp (text TEXT)")
        anew = self.base.execute("SELECT text FROM stamp").fetchall() != [(stamp,)]
        if anew:
            self.base.execute("DROP TABLE IF EXISTS looks")  # of another version, perhaps with other columns
            self.base.execute("DELETE FROM stamp")
        self.base.execute(_TABLE)
        if anew:
            self.base.execute("INSERT INTO stamp VALUES (?)", (stamp,))
            self.base.commit()

    def recall(self, root: Path, file: str, full: bool) -> Examined | None:
        """Return what is known of a file that is as it was, after a look that was as full."""
        try:
            found = self.base.execute("SELECT * FROM looks WHERE file = ?", (os.fsencode(file),)).fetchone()
            if found is None:
                return None
            look = convert(found[1:], _Look, "what is known of an image", where=str(self.path))
            said = decode_json(look.said, list[Any], "what is known of an image", where=str(self.path))
            known = convert([*said, look.digest], Examined, "what is known of an image", where=str(self.path))
        except (sqlite3.Error, ValueError, FinetuneError):  # a damaged memory is none: the file is looked at again
            return None
        return known if look.full >= full and _state(root / file) == look.state else None

    def keep(self, root: Path, file: str, full: bool, said: Examined) -> None:
        """Remember what a look came to."""
        state = _state(root / file)
        if state is None or said.error in ("unreadable-file", "broken-link"):  # what a change of permissions mends
            return
        row: tuple[Any, ...] = (os.fsencode(file), state, int(full), json.dumps(said[:3]), said.digest)
        with contextlib.suppress(sqlite3.Error):
            self.base.execute("INSERT OR REPLACE INTO looks VALUES (?, ?, ?, ?, ?)", row)
            self.pending += 1
            if self.pending % 1000 == 0:
                self.base.commit()


def _state(path: Path) -> str | None:
    try:
        return json.dumps(file_state(path))
    except OSError:
        return None
