"""Pictures decoded and made smaller once, for folders whose pictures are much larger than what a network looks at."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

from finetune.console import say
from finetune.images import FULL, open_picture, read_image, white_text
from finetune.spot_check import matches_fresh_rows
from finetune.store import Rows, Store, pictures_key
from finetune.transforms import LONGEST, CutLongSide

_HEADER = 4  # bytes of a row before its pixels: height and width, 16 bits each
_ROUNDING = 0.01  # of resizing, where another processor computed the rows


class Decoded:
    """Pictures by number, from a store of `keep_decoded`, with the shorter side of `side` pixels."""

    def __init__(self, rows: Rows, side: int) -> None:
        self.rows, self.side = rows, side

    def __getitem__(self, index: int) -> Tensor:
        """Return a picture, uint8 (3, height, width), channels last in memory."""
        row = self.rows[index]
        height, width = (int(side) for side in row[:_HEADER].view(np.uint16))
        pixels = np.array(row[_HEADER : _HEADER + 3 * height * width]).reshape(height, width, 3)
        return torch.from_numpy(pixels).permute(2, 0, 1)


def keep_decoded(paths: Sequence[str], side: int, workers: int, white: int = FULL) -> Decoded:
    """Decode pictures and resize them so that the shorter side has `side` pixels, unless they are kept already or are smaller.

    A row has the length of an image of 4 : 1; what is not filled takes no disk space on file systems with sparse files.

    Args:
        paths: The files.
        side: Pixels of the shorter side.
        workers: Processes that read pictures.
        white: See `images.read_image`.

    Raises:
        DataError: If a picture cannot be read, or there is too little room.
    """
    smaller = _Smaller(paths, side, white)
    room = _HEADER + 3 * side * side * LONGEST
    key = {**pictures_key(paths, f"shorter side {side}{white_text(white)}"), "what": "decoded"}
    about = {"what": f"pictures of {side} pixels", "pictures": f"{len(paths)} files"}
    store = Store(key, (len(paths), room), "uint8", about, used=lambda: [row_bytes(path, side) for path in paths])
    if store.complete and not matches_fresh_rows(store, lambda numbers: [smaller[n] for n in numbers], _ROUNDING):
        say(f"decoded: the stored {about['what']} are not what is decoded now; they are decoded again")
    if not store.complete:
        with tqdm(total=len(paths), unit="picture", desc="decoded once", leave=False, disable=None) as bar:

            def load(ranges: Sequence[range]) -> Iterator[Any]:
                few = len(ranges) <= 1
                own = torch.Generator()  # nothing is random here, yet a loader draws a number, and what follows would change
                options: dict[str, Any] = {"batch_sampler": ranges, "collate_fn": list, "generator": own}
                yield from DataLoader(smaller, num_workers=0 if few else workers, **options)

            def rows(pictures: list[Rows]) -> list[Rows]:
                bar.update(len(pictures))
                return pictures

            store.make(load, rows)
    return Decoded(store.rows(), side)


def row_bytes(path: str, side: int) -> int:
    """Return the bytes that an image will fill of its row, from the size in the header of its file."""
    return _HEADER + 3 * pixels_when_smaller(*header_size(path), side)


def header_size(path: str) -> tuple[int, int]:
    """Return height and width as the header of an image says, or as 4 : 1 in the most pixels if it says nothing."""
    with contextlib.suppress(Exception), warnings.catch_warnings():  # whatever is wrong is said when the image is read
        warnings.simplefilter("ignore")
        with open_picture(path) as image:
            return image.height, image.width
    return LONGEST * 2**16, 2**16


def pixels_when_smaller(height: int, width: int, side: int) -> int:
    """Return the number of pixels of an image that was cut to 4 : 1 and made smaller.

    >>> pixels_when_smaller(100, 800, 50), pixels_when_smaller(20, 30, 50)
    (10000, 600)
    """
    shorter = min(height, width)
    longer = min(max(height, width), LONGEST * shorter)
    return shorter * longer if shorter <= side else side * int(side * longer / shorter)


class _Smaller(Dataset[Rows]):
    """Rows of the store: height, width, and the pixels of a picture that was made smaller."""

    def __init__(self, paths: Sequence[str], side: int, white: int) -> None:
        self.paths, self.side, self.white = paths, side, white
        self.cut = CutLongSide(LONGEST)
        self.resize = v2.Resize(side, antialias=True)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Rows:
        image = self.cut(read_image(self.paths[index], self.white))
        image = self.resize(image) if min(image.shape[1:]) > self.side else image
        height, width = image.shape[1:]
        header = np.array([height, width], np.uint16).view(np.uint8)
        return np.concatenate([header, image.permute(1, 2, 0).numpy().reshape(-1)])
