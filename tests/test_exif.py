"""Orientation in EXIF data of every type, byte order and value, against Pillow's own turning."""

import io
import itertools
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from finetune.images import decode_image

CODES = {1: "B", 3: "H", 4: "I", 6: "b", 7: "B", 8: "h", 9: "i"}
SMALL = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize((16, 12))


def exif(order, kind, value):
    """Return EXIF data with one orientation, or two that contradict each other."""
    entries = [struct.pack(f"{order}HHI", 274, kind, 1) + struct.pack(order + CODES[kind], v).ljust(4, b"\0") for v in value]
    ifd = struct.pack(f"{order}H", len(entries)) + b"".join(entries) + bytes(4)
    return b"Exif\0\0" + (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8) + ifd


def encoded(kind, data):
    file = io.BytesIO()
    SMALL.save(file, kind, exif=data, **({"lossless": True} if kind == "WEBP" else {}))
    return bytearray(file.getvalue())


def require_pillows(data, what):
    with Image.open(io.BytesIO(data)) as image:
        wanted = np.asarray(ImageOps.exif_transpose(image).convert("RGB")).transpose(2, 0, 1)
    found = decode_image(data, "an image").numpy()
    assert found.shape == wanted.shape, what
    assert np.abs(found.astype(int) - wanted).max() <= 1, what


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_orientation(kind):
    for order, code, value in itertools.product("<>", CODES, range(10)):
        require_pillows(encoded(kind, exif(order, code, [value])), (order, code, value))


def test_two_orientations_in_one_directory():
    for order, values in itertools.product("<>", [(6, 3), (3, 6), (1, 8), (8, 9)]):
        require_pillows(encoded("JPEG", exif(order, 3, values)), (order, values))


def test_xmp_says_the_orientation_where_exif_does_not():
    data = encoded("JPEG", b"Exif\0\0II*\0" + struct.pack("<IHI", 8, 0, 0))
    packet = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    start = data.index(b"\xff\xe1")
    end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    segment = b"\xff\xe1" + struct.pack(">H", len(packet) + 2) + packet
    require_pillows(data[:end] + segment + data[end:], "XMP")


def test_damaged_exif_says_nothing():
    whole = exif("<", 3, [6])
    for length in range(6, len(whole), 3):
        data = encoded("JPEG", whole[:length])
        found = decode_image(data, "an image")
        assert sorted(found.shape) == [3, 12, 16]
