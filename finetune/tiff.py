"""The first directory of a TIFF file, which is also that of EXIF data: what Pillow does not tell of grey values.

Pillow turns MinIsWhite files (PhotometricInterpretation 0) of up to 8 bits and leaves or refuses those with more; it takes
signed bytes for unsigned ones. TIFF 6.0, sections 2, 4 and 19.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

TIFF_STARTS = (b"II*\0", b"MM\0*")
_WIDTHS = {1: "B", 3: "H", 4: "I"}  # types whose single value stands in the entry itself
_BITS, _PHOTOMETRIC, _SAMPLES, _FORMAT = 258, 262, 277, 339
_MOST = 4096  # entries of a directory
_PHOTOMETRICS = {0: "MinIsWhite", 1: "MinIsBlack", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "CIELab"}
_FORMATS = {1: "unsigned", 2: "signed", 3: "floating point"}


class Entry(NamedTuple):
    """An entry of a directory.

    Attributes:
        tag: What it is.
        kind: Type of its values: 1 byte, 3 short, 4 long, ...
        number: Number of values.
        value: The first value if it stands in the entry and is a whole number without sign, otherwise None.
        at: Where its value, or the offset of its values, stands in the data.
    """

    tag: int
    kind: int
    number: int
    value: int | None
    at: int


class GreyTiff(NamedTuple):
    """A grey TIFF file.

    Attributes:
        data: Its bytes, for Pillow.
        bits: Bits of a value.
        signed: Whether values have a sign.
        white_is_zero: Whether 0 is white, and Pillow does not turn that.
    """

    data: bytes | bytearray
    bits: int
    signed: bool
    white_is_zero: bool

    @property
    def largest(self) -> int:
        """The largest value of its kind, which is white; of 32 bits those of 16, as which they are usually written."""
        return int(2 ** min(16, max(1, self.bits - self.signed * (self.bits < 32))) - 1)


def read_tags(data: bytes | bytearray) -> list[Entry] | None:
    """Return the entries of the first directory; None if there is none, or it is cut off."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(bytes(data[:4]))
    if order is None or len(data) < 8:
        return None
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    if start + 2 > len(data):
        return None
    (number,) = struct.unpack_from(f"{order}H", data, start)
    if number > _MOST or start + 2 + 12 * number > len(data):
        return None
    return [_entry(data, order, start + 2 + 12 * place) for place in range(number)]


def _entry(data: bytes | bytearray, order: str, at: int) -> Entry:
    tag, kind, count = struct.unpack_from(f"{order}HHI", data, at)
    width = _WIDTHS.get(kind)
    inside = width is not None and count * struct.calcsize(f"{order}{width}") <= 4 and count > 0
    return Entry(tag, kind, count, struct.unpack_from(f"{order}{width}", data, at + 8)[0] if inside else None, at + 8)


def _values(data: bytes | bytearray) -> dict[int, Entry]:
    return {entry.tag: entry for entry in read_tags(data) or []}


def grey_of_tiff(data: bytearray) -> GreyTiff | None:
    """Return what a grey TIFF file of one sample per pixel says of its values; None for any other file.

    Where 0 is white and values have more than 8 bits, the data are a copy that says the opposite: Pillow reads all of its kinds
    only so, and the values are turned afterwards.
    """
    if bytes(data[:4]) not in TIFF_STARTS:
        return None
    tags = _values(data)
    photometric, samples = tags.get(_PHOTOMETRIC), _first(tags, _SAMPLES, 1)
    bits, kind = _first(tags, _BITS, 1), _first(tags, _FORMAT, 1)
    if photometric is None or photometric.value not in (0, 1) or samples != 1 or bits is None:
        return None
    white_is_zero = photometric.value == 0 and (bits > 8 or kind == 2)
    if not white_is_zero:
        return GreyTiff(data, bits, kind == 2, white_is_zero=False)
    turned, order = bytearray(data), "<" if data.startswith(b"II") else ">"
    struct.pack_into(f"{order}{_WIDTHS[photometric.kind]}", turned, photometric.at, 1)
    return GreyTiff(turned, bits, kind == 2, white_is_zero=True)


def _first(tags: dict[int, Entry], tag: int, otherwise: int) -> int | None:
    return tags[tag].value if tag in tags else otherwise


def describe_tiff(data: bytearray) -> str:
    """Say for a message what kind of TIFF file this is."""
    tags = _values(data)
    bits, kind = _first(tags, _BITS, 1), _first(tags, _FORMAT, 1)
    photometric, samples = _first(tags, _PHOTOMETRIC, -1), _first(tags, _SAMPLES, 1)
    colours = _PHOTOMETRICS.get(-1 if photometric is None else photometric, f"photometric interpretation {photometric}")
    named = _FORMATS.get(kind or 1, f"sample format {kind}")
    return f"{colours}, {samples} x {bits if bits is not None else 'several'} bits, {named}"
