"""What is wrong with one picture file: quickly, from its header and its end, or fully, by decoding it as training does.

A quick look decodes only what looks suspicious, so it finds files that are empty, cut off, too large or no pictures at all.
What only a full one finds: damage in the middle of a file, and which pictures are equal.
"""

from __future__ import annotations

import errno
import hashlib
import os
import warnings
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError
from torch import Tensor

from finetune.images import is_deep, open_file, read_image
from finetune.transforms import LONGEST

TINY, HUGE = 8, 10_000  # pixels of a side

_ENDINGS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (".jpg", ".jpeg", ".jpe", ".jfif"),  # a JPEG with a second picture, as phones write
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
_ENDS = 64  # bytes at the start and at the end of a file


class Examined(NamedTuple):
    """What a look at a picture came to.

    Attributes:
        error: The kind of damage for which it cannot be read; empty if there is none.
        detail: What exactly.
        notes: Other kinds, with their details.
        digest: A hash of the decoded pixels; empty after a quick look, and where there is an error.
    """

    error: str = ""
    detail: str = ""
    notes: tuple[tuple[str, str], ...] = ()
    digest: bytes = b""


def examine(path: str, full: bool) -> Examined:
    """Look at a picture.

    Args:
        path: The file.
        full: Decode it.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(_ENDS)
            file.seek(max(0, size - _ENDS))
            tail = file.read(_ENDS)
    except OSError as error:
        vanished = error.errno == errno.ENOENT
        return Examined("broken-link" if vanished else "unreadable-file", error.strerror or str(error))
    if size == 0:
        return Examined("empty-file")
    whole = _ends_well(start, tail, size)
    try:
        notes = _header(path)
        if whole and not full:
            return Examined(notes=tuple(notes))
        image = read_image(path)
    except _TooLarge as refused:
        return Examined("too-many-pixels", str(refused))
    except UnidentifiedImageError:
        kind = "not-a-picture" if _format(start) is None else "damaged" if whole else "truncated"
        return Examined(kind, f"it starts with {start[:8]!r}")
    except Exception as error:  # Pillow raises nearly everything on broken files, `read_image` a DataError
        cut = whole is False or "truncated" in str(error).lower()
        return Examined("truncated" if cut else "damaged", _reason(str(error), path))
    if full and bool((image.flatten(1) == image[:, :1, 0]).all()) and image[0].numel() > 1:
        notes.append(("one-colour", f"{tuple(image[:, 0, 0].tolist())}"))
    return Examined(notes=tuple(notes), digest=_digest(image) if full else b"")


class _TooLarge(Exception):  # noqa: N818
    pass


def _header(path: str) -> list[tuple[str, str]]:
    """Return what is odd in a file's header."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open_file(path) as image:
                width, height = image.size
                if width * height > (Image.MAX_IMAGE_PIXELS or float("inf")):
                    raise _TooLarge(f"{width} x {height}")
                return _oddities(image, path)
    except Image.DecompressionBombError as error:
        raise _TooLarge(str(error).partition(",")[0]) from None


def _oddities(image: Image.Image, path: str) -> list[tuple[str, str]]:
    found = []
    width, height = image.size
    size = f"{width} x {height}"
    kind, ending = image.format or "", os.path.splitext(path)[1].lower()
    if ending not in _ENDINGS.get(kind, ()):
        found.append(("wrong-ending", f"it is {kind}"))
    if kind != "MPO" and getattr(image, "is_animated", False):
        found.append(("several-frames", f"{getattr(image, 'n_frames', 'several')}"))
    if min(width, height) < TINY:
        found.append(("tiny", size))
    if max(width, height) >= HUGE:
        found.append(("huge", size))
    if max(width, height) > LONGEST * min(width, height):
        found.append(("elongated", size))
    if is_deep(image):
        found.append(("deep-colour", image.mode))
    if image.mode == "CMYK":
        found.append(("cmyk", ""))
    if image.has_transparency_data:
        found.append(("transparent", ""))
    return found


_STARTS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"RIFF": "WEBP",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}


def _format(start: bytes) -> str | None:
    return next((name for magic, name in _STARTS.items() if start.startswith(magic)), None)


def _ends_well(start: bytes, tail: bytes, size: int) -> bool | None:
    """Say whether a file ends as its format does; None where that cannot be told without decoding."""
    match _format(start):
        case "JPEG":
            return b"\xff\xd9" in tail
        case "PNG":
            return b"IEND" in tail
        case "GIF":
            return tail.rstrip(b"\0").endswith(b";")
        case "WEBP":
            return int.from_bytes(start[4:8], "little") + 8 <= size
        case "BMP":
            return 0 < int.from_bytes(start[2:6], "little") <= size
    return None


def _reason(text: str, path: str) -> str:
    text = text.removeprefix(f"{path} ")
    return text.removeprefix("cannot be read as a picture: ").partition(". Replace")[0]


def _digest(image: Tensor) -> bytes:
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    return hashlib.blake2b(pixels.data, digest_size=16, person=f"{image.shape[1]}x{image.shape[2]}".encode()[:16]).digest()
