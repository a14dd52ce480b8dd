"""Small pictures for pages and figures, and a sheet of many."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from finetune.errors import DataError
from finetune.images import read_image

_QUALITY = 80
_MOST_BYTES = 2**28  # of a file that is read for a small picture of it
_PAPER, _INK = (255, 255, 255), (27, 31, 36)


def thumbnail(path: str | os.PathLike[str], side: int = 160) -> np.ndarray | None:
    """Read a picture and make it small.

    Args:
        path: The file.
        side: Pixels that neither side exceeds afterwards.

    Returns:
        uint8 (height, width, 3), or None if the file is missing, no picture, or very large.
    """
    try:
        if os.path.getsize(path) > _MOST_BYTES:
            return None
        pixels = read_image(path).permute(1, 2, 0).numpy()
    except (DataError, OSError):
        return None
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((side, side))
    return np.asarray(picture)


def data_uri(picture: np.ndarray | bytes) -> str:
    """Return a picture as a `data:` address, which a page holds within itself.

    Args:
        picture: uint8 (height, width, 3), or the bytes of a JPEG file.
    """
    return f"data:image/jpeg;base64,{base64.b64encode(picture if isinstance(picture, bytes) else jpeg(picture)).decode()}"


def jpeg(picture: np.ndarray) -> bytes:
    """Return a picture, uint8 (height, width, 3), as a JPEG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="JPEG", quality=_QUALITY)
    return buffer.getvalue()


def sheet(pictures: Sequence[np.ndarray], captions: Sequence[str], columns: int = 4) -> np.ndarray:
    """Lay pictures of one size side by side, a caption below each.

    Small ones are enlarged by a whole factor, so that their pixels stay what they are.

    Args:
        pictures: uint8 (height, width, 3) each.
        captions: One for each.
        columns: Pictures side by side.

    Returns:
        uint8 (height, width, 3).
    """
    height, width = pictures[0].shape[:2]
    factor = max(1, round(176 / max(height, width)))
    letters = max(13, width * factor // 11) if any(captions) else 0
    cell_width, cell_height, gap = width * factor, height * factor + (letters + 6 if letters else 0), 6
    rows, columns = -(-len(pictures) // columns), min(columns, len(pictures))
    paper = Image.new("RGB", (columns * (cell_width + gap) - gap, rows * (cell_height + gap) - gap), _PAPER)
    draw, font = ImageDraw.Draw(paper), ImageFont.load_default(letters or 13)
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = number % columns * (cell_width + gap), number // columns * (cell_height + gap)
        large = Image.fromarray(picture).resize((width * factor, height * factor), Image.Resampling.NEAREST)
        paper.paste(large, (left, top))
        while caption and draw.textlength(caption, font) > cell_width:
            caption = caption[:-1]
        draw.text((left, top + height * factor + 2), caption, fill=_INK, font=font)
    return np.asarray(paper)
