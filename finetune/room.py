"""Room for checkpoints: is there enough before training starts, and what to say when there is none left."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from finetune.errors import CheckpointError
from finetune.store import format_bytes

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def tensor_bytes(value: Any) -> int:
    """Return the size of all tensors in nested mappings and sequences.

    >>> tensor_bytes({"a": torch.zeros(3), "b": [torch.zeros(2, dtype=torch.uint8), 7]})
    14
    """
    if isinstance(value, torch.Tensor):
        return int(value.nbytes)
    if isinstance(value, Mapping):
        return sum(map(tensor_bytes, value.values()))
    return sum(map(tensor_bytes, value)) if isinstance(value, list | tuple) else 0


def require_room(folder: Path, each: int, number: int) -> None:
    """Make sure that a folder can be written to and has room.

    Args:
        folder: The folder, which is made if it is not there.
        each: Size of a checkpoint in bytes.
        number: How many there must be room for.

    Raises:
        CheckpointError: If not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".room-") as trial:
            trial.write(bytes(4096))
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise CheckpointError(f"{unwritable(folder, error, each)} Choose another with --run.folder.") from error
    if free < number * each:
        raise CheckpointError(
            f"There is no room for the checkpoints of this run in {folder}: expected {format_bytes(number * each)} ({number} "
            f"of {format_bytes(each)}), found {format_bytes(free)}. Make room, or choose another disk with --run.folder."
        )


def unwritable(folder: Path, error: BaseException, needed: int) -> str:
    """Return a sentence that says why a checkpoint cannot be written.

    Args:
        folder: Where to.
        error: What happened.
        needed: Size of the checkpoint in bytes.
    """
    cause = disk_error(error)
    if cause is None:
        return f"A checkpoint cannot be written to {folder}: {error}."
    if cause.errno in _FULL:
        free = format_bytes(shutil.disk_usage(folder).free)
        what = f"for a checkpoint in {folder}: it needs {format_bytes(needed)}" if needed else f"in {folder}"
        return f"There is no room left {what}, {free} are free."
    return f"A checkpoint cannot be written to {folder}: {cause.strerror}."


def disk_error(error: BaseException | None) -> OSError | None:
    """Return the error of the operating system behind an exception, or None; torch wraps it into one of its own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error
        error = error.__cause__ or error.__context__
    return None


def is_full(error: BaseException) -> bool:
    """Say whether an exception comes from a disk, or a share of one, that is full."""
    cause = disk_error(error)
    return cause is not None and cause.errno in _FULL
