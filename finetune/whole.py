"""Files and folders that are whole or not there: made beside their place, and moved when they are complete."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from finetune.errors import ConfigError


def require_free(target: Path, overwrite: bool) -> None:
    """Make sure that nothing of the user's is in the way.

    Raises:
        ConfigError: If there is something, and it may not be replaced.
    """
    if target.exists() and not overwrite:
        raise ConfigError(f"{target} exists already and is not overwritten: give another --out, or --overwrite.")


@contextlib.contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Give a file to write that takes the place of `path` when it is complete; after an error `path` is as it was."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield partial
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a small file, text as UTF-8, so that it is whole or not there."""
    with beside(path) as partial:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a folder to write into, which takes the place of `target` at the end; after an error that is as it was.

    Raises:
        ConfigError: If it cannot be written.
    """
    partial = target.with_name(f"{target.name}.part")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror or error}. Give another --out.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
