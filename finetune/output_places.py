"""Where a training may write: into the folder of its own run, and not over what another run left or through links."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger

from finetune.errors import CheckpointError, ConfigError, FinetuneError
from finetune.files import read_plain
from finetune.runs import CHECKPOINTS, CONFIG, RESUMED_CONFIG, run_of
from finetune.schema import decode_json, decode_yaml

_RECORD = "record.json"
_RUN = (_RECORD, CONFIG)  # what a run's folder holds
_WRITTEN = (
    *(_RECORD, CONFIG, RESUMED_CONFIG, "metrics.csv", "gradients.csv", "split.csv", "report.html", "augmented.jpg", ".lock"),
    *("explained.png", "predictions.val.csv", "predictions.test.csv", "predictions.target.csv", "domains.json"),
)
_MOST_BYTES = 8 * 2**20  # of a record


def require_own_places(loggers: Sequence[Any], callbacks: Sequence[Any], resumes: Path | None = None) -> None:
    """Raise if a logger or a callback of the user's would write into another run, or over files that are there.

    Args:
        loggers: Lightning's loggers.
        callbacks: Lightning's callbacks.
        resumes: The checkpoint that is resumed.

    Raises:
        ConfigError: If one would; the message names it and the folder.
    """
    own = run_of(resumes) if resumes is not None else None
    for place, who in _places(loggers, callbacks):
        if (run := _run_around(place)) is not None and (own is None or run != own.resolve()):
            raise ConfigError(
                f"{who} would write into {place}, which belongs to the run {run}: its files would be replaced or deleted. Give "
                "it another folder, or leave it out: metrics and checkpoints are kept in the run's own folder anyway."
            )
    for logger in loggers:
        if isinstance(logger, CSVLogger) and os.path.lexists(file := Path(logger.log_dir, "metrics.csv")):
            raise ConfigError(
                f"{file} exists already, and Lightning's CSVLogger would delete it. Give the logger another version, or none, "
                "which takes the next free one; or leave it out: every run has a metrics.csv."
            )
    for callback in callbacks if resumes is None else ():
        if (replaced := _replaced(callback)) is not None:
            raise ConfigError(
                f"{type(callback).__name__} would replace checkpoints that are there already, such as {replaced}. Give it "
                "another dirpath or filename."
            )


def is_run(folder: Path) -> bool:
    """Return whether a folder is that of a run, or holds no file that a run would replace.

    A checkpoint in `checkpoints/` may also have been put there by hand, in the middle of somebody's project.
    """
    record, config = folder / _RECORD, folder / CONFIG
    if os.path.lexists(record):
        return {"state", "command"} <= _keys(decode_json, record)
    if {"data", "model", "run", "trainer"} <= _keys(decode_yaml, config):
        return True  # a run from before there were records, or one that lost its own
    return not any(os.path.lexists(folder / name) for name in _WRITTEN)


def _keys(decode: Callable[..., dict[str, Any]], file: Path) -> set[str]:
    """Return the names at the top of a file; none if it cannot be read."""
    try:
        text = read_plain(file, _MOST_BYTES).decode("utf-8")
        return set(decode(text, dict[str, Any], "what a run says of itself", where=str(file)))
    except (OSError, ValueError, FinetuneError):
        return set()


def require_no_links(run: Path) -> None:
    """Raise if a run that is resumed holds links, pipes or devices: its files would be written through them.

    Raises:
        CheckpointError: If it does.
    """
    for folder in (run, *(run / name for name in (CHECKPOINTS, f"{CHECKPOINTS}/epochs", "figures", "tensorboard"))):
        for entry in list(os.scandir(folder)) if folder.is_dir() else []:
            if not (entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False)):
                what = "a link" if entry.is_symlink() else "no plain file"
                raise CheckpointError(
                    f"{entry.path} is {what}, and a run that is resumed would be written through it. Put the file itself "
                    "there, or start a new run from the weights with --model.weights CHECKPOINT."
                )


def _places(loggers: Sequence[Any], callbacks: Sequence[Any]) -> Iterator[tuple[Path, str]]:
    for logger in loggers:
        for name in ("log_dir", "save_dir"):
            value = getattr(logger, name, None)
            if isinstance(value, str | os.PathLike) and os.fspath(value):
                yield Path(value), type(logger).__name__
                break
    for callback in callbacks:
        value = getattr(callback, "dirpath", None)
        if isinstance(value, str | os.PathLike):
            yield Path(value), type(callback).__name__


def _run_around(place: Path) -> Path | None:
    """Return the run's folder that a path lies in, or None."""
    place = place.resolve()
    return next((folder for folder in (place, *place.parents) if all((folder / name).is_file() for name in _RUN)), None)


def _replaced(callback: Any) -> Path | None:
    """Return a checkpoint that a callback would replace; Lightning's own gives new ones another number unless told not to."""
    if isinstance(callback, OnExceptionCheckpoint):
        file = Path(callback.ckpt_path)
        return file if os.path.lexists(file) else None
    if isinstance(callback, ModelCheckpoint) and callback.dirpath and not callback._enable_version_counter:
        return next(Path(callback.dirpath).glob(f"*{callback.FILE_EXTENSION}"), None)
    return None
