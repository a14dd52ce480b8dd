"""Walking through folders for pictures, in the order of their paths and without holding them all."""

from __future__ import annotations

import glob
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from finetune.errors import DataError, did_you_mean
from finetune.images import IMAGE_SUFFIXES, UNREAD_SUFFIXES

UNREADABLE = "unreadable folder"
UNREAD = "in a format that is not read"
_HIDDEN = frozenset({"__MACOSX", "@eaDir"})  # what archives of macOS and disks on the network leave behind


@dataclass(frozen=True)
class Pictures:
    """Pictures in several places; each iteration walks through them anew, in the same order while nothing changes.

    At any time the names in one folder are held, not those of all folders.

    Attributes:
        places: Folders, searched to the bottom in the order of paths; files; and patterns such as `new/*.jpg`.
        listed: A text file with the path of a picture on each line, relative to the working folder; None for no list.
    """

    places: Sequence[str | os.PathLike[str]]
    listed: str | None = None

    def __iter__(self) -> Iterator[str]:
        """Yield the paths.

        Raises:
            DataError: If a place does not exist.
        """
        for place in self.places:
            yield from _in_place(os.path.expanduser(os.fspath(place)))
        if self.listed is not None:
            yield from _in_list(self.listed)

    def all(self) -> list[str]:
        """Return all paths.

        Raises:
            DataError: If a place does not exist or there is no picture at all.
        """
        self.count()
        return list(self)

    def count(self) -> int:
        """Return how many pictures there are.

        Raises:
            DataError: If a place does not exist or there is no picture at all.
        """
        number = sum(1 for _ in self)
        if not number and not self.places and self.listed is None:
            raise DataError("No images were named. Expected a folder, files, or a pattern such as 'new/*.jpg'.")
        if not number:
            places = [*map(str, self.places), *([self.listed] if self.listed is not None else [])]
            raise DataError(
                f"There is no picture in {', '.join(places)}: expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}."
            )
        return number


def _in_place(place: str) -> Iterator[str]:
    if os.path.isfile(place):
        yield str(Path(place))
    elif not os.path.isdir(place) and glob.has_magic(place):
        found = sorted(glob.glob(place, recursive=True), key=order)
        if not found:
            raise DataError(f"Nothing matches the pattern {place} (seen from {Path.cwd()}).")
        for entry in found:
            if os.path.isdir(entry):
                yield from _in_place(entry)
            elif os.path.splitext(entry)[1].lower() in IMAGE_SUFFIXES:
                yield entry
    else:
        folder = str(existing(Path(place)))
        yield from (os.path.join(folder, file) for file in walk(folder, Counter()))


def _in_list(listed: str) -> Iterator[str]:
    try:
        with open(listed, encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                if path := line.rstrip("\r\n"):
                    yield path
    except OSError as error:
        raise DataError(
            f"The list of pictures {listed} cannot be read: {error.strerror or error}. Expected a text file with the path of a "
            "picture on each line."
        ) from error


def existing(folder: Path) -> Path:
    """Return a folder that is there.

    Raises:
        DataError: If there is none, or a file.
    """
    if os.path.isdir(folder):
        return folder
    if os.path.exists(folder):
        raise DataError(f"{folder} is a file, expected a folder. If it is an archive, unpack it first.")
    parent = folder.parent
    siblings = [entry.name for entry in parent.iterdir() if entry.is_dir()] if os.path.isdir(parent) else []
    raise DataError(f"There is no folder {folder} (seen from {Path.cwd()}).{did_you_mean(folder.name, siblings)}")


def subfolders(path: str, skipped: Counter[str]) -> tuple[list[str], int]:
    """Return the names of the folders that are not hidden, and how many pictures lie beside them."""
    names, pictures = [], 0
    for entry in _entries(path):
        kind = _kind(entry)
        if kind == "folder":
            names.append(entry.name)
        elif kind == "picture":
            pictures += 1
        else:
            skipped[kind] += 1
    return names, pictures


class Found(NamedTuple):
    """Something below a folder.

    Attributes:
        path: Path from the folder.
        kind: "picture", "folder", "folder again" (a link to one that was entered before, or to one above), "unreadable
            folder", or the reason to leave a file out.
        reason: Why a folder cannot be read.
    """

    path: str
    kind: str
    reason: str = ""


def walk(top: str, skipped: Counter[str], above: Iterable[tuple[int, int]] = (), tolerant: bool = False) -> Iterator[str]:
    """Yield the pictures below a folder, as paths from it and in their order.

    Links are followed, but into no folder twice and not upwards.

    Args:
        top: The folder.
        skipped: Counts what is left out, by the reason.
        above: Identities of folders not to go into.
        tolerant: Leave out folders that cannot be read.

    Raises:
        DataError: If a folder cannot be read.
    """
    for found in browse(top, above):
        if found.kind == "picture":
            yield found.path
        elif found.kind == UNREADABLE and not tolerant:
            raise _unreadable(os.path.join(top, found.path) if found.path else top, found.reason)
        elif found.kind not in ("folder", "folder again"):
            skipped[found.kind] += 1


def browse(top: str, above: Iterable[tuple[int, int]] = ()) -> Iterator[Found]:
    """Yield all that is below a folder in the order of paths, and go into each folder once; see `walk`."""
    try:
        seen = set(above) | {identity(top)}
        waiting = [(iter(_listed(top)), "")]
    except OSError as error:
        yield Found("", UNREADABLE, error.strerror or str(error))
        return
    while waiting:
        entries, prefix = waiting.pop()
        for entry in entries:
            kind, path = _kind(entry), prefix + entry.name
            if kind != "folder":
                yield Found(path, kind)
            elif (found := identity(entry.path)) in seen:
                yield Found(path, "folder again")
            else:
                seen.add(found)
                try:
                    inside = _listed(entry.path)
                except OSError as error:
                    yield Found(path, UNREADABLE, error.strerror or str(error))
                    continue
                yield Found(path, kind)
                waiting += [(entries, prefix), (iter(inside), f"{path}/")]
                break


def listing(path: str) -> Iterator[Found]:
    """Yield what lies in one folder, in order, without going further.

    Raises:
        OSError: If it cannot be read.
    """
    yield from (Found(entry.name, _kind(entry)) for entry in _listed(path))


def _entries(path: str) -> list[os.DirEntry[str]]:
    try:
        return _listed(path)
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error


def _listed(path: str) -> list[os.DirEntry[str]]:
    """Return what is in a folder in the order of paths, in which a folder's name ends with a slash."""
    with os.scandir(path) as entries:
        return sorted(entries, key=lambda entry: order(entry.name + "/" * _is_folder(entry)))


def _unreadable(path: str, reason: str) -> DataError:
    return DataError(f"The folder {path} cannot be read: {reason}. Check its permissions.")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _kind(entry: os.DirEntry[str]) -> str:
    """Return "folder", "picture", or the reason to skip the entry."""
    if entry.name.startswith(".") or entry.name in _HIDDEN:
        return "hidden"
    try:
        if entry.is_dir():
            return "folder"
        ending = os.path.splitext(entry.name)[1].lower()
        if ending not in IMAGE_SUFFIXES:
            return f"{UNREAD} ({ending})" if ending in UNREAD_SUFFIXES else "not a picture"
        if entry.is_file():
            return "picture"
        return "broken link" if entry.is_symlink() else "special file"  # a pipe or a device, which reading may wait for
    except OSError:  # a link to itself
        return "broken link"


def identity(path: str) -> tuple[int, int]:
    """Return what is equal of two paths to the same folder."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def order(path: str) -> str:
    """Order by code points; systems store accents in one character or in two."""
    return path if path.isascii() else unicodedata.normalize("NFC", path)
