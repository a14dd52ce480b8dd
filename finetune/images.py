"""Reading a picture file into a uint8 tensor, whatever its format, bit depth, palette, transparency or EXIF rotation.

The usual JPEG goes through torchvision's decoder, which takes little more than half the time of Pillow's; a walk over the
segments of its header tells whether it is a usual one. Pillow reads all else: for other formats the gain is small, and
torchvision 0.29 ends the process (segmentation fault) on some damaged PNG files. That release also deprecates its decoders in
favour of another package: where they are gone, Pillow reads everything, with the same result.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import warnings
from typing import Any

import numpy as np
import torch
import torchvision  # noqa: F401  registers the operator that decodes
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from finetune.errors import DataError
from finetune.files import open_plain
from finetune.tiff import TIFF_STARTS, GreyTiff, describe_tiff, grey_of_tiff, read_tags

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm"}
)

UNREAD_SUFFIXES = frozenset(
    (
        ".heic",
        ".heif",
        ".avif",
        ".jxl",
        ".jp2",
        ".j2k",
        ".svg",
        ".ico",
        ".psd",
        ".xcf",
        ".eps",
        ".pdf",
        ".tga",
        ".exr",
        ".hdr",
        ".dng",
        ".cr2",
        ".cr3",
        ".nef",
        ".arw",
        ".orf",
        ".rw2",
        ".raf",
        ".raw",
        ".dcm",
        ".nii",
    )
)
"""Endings of images that are not read, so that a folder of them is not called empty."""
"""File name endings, in lower case, by which a picture is recognised in a folder."""

_PROGRAMS = {"EPS", "WMF"}
_DECODE: Any = getattr(torch.ops.image, "decode_image", None)  # the operator itself, as the function around it warns
FULL = 65535
"""The largest value of 16 bits, which is white unless the data say otherwise."""

_RGB = 3  # torchvision.io.ImageReadMode.RGB
_MOST_BYTES = 2**30  # of a file: the most pixels that Pillow allows, uncompressed with 16 bits, are fewer
_CONVERT = "Convert it to JPEG or PNG (on a Mac with `sips -s format jpeg`, elsewhere with ImageMagick), or remove it."
_ORIENTATION, _SHORT = 274, 3
_REMEDY = "Replace the file, or remove it from the folder."


def read_image(path: str | os.PathLike[str], white: int = FULL) -> Tensor:
    """Read a picture as RGB, turned upright as its EXIF orientation says.

    Transparent pixels are laid on white. 16-bit values are scaled to 8 bits. Of an animation or a multi-page file it is the
    first picture.

    Args:
        path: A file in one of the formats of `IMAGE_SUFFIXES`; the content decides, not the name.
        white: The grey value of files of more than 8 bits that becomes white; larger ones do, too. 4095 for data of 12 bits.

    Returns:
        uint8 tensor of shape (3, height, width); the channels are last in memory, which makes resizing a third faster.

    Raises:
        DataError: If the file cannot be read, is empty, cut off, no picture, or has more pixels than Pillow's safety limit
            (`PIL.Image.MAX_IMAGE_PIXELS`).
    """
    return decode_image(_read_bytes(path), str(path), white)


def decode_image(data: bytearray, name: str, white: int = FULL) -> Tensor:
    """Decode the content of a file as `read_image` does; messages call it by a name."""
    if _DECODE is not None and 0 < _plain_jpeg_pixels(data) <= (Image.MAX_IMAGE_PIXELS or math.inf):
        with contextlib.suppress(RuntimeError):  # Pillow then reads it or says what is wrong
            decoded: Tensor = _DECODE(torch.frombuffer(data, dtype=torch.uint8), _RGB, True)
            return decoded
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on metadata, palettes and size: what matters becomes an error below
            grey = grey_of_tiff(data)
            with open_picture(io.BytesIO(grey.data if grey else data)) as image:
                return image_to_tensor(image, white, grey)
    except UnidentifiedImageError:
        start = bytes(data[:8])
        known = known_format(data)
        if known:
            raise DataError(f"{name} is {known}, whatever its name says, which is not read here. {_CONVERT}") from None
        if start[:4] in TIFF_STARTS:
            raise DataError(
                f"{name} is a TIFF file of a kind that is not read ({describe_tiff(data)}); expected grey or RGB of 8 or 16 "
                "bits. Save it so, or remove it from the folder."
            ) from None
        raise DataError(f"{name} is not a picture in a known format: it starts with {start!r}. {_REMEDY}") from None
    except MemoryError:
        raise DataError(f"{name} cannot be decoded: there is no memory for its pixels. {_REMEDY}") from None
    except Exception as error:  # Pillow raises nearly everything on broken files: OSError, SyntaxError, struct.error, ...
        raise DataError(f"{name} cannot be read as a picture: {error}. {_REMEDY}") from error


def known_format(data: bytes | bytearray) -> str:
    r"""Name the format of a file that Pillow does not read, by how it starts; empty if it is none that is often met.

    >>> known_format(b"\0\0\0\x1cftypheic")
    'an HEIC image'
    """
    start = bytes(data[:16])
    if start[4:8] == b"ftyp":
        brand = start[8:12]
        return _BRANDS.get(brand, "a video or another file of the MP4 family")
    return next((name for magic, name in _MAGIC.items() if start.startswith(magic)), "")


_BRANDS = dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"), "an HEIC image")
_BRANDS |= dict.fromkeys((b"avif", b"avis"), "an AVIF image") | {b"crx ": "a raw image of a camera (CR3)"}
_MAGIC = {
    b"%PDF": "a PDF document",
    b"8BPS": "a Photoshop file",
    b"<svg": "an SVG drawing",
    b"<?xml": "an XML file, perhaps an SVG drawing",
    b"PK\x03\x04": "a ZIP archive",
    b"\xff\x0a": "a JPEG XL image",
    b"\0\0\0\x0cJXL ": "a JPEG XL image",
    b"FUJIFILM": "a raw image of a camera (RAF)",
    b"gimp xcf": "a GIMP file",
}


def white_text(white: int) -> str:
    """Return what belongs into the key of anything that is kept of images: empty where 16 bits are scaled by all of them."""
    return "" if white == FULL else f", {white} is white"


def open_picture(file: str | io.BytesIO) -> Image.Image:
    """Open a picture with Pillow, in any format but those that Pillow hands to another program (PostScript to Ghostscript)."""
    Image.init()
    return Image.open(file, formats=[name for name in Image.ID if name not in _PROGRAMS])


def open_file(path: str) -> Image.Image:
    """Open a file with Pillow to look at its header, also a TIFF file that Pillow itself refuses and `read_image` reads."""
    try:
        return open_picture(path)
    except UnidentifiedImageError:
        grey = grey_of_tiff(_read_bytes(path))
        if grey is None:
            raise
        return open_picture(io.BytesIO(grey.data))


def _read_bytes(path: str | os.PathLike[str]) -> bytearray:
    try:
        with os.fdopen(open_plain(path, follow=True), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > _MOST_BYTES:
                raise DataError(
                    f"{path} has {size / 2**30:.1f} GB, expected an image of at most {_MOST_BYTES / 2**30:g} GB. {_REMEDY}"
                )
            data = bytearray(size)
            del data[file.readinto(data) :]
    except MemoryError:
        raise DataError(f"{path} has {size / 2**20:.0f} MB, for which there is no memory. {_REMEDY}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error.strerror or error}. Check the path and its permissions.") from error
    if not data:
        raise DataError(f"{path} is empty: expected a picture, found 0 bytes. {_REMEDY}")
    return data


def _plain_jpeg_pixels(data: bytearray) -> int:
    """Return the number of pixels of a JPEG that torchvision decodes as Pillow does, and 0 for any other file.

    That is one of 8 bits, grey or with three colours, and with EXIF, if any, in the first APP1 segment, where an orientation
    is one number of 16 bits: torchvision takes the first two bytes of any other kind for it.
    """
    if not data.startswith(b"\xff\xd8\xff"):
        return 0
    position, turned = 2, False
    others = False  # APP1 segments that hold no EXIF; XMP may say an orientation where EXIF says none
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == 0xE1:
            exif = data[position + 4 : position + 10] == b"Exif\0\0"
            if exif and (others or turned):
                return 0  # torchvision looks at the first segment only
            found = _orientations(data[position + 10 : position + 2 + length]) if exif else []
            if found is None or len(found) > 1 or any(kind != (_SHORT, 1) for kind in found):
                return 0
            turned, others = turned or bool(found), others or not exif
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = (int.from_bytes(data[position + at : position + at + 2], "big") for at in (5, 7))
            usual = data[position + 4] == 8 and data[position + 9] in (1, 3) and not (others and not turned)
            return height * width if usual else 0
        position += 2 + length
    return 0


def _orientations(exif: bytearray) -> list[tuple[int, int]] | None:
    """Return type and count of each orientation in the first directory of EXIF data; None if that cannot be read."""
    entries = read_tags(exif)
    return None if entries is None else [(entry.kind, entry.number) for entry in entries if entry.tag == _ORIENTATION]


def image_to_tensor(image: Image.Image, white: int = FULL, grey: GreyTiff | None = None) -> Tensor:
    """Bring a Pillow image of any mode to what `read_image` returns.

    Args:
        image: The image.
        white: See `read_image`.
        grey: What a TIFF file says of its grey values beyond what Pillow knows.

    Raises:
        ValueError: If it has too many pixels, or grey values that cannot be scaled.
    """
    width, height = image.size
    if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise ValueError(
            f"it has {width} x {height} pixels, more than the limit of {Image.MAX_IMAGE_PIXELS} "
            "(PIL.Image.MAX_IMAGE_PIXELS, against decompression bombs); make it smaller or raise the limit"
        )
    image.load()
    with contextlib.suppress(Exception):  # damaged EXIF says nothing about the pixels
        image = ImageOps.exif_transpose(image)
    return torch.from_numpy(np.array(_to_rgb(image, white, grey))).permute(2, 0, 1)


def is_deep(image: Image.Image) -> bool:
    """Return whether a Pillow image holds grey values of more than 8 bits."""
    return image.mode.startswith("I") or image.mode == "F"


def _to_rgb(image: Image.Image, white: int, grey: GreyTiff | None) -> Image.Image:
    if is_deep(image) or (grey is not None and grey.signed):
        image = _to_8_bits(image, white, grey)
    if image.has_transparency_data:
        paper = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(paper, image.convert("RGBA"))
    return image.convert("RGB")


def grey_values(image: Image.Image, grey: GreyTiff | None = None) -> np.ndarray:
    """Return the grey values of an image of more than 8 bits, float64 (height, width), as they stand in its file."""
    values = np.asarray(image)
    if grey is not None and grey.signed and values.dtype == np.uint8:
        values = values.view(np.int8)  # Pillow takes them for unsigned ones
    if grey is not None and not grey.signed and grey.bits == 32 and values.dtype == np.int32:
        values = values.view(np.uint32)
    return values.astype(np.float64)


def _to_8_bits(image: Image.Image, white: int, grey: GreyTiff | None) -> Image.Image:
    """Scale grey values of 16 bits (which Pillow would clip at 255), or floating-point ones between 0 and 1."""
    values = grey_values(image, grey)
    largest = 1.0 if image.mode == "F" else FULL if grey is None else grey.largest
    known = values[~np.isnan(values)]
    low, high = (known.min(), known.max()) if known.size else (math.nan, math.nan)
    if known.size < values.size or not (low >= 0 and high <= largest):
        found = f"go from {low:g} to {high:g}" + (" and NaN" if known.size < values.size else "")
        raise ValueError(f"its grey values {found}, expected 0 to {largest:g}; save it with 8 or 16 bits")
    limit = min(largest, white) if image.mode.startswith("I") else largest
    values = np.minimum(values, limit) * (255 / limit)
    if grey is not None and grey.white_is_zero:
        values = 255 - values
    return Image.fromarray(np.rint(values).astype(np.uint8))


def largest_value(path: str | os.PathLike[str]) -> int | None:
    """Return the largest grey value of a file with grey of 16 bits; None for any other file, and where it cannot be read."""
    try:
        data = _read_bytes(path)
        grey = grey_of_tiff(data)
        with warnings.catch_warnings(), open_picture(io.BytesIO(grey.data if grey else data)) as image:
            warnings.simplefilter("ignore")
            return int(grey_values(image, grey).max()) if image.mode.startswith("I") else None
    except Exception:  # as above: what cannot be read is named elsewhere
        return None
