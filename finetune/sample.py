"""Built-in data, so that a first run needs no download: the 1,797 handwritten digits that come with scikit-learn.

`digits_m` are some of them in another domain: on crops of the two photographs that come with scikit-learn, too.

They are real (8 x 8 pixels from 43 people, 17 grey levels; Alpaydin & Kaynak 1998, the test part of the UCI set "Optical
Recognition of Handwritten Digits"). As a folder of pictures they take the same way through the toolkit as anyone's own data.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image

from finetune.errors import DataError
from finetune.files import files_in, temporary_folder
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
    return _made("digits-v1", "*/*/*.png", _NUMBER, _write_digits)


def digits_m_folder() -> Path:
    """Return the folder of the digits on photographs, `<digit>/<index>.png`, and make it if it is not there yet.

    They are the digits that `digits_folder` holds out for validation and test, so none of its training pictures is among them.
    A picture is the absolute difference of a digit and half of a crop of a photograph, as in MNIST-M (Ganin et al. 2016), whose
    crops have their full strength.

    Raises:
        DataError: If the folder cannot be written.
    """
    number = sum(1 for part in ("val", "test") for _ in (digits_folder() / part).glob("*/*.png"))
    return _made("digits-m-v1", "*/*.png", number, _write_digits_m)


BUILT_IN: Mapping[str, Callable[[], Path]] = MappingProxyType({"digits": digits_folder, "digits_m": digits_m_folder})
"""Names of built-in data and the functions that return their folders."""


def _made(name: str, pattern: str, number: int, write: Callable[[Path], None]) -> Path:
    """Return a folder of the cache, made by `write` unless it holds its number of pictures; several processes may ask."""
    folder = cache_folder() / name

    def complete() -> bool:
        """Count the pictures, as programs that clean caches delete single files."""
        return sum(1 for _ in folder.glob(pattern)) == number

    if complete():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with temporary_folder(folder.parent, ".digits-") as temporary:
            write(temporary / "new")
            _put_in_place(temporary / "new", folder)
    except OSError as error:
        raise DataError(
            f"The built-in digits cannot be written to {folder}: {error.strerror or error}. "
            "Set the environment variable RESNET_FINETUNE_CACHE to a folder that can be written."
        ) from error
    return folder


def _put_in_place(new: Path, folder: Path) -> None:
    """Rename the new folder, or put the files into the old one that it lacks; several processes may do so at once.

    Raises:
        DataError: If the old folder holds other files: it is not ours, and nothing is written into it.
    """
    with contextlib.suppress(OSError):
        if not os.path.lexists(folder):
            new.rename(folder)
            return
    names = files_in(new)
    depth = names[0].count("/")
    others = [name for name in files_in(folder) if name not in set(names)]
    empty = [name for name in others if name.count("/") == depth and name.endswith(".png") and _is_empty(folder / name)]
    if folder.is_symlink() or len(others) > len(empty):
        what = "it is a link" if folder.is_symlink() else f"it holds other files, such as {min(set(others) - set(empty))}"
        raise DataError(
            f"The built-in digits belong into {folder}, and {what}. Move that away, or set the environment variable "
            "RESNET_FINETUNE_CACHE to another folder."
        )
    for name in empty:  # a process that was killed left it
        (folder / name).unlink(missing_ok=True)
    for name in names:
        if not (folder / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(new / name, folder / name)


def _is_empty(file: Path) -> bool:
    return not file.is_symlink() and file.is_file() and file.stat().st_size == 0


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


def _write_digits_m(folder: Path) -> None:
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    digits = digits_folder()
    for file in sorted([*(digits / "val").glob("*/*.png"), *(digits / "test").glob("*/*.png")], key=lambda path: path.stem):
        random = np.random.default_rng(seed_of("digits_m", file.stem))
        photo = photos[random.integers(len(photos))]
        top, left = (random.integers(side - 32 + 1) for side in photo.shape[:2])
        with Image.open(file) as picture:
            digit = np.asarray(picture.convert("RGB"), float)
        blended = np.abs(digit - 0.5 * photo[top : top + 32, left : left + 32])
        target = folder / file.parent.name / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.rint(blended).astype(np.uint8)).save(target)


def _picture(values: np.ndarray) -> Image.Image:
    """Enlarge 8 x 8 values of 0 to 16 and put a black margin around them."""
    digit = Image.fromarray(np.rint(values * (255 / 16)).astype(np.uint8))
    canvas = Image.new("L", (_SIZE + 2 * _MARGIN,) * 2)
    canvas.paste(digit.resize((_SIZE, _SIZE), Image.Resampling.BICUBIC), (_MARGIN, _MARGIN))
    return canvas
