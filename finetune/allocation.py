"""Disk space for a file before it is written, so that a full disk is an error then, and not the end of the process later."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from typing import BinaryIO

_NOT_SUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)
_PIECE = 2**24  # bytes of zeros that are written at a time


def allocate(file: BinaryIO, size: int, parts: Iterable[tuple[int, int]]) -> None:
    """Give a new file its size, and reserve disk space for the parts of it that will be filled.

    Where the system cannot reserve space, or not on this file system, zeros are written. File systems that compress, or that
    write anew what is overwritten, may still run out of space later.

    Args:
        file: An empty file, open for writing.
        size: Bytes of the whole file.
        parts: Where each part begins, and its bytes.

    Raises:
        OSError: If there is too little space (`errno.ENOSPC`), or the file cannot be written.
    """
    file.truncate(size)
    reserve = getattr(os, "posix_fallocate", None)
    for begin, length in parts:
        if reserve is not None and length:
            try:
                reserve(file.fileno(), begin, length)
                continue
            except OSError as error:
                if error.errno not in _NOT_SUPPORTED:
                    raise
                reserve = None
        _write_zeros(file, begin, length)
    file.flush()


def _write_zeros(file: BinaryIO, begin: int, length: int) -> None:
    file.seek(begin)
    zeros = bytes(min(length, _PIECE))
    for done in range(0, length, _PIECE):
        file.write(zeros[: length - done])
