"""Pictures decoded and made smaller once, for folders whose pictures are much larger than what a network looks at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

from finetune.images import FULL, read_image, white_text
from finetune.store import Rows, Store, pictures_key
from finetune.transforms import LONGEST, CutLongSide

_HEADER = 4  # bytes of a row before its pixels: height and width, 16 bits each


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

    A row has room for a picture of 4 : 1; what a picture does not fill takes no room on file systems with sparse files.

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
    usual = len(paths) * 3 * side * side * 3 // 2
    store = Store(key, (len(paths), room), "uint8", about, expected=usual)
    if not store.complete:
        with tqdm(total=len(paths), unit="picture", desc="decoded once", leave=False, disable=None) as bar:

            def load(ranges: Sequence[range]) -> Iterator[Any]:
                few = len(ranges) <= 1
                yield from DataLoader(smaller, batch_sampler=ranges, collate_fn=list, num_workers=0 if few else workers)  # type: ignore[arg-type]

            def rows(pictures: list[Rows]) -> list[Rows]:
                bar.update(len(pictures))
                return pictures

            store.make(load, rows)
    return Decoded(store.rows(), side)


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
