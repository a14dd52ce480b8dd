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

from finetune.errors import DataError
from finetune.images import read_image
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
_TAIL = 64  # bytes


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
            file.seek(max(0, size - _TAIL))
            tail = file.read(_TAIL)
    except OSError as error:
        vanished = error.errno == errno.ENOENT
        return Examined("broken-link" if vanished else "unreadable-file", error.strerror or str(error))
    if size == 0:
        return Examined("empty-file")
    try:
        kind, notes = _header(path)
    except _Refused as refused:
        return Examined(refused.kind, refused.detail)
    whole = _ends_well(kind, tail, path, size)
    if whole and not full:
        return Examined(notes=tuple(notes))
    try:
        image = read_image(path)
    except DataError as error:
        cut = not whole or "truncated" in str(error).lower()
        return Examined("truncated" if cut else "damaged", _reason(error, path), tuple(notes))
    if full and bool((image.flatten(1) == image[:, :1, 0]).all()) and image[0].numel() > 1:
        notes.append(("one-colour", f"{tuple(image[:, 0, 0].tolist())}"))
    return Examined(notes=tuple(notes), digest=_digest(image) if full else b"")


class _Refused(Exception):  # noqa: N818
    def __init__(self, kind: str, detail: str) -> None:
        self.kind, self.detail = kind, detail


def _header(path: str) -> tuple[str, list[tuple[str, str]]]:
    """Return the format that the content says, and what is odd in it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                width, height = image.size
                if width * height > (Image.MAX_IMAGE_PIXELS or float("inf")):
                    raise _Refused("too-many-pixels", f"{width} x {height}")
                return image.format or "", list(_oddities(image, path))
    except Image.DecompressionBombError as error:
        raise _Refused("too-many-pixels", str(error).partition(",")[0]) from None
    except UnidentifiedImageError:
        with open(path, "rb") as file:
            start = file.read(8)
        known = start.startswith((b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*")) or start[:4] == b"RIFF"
        raise _Refused("truncated" if known else "not-a-picture", f"it starts with {start!r}") from None
    except _Refused:
        raise
    except Exception as error:  # Pillow raises nearly everything on broken files
        raise _Refused("damaged", str(error)) from None


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
    if image.mode.startswith("I") or image.mode == "F":
        found.append(("deep-colour", image.mode))
    if image.mode == "CMYK":
        found.append(("cmyk", ""))
    if image.has_transparency_data:
        found.append(("transparent", ""))
    return found


def _ends_well(kind: str, tail: bytes, path: str, size: int) -> bool:
    """Say whether a file ends as its format does; False where that cannot be told without decoding."""
    if kind in ("JPEG", "MPO"):
        return b"\xff\xd9" in tail
    if kind == "PNG":
        return b"IEND" in tail
    if kind == "GIF":
        return tail.rstrip(b"\0").endswith(b";")
    if kind in ("WEBP", "BMP"):
        with open(path, "rb") as file:
            start = file.read(8)
        said = int.from_bytes(start[4:8], "little") + 8 if kind == "WEBP" else int.from_bytes(start[2:6], "little")
        return 0 < said <= size
    return False


def _reason(error: DataError, path: str) -> str:
    text = str(error).removeprefix(f"{path} ")
    return text.partition(": ")[2].partition(". Replace")[0] or text


def _digest(image: Tensor) -> bytes:
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    return hashlib.blake2b(pixels.data, digest_size=16, person=f"{image.shape[1]}x{image.shape[2]}".encode()[:16]).digest()
