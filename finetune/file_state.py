"""What a file is known by without reading it: equal states mean that nobody changed the file in between."""

from __future__ import annotations

import os


def file_state(path: str | os.PathLike[str]) -> tuple[int, int, int, int]:
    """Return the size, the times of modification and of change (nanoseconds), and the inode of a file.

    A program can give a file the size and the time of modification that it had before; the time of change moves all the same,
    and a file that takes the place of another one has another inode. So a copy, a move to another file system and a change of
    permissions make another state, too, and so does a network mount that gives out new inodes: what was remembered of the file
    is then computed anew, which takes time and is never wrong. The device is left out: its number may differ after a restart.

    On Windows, and on file systems without a time of change, a file of equal size whose time of modification was restored
    cannot be told from the one before.
    """
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
