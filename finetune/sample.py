"""Built-in data, so that a first run needs no download: the 1,797 handwritten digits that come with scikit-learn.

They are real (8 x 8 pixels from 43 people, 17 grey levels; Alpaydin & Kaynak 1998, the test part of the UCI set "Optical
Recognition of Handwritten Digits"). As a folder of pictures they take the same way through the toolkit as anyone's own data.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image

from finetune.errors import DataError
from finetune.randomness import seed_of

_SIZE, _MARGIN = 28, 2  # a digit and its black margin: what a centre crop of 87.5 % cuts off
_NUMBER = 1797


def cache_folder() -> Path:
    """Return the folder for what the toolkit makes once: `RESNET_FINETUNE_CACHE`, or `resnet-finetune` in the user's cache."""
    if own := os.environ.get("RESNET_FINETUNE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resnet-finetune"


def digits_folder() -> Path:
    """Return the folder of the digits, `{train,val,test}/<digit>/<index>.png`, and make it if it is not there yet.

    The pictures are grey, 32 x 32 pixels. About 70 % of each digit are for training, 15 % for validation, 15 % for the test.
    Several processes may call this at once.

    Raises:
        DataError: If the folder cannot be written.
    """
    folder = cache_folder() / "digits-v1"
    if _is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".digits-", dir=folder.parent))
        try:
            _write_digits(temporary / "new")
            _put_in_place(temporary / "new", folder, old=temporary / "old")
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"The built-in digits cannot be written to {folder}: {error.strerror or error}. "
            "Set the environment variable RESNET_FINETUNE_CACHE to a folder that can be written."
        ) from error
    return folder


BUILT_IN: Mapping[str, Callable[[], Path]] = MappingProxyType({"digits": digits_folder})
"""Names of built-in data and the functions that return their folders."""


def _is_complete(folder: Path) -> bool:
    """Count the pictures, as programs that clean caches delete single files."""
    return sum(1 for _ in folder.glob("*/*/*.png")) == _NUMBER


def _put_in_place(new: Path, folder: Path, old: Path) -> None:
    """Rename the new folder; of two processes that do so at once, one wins and the other takes its result."""
    if folder.exists() and not _is_complete(folder):
        with contextlib.suppress(FileNotFoundError):  # another process has just done so
            folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if not _is_complete(folder):
            raise


def _write_digits(folder: Path) -> None:
    from sklearn.datasets import load_digits

    data = load_digits()
    for digit in range(10):
        indices = sorted(np.flatnonzero(data.target == digit).tolist(), key=lambda index: seed_of("digits", index))
        held_out = round(0.15 * len(indices))
        parts = {"val": indices[:held_out], "test": indices[held_out : 2 * held_out], "train": indices[2 * held_out :]}
        for split, members in parts.items():
            target = folder / split / str(digit)
            target.mkdir(parents=True)
            for index in members:
                _picture(data.images[index]).save(target / f"{index:04d}.png")


def _picture(values: np.ndarray) -> Image.Image:
    """Enlarge 8 x 8 values of 0 to 16 and put a black margin around them."""
    digit = Image.fromarray(np.rint(values * (255 / 16)).astype(np.uint8))
    canvas = Image.new("L", (_SIZE + 2 * _MARGIN,) * 2)
    canvas.paste(digit.resize((_SIZE, _SIZE), Image.Resampling.BICUBIC), (_MARGIN, _MARGIN))
    return canvas
