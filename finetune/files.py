"""Atomic writes, and deletion of what this package wrote: the one owner of temporary names, of `os.replace` and of `rmtree`.

Files and folders are created under a random temporary name beside their target and renamed when they are complete. A folder
that is made this way holds a small file, the mark, that lists what was written into it. Nothing is deleted recursively that
has no mark, or that holds anything else than the mark lists.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import stat
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from finetune.errors import ConfigError
from finetune.version import __version__

MARK = ".resnet-finetune"
"""The name of the file that marks a folder as written by this package."""

_FORMAT = 1
_MOST_BYTES = 2**22  # of a mark; it lists the files of one export or evaluation
_NO_LINKS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_NO_WAITING = getattr(os, "O_NONBLOCK", 0)  # a pipe without a writer would be waited for


@dataclass(frozen=True)
class Unmarked:
    """What a folder looks like that a version before the mark wrote: exactly these files, and a text in one of them.

    Attributes:
        names: The names of its files.
        file: One of them.
        text: What stands in that file.
    """

    names: frozenset[str]
    file: str
    text: str


# ---------------------------------------------------------------------------------------------------------- single files


def require_free(target: Path, overwrite: bool) -> None:
    """Raise if a file must not be written at a path.

    Raises:
        ConfigError: If there is something and it may not be replaced, or it is neither a file nor a link.
    """
    try:
        mode = target.lstat().st_mode
    except OSError:
        return
    if not overwrite:
        raise ConfigError(f"{target} exists already and is not overwritten: give another --out, or --overwrite.")
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        what = "folder" if stat.S_ISDIR(mode) else "device, pipe or socket"
        raise ConfigError(f"{target} is a {what}, expected the name of a file to write: give another --out.")


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary file to write, which takes the place of `path` when it is complete; after an error `path` is unchanged.

    A link at `path` is replaced; the file behind it is not touched.

    Raises:
        OSError: If it cannot be written, or `path` is a device, a pipe or a folder.
    """
    with contextlib.suppress(FileNotFoundError):
        mode = path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            raise FileExistsError(errno.EEXIST, "It is no plain file", str(path))
    partial = _exclusive_file(path)
    try:
        yield partial
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a small file, text as UTF-8, so that it is complete or unchanged."""
    with atomic_write(path) as partial:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def remove_leftovers(path: Path) -> None:
    """Delete temporary files of `path` that a killed process left; only one process at a time may write `path`."""
    start, end = f".{_short(path)}.resnet-finetune-", ".part"
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(path.parent)):
            token = entry.name.removeprefix(start).removesuffix(end)
            exact = entry.name == f"{start}{token}{end}" and len(token) == 16 and set(token) <= set("0123456789abcdef")
            if exact and entry.is_file(follow_symlinks=False):
                os.unlink(entry.path)


def open_plain(path: str | os.PathLike[str]) -> int:
    """Open a file for reading and return its descriptor; the last part of its path may be no link.

    Raises:
        OSError: If it is missing, a link, or anything but a plain file, such as a pipe that reading would wait for.
    """
    descriptor = os.open(path, os.O_RDONLY | _NO_LINKS | _NO_WAITING)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "It is no plain file", os.fspath(path))
    return descriptor


def read_plain(path: str | os.PathLike[str], most_bytes: int) -> bytes:
    """Read a plain file that is no link.

    Args:
        path: The file.
        most_bytes: The largest size that is read.

    Raises:
        OSError: If it is no plain file, cannot be read, or is larger.
    """
    with os.fdopen(open_plain(path), "rb") as file:
        if os.fstat(file.fileno()).st_size > most_bytes:
            raise OSError(errno.EFBIG, "It is too large", os.fspath(path))
        return file.read(most_bytes)


def _short(path: Path) -> str:
    return path.name[:40]  # a name may have 255 bytes, and a letter up to 4


def _temporary(path: Path, ending: str) -> Path:
    return path.with_name(f".{_short(path)}.resnet-finetune-{secrets.token_hex(8)}.{ending}")


def _exclusive_file(path: Path) -> Path:
    partial = _temporary(path, "part")
    os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY | _NO_LINKS, 0o666))
    return partial


# --------------------------------------------------------------------------------------------------------------- folders


def is_ours(folder: Path, older: Sequence[Unmarked] = ()) -> bool:
    """Return whether this package wrote a folder: it carries our mark, or is exactly what an older version wrote.

    Args:
        folder: The folder; a link to one is not ours.
        older: What older versions wrote without a mark.
    """
    if folder.is_symlink() or not folder.is_dir():
        return False
    return _mark_of(folder) is not None or any(_looks_like(folder, each) for each in older)


def mark_folder(folder: Path, files: Collection[str] = ()) -> None:
    """Mark a folder as written by this package.

    Args:
        folder: The folder.
        files: Relative paths of the files in it.
    """
    content = {"written_by": f"resnet-finetune {__version__}", "format": _FORMAT, "files": sorted(files)}
    write_atomically(folder / MARK, json.dumps(content) + "\n")


def files_in(folder: Path) -> list[str]:
    """Return the relative paths of all files and links in a folder but the mark; links are not followed."""
    found = []
    for path, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(path, name))]
        found += [Path(path, name).relative_to(folder).as_posix() for name in [*files, *links]]
    return sorted(name for name in found if name != MARK)


def require_free_folder(target: Path, overwrite: bool, older: Sequence[Unmarked] = ()) -> None:
    """Raise if a new folder may not take the place of what is at a path.

    Args:
        target: The path.
        overwrite: Whether a folder that this package wrote may be replaced.
        older: What older versions wrote without a mark.

    Raises:
        ConfigError: If there is something that may not be replaced.
    """
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise ConfigError(f"{target} exists already and is not overwritten: give another --out, or --overwrite.")
    _require_ours(target, older)


@contextlib.contextmanager
def new_folder(target: Path, overwrite: bool = False, older: Sequence[Unmarked] = ()) -> Iterator[Path]:
    """Give a folder to write into, which takes the place of `target` when it is complete; after an error that is unchanged.

    Args:
        target: The path of the new folder.
        overwrite: Replace a folder that this package wrote, or an empty one.
        older: What older versions wrote there without a mark.

    Raises:
        ConfigError: If it cannot be written, or there is something that may not be replaced.
    """
    require_free_folder(target, overwrite, older)
    partial = _temporary(target, "part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        try:
            yield partial
            mark_folder(partial, files_in(partial))
            _put_in_place(partial, target, overwrite, older)
        finally:
            shutil.rmtree(partial, ignore_errors=True)  # the name is random and was made exclusively
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror or error}. Give another --out.") from error


def remove_ours(folder: Path, names: Sequence[str] = ()) -> None:
    """Delete a folder that carries our mark, and holds nothing but what the mark lists. Links in it are never followed.

    Args:
        folder: The folder.
        names: Patterns of more names that this package writes there.

    Raises:
        ConfigError: If the folder is not ours, or holds something else.
        OSError: If it cannot be deleted.
    """
    _require_ours(folder, (), names)
    shutil.rmtree(folder)


def _put_in_place(partial: Path, target: Path, overwrite: bool, older: Sequence[Unmarked]) -> None:
    """Rename the new folder to its target; what is there is moved away first, checked once more, and deleted at the end."""
    require_free_folder(target, overwrite, older)
    if not os.path.lexists(target):
        os.rename(partial, target)
        return
    before = _temporary(target, "old")
    os.rename(target, before)
    try:
        _require_ours(before, older, called=target)
        os.rename(partial, target)
    except BaseException:
        os.rename(before, target)
        raise
    shutil.rmtree(before, ignore_errors=True)


def _require_ours(folder: Path, older: Sequence[Unmarked], names: Sequence[str] = (), called: Path | None = None) -> None:
    """Raise unless a folder is empty, or ours and without anything else in it."""
    called = called or folder
    advice = "give another --out, or move it away yourself"
    if folder.is_symlink() or not folder.is_dir():
        raise ConfigError(f"{called} is no folder that resnet-finetune wrote and is not replaced: {advice}.")
    if not any(folder.iterdir()) or any(_looks_like(folder, each) for each in older):
        return
    mark = _mark_of(folder)
    if mark is None:
        raise ConfigError(
            f"{called} is not deleted, as resnet-finetune did not write it: it has no file {MARK}, which marks what it wrote. "
            f"{advice[0].upper()}{advice[1:]}."
        )
    known = set(mark["files"])
    others = [name for name in files_in(folder) if name not in known and not any(fnmatchcase(name, each) for each in names)]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise ConfigError(
            f"{called} is not deleted, as it holds files that resnet-finetune did not write there: {', '.join(others[:3])}"
            f"{more}. Move them away, or {advice}."
        )


def _looks_like(folder: Path, older: Unmarked) -> bool:
    try:
        entries = list(os.scandir(folder))
        plain = all(entry.is_file(follow_symlinks=False) for entry in entries)
        if not plain or {entry.name for entry in entries} != older.names:
            return False
        return older.text.encode() in read_plain(folder / older.file, 2**26)
    except OSError:
        return False


def _mark_of(folder: Path) -> dict[str, Any] | None:
    """Return the content of a folder's mark, or None if it has none that we wrote."""
    try:
        content = json.loads(read_plain(folder / MARK, _MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or not isinstance(content.get("files"), list):
        return None
    ours = str(content.get("written_by")).startswith("resnet-finetune ") and content.get("format") == _FORMAT
    return content if ours and all(isinstance(name, str) for name in content["files"]) else None
