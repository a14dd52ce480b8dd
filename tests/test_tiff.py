"""Grey TIFF files written by hand, against what the specification says of their values."""

import struct
import zlib

import numpy as np
import pytest
from rawtiff import tiff

from finetune.errors import DataError
from finetune.examine import examine
from finetune.images import read_image

KINDS = {  # bits, sample format, struct code, values of the file, and the largest of its kind
    "unsigned 8": (8, 1, "B", [0, 10, 200, 255], 255),
    "signed 8": (8, 2, "b", [0, 10, 100, 127], 127),
    "unsigned 16": (16, 1, "H", [0, 100, 30000, 65535], 65535),
    "signed 16": (16, 2, "h", [0, 100, 30000, 32767], 32767),
    "unsigned 32": (32, 1, "I", [0, 100, 30000, 65535], 65535),
    "signed 32": (32, 2, "i", [0, 100, 30000, 65535], 65535),
    "float 32": (32, 3, "f", [0, 0.1, 0.5, 1], 1),
}
UNREAD = {("unsigned 32", ">")}  # Pillow knows no such kind


def read(folder, data, **options):
    (folder / "a.tif").write_bytes(data)
    return read_image(folder / "a.tif", **options)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_grey_values(tmp_path, kind, photometric, order):
    bits, fmt, code, values, largest = KINDS[kind]
    data = tiff(4, 1, struct.pack(f"{order}4{code}", *values), bits=bits, photometric=photometric, fmt=fmt, order=order)
    if (kind, order) in UNREAD:
        with pytest.raises(DataError, match=r"a kind that is not read \(Min\w+, 1 x 32 bits, unsigned\); expected grey or RGB"):
            read(tmp_path, data)
        return
    shares = np.array(values, float).astype(np.float32 if code == "f" else float) / largest
    wanted = np.rint(255 * (shares if photometric else 1 - shares))
    assert np.abs(read(tmp_path, data).numpy()[:, 0] - wanted).max() <= (1 if code == "f" else 0)
    assert examine(str(tmp_path / "a.tif"), full=False).error == examine(str(tmp_path / "a.tif"), full=True).error == ""


@pytest.mark.parametrize(("bits", "data", "values"), [(1, b"\x0f", [0] * 4 + [255] * 4), (4, b"\x0f\x5a", [0, 255, 85, 170])])
@pytest.mark.parametrize("photometric", [0, 1])
def test_few_bits(tmp_path, bits, data, values, photometric):
    found = read(tmp_path, tiff(len(values), 1, data, bits=bits, photometric=photometric))
    assert found[0, 0].tolist() == (values if photometric else [255 - value for value in values])


def test_12_bits_that_are_packed_are_scaled_by_12_bits(tmp_path):
    found = read(tmp_path, tiff(2, 1, bytes([0xFF, 0xF0, 0x80]), bits=12, photometric=1))
    assert found[0, 0].tolist() == [255, round(0x080 * 255 / 4095)]


def test_data_of_12_bits_in_16_are_scaled_by_what_is_white(tmp_path):
    data = tiff(4, 1, struct.pack("<4H", 0, 1000, 4095, 5000), bits=16, photometric=1)
    assert read(tmp_path, data)[0, 0].tolist() == [0, 4, 16, 19]
    assert read(tmp_path, data, white=4095)[0, 0].tolist() == [0, 62, 255, 255]
    turned = tiff(4, 1, struct.pack("<4H", 0, 1000, 4095, 5000), bits=16, photometric=0)
    assert read(tmp_path, turned, white=4095)[0, 0].tolist() == [255, 193, 0, 0]


@pytest.mark.parametrize(
    ("code", "fmt", "values", "text"),
    [
        ("f", 3, [0, float("nan"), 0.5, 1], "NaN"),
        ("f", 3, [0, float("inf"), 0.5, 1], "from 0 to inf, expected 0 to 1"),
        ("f", 3, [-1, 0, 0.5, 1], "from -1 to 1, expected 0 to 1"),
        ("f", 3, [0, 1, 2, 255], "from 0 to 255, expected 0 to 1"),
        ("h", 2, [-5, 0, 1, 2], "from -5 to 2, expected 0 to 32767"),
        ("b", 2, [-5, 0, 1, 2], "from -5 to 2, expected 0 to 127"),
        ("I", 1, [0, 1 << 20, 1 << 31, 2**32 - 1], r"from 0 to 4\.29497e\+09, expected 0 to 65535"),
    ],
)
def test_values_that_cannot_be_scaled_are_named(tmp_path, code, fmt, values, text):
    data = struct.pack(f"<4{code}", *values)
    with pytest.raises(DataError, match=text):
        read(tmp_path, tiff(4, 1, data, bits=2 * len(data), photometric=1, fmt=fmt))


def test_colours_and_transparency(tmp_path):
    white = 65535
    rgb = tiff(2, 1, struct.pack("<6H", 0, 25700, white, 257, 514, 771), bits=16, samples=3, photometric=2)
    assert read(tmp_path, rgb)[:, 0].T.tolist() == [[0, 100, 255], [1, 2, 3]]
    red = [257 * i for i in range(256)]
    palette = tiff(3, 1, bytes([0, 100, 255]), bits=8, photometric=3, more=[(320, 3, [*red, *red[::-1], *[0] * 256])])
    assert read(tmp_path, palette)[:, 0].T.tolist() == [[0, 255, 0], [100, 155, 0], [255, 0, 0]]
    ink = tiff(2, 1, bytes([0, 0, 0, 0, 255, 0, 0, 0]), bits=8, samples=4, photometric=5)
    assert read(tmp_path, ink)[:, 0].T.tolist() == [[255, 255, 255], [0, 255, 255]]
    pixels = bytes([100, 50, 0, 128])
    for extra, wanted in ((2, [100 * 128 / 255 + 127, 50 * 128 / 255 + 127, 127]), (1, [227, 177, 127])):  # 1: premultiplied
        found = read(tmp_path, tiff(1, 1, pixels, bits=8, samples=4, photometric=2, more=[(338, 3, [extra])]))
        assert np.abs(found[:, 0, 0].numpy() - np.array(wanted)).max() <= 1


TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: a.T[:, ::-1],
    7: lambda a: a[::-1, ::-1].T,
    8: lambda a: a.T[::-1],
}


@pytest.mark.parametrize("kind", [3, 4])
@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_of_a_tiff_file(tmp_path, order, kind):
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    for orientation in range(10):
        more = [(274, kind, [orientation])]
        found = read(tmp_path, tiff(3, 2, pixels.tobytes(), bits=8, photometric=1, order=order, more=more))
        assert found[0].tolist() == TURNS.get(orientation, TURNS[1])(pixels).tolist(), orientation


def test_what_is_cut_off_or_odd_is_refused_by_name(tmp_path):
    whole = tiff(4, 4, bytes(32), bits=16, photometric=0)
    for length in range(8, len(whole), 7):
        with pytest.raises(DataError, match=r"a\.tif"):
            read(tmp_path, whole[:length])


def png(kind, depth, width, row):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, 1, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("kind", "values", "wanted"),
    [
        (4, [25700, 65535, 25700, 0], [[100] * 3, [255] * 3]),  # grey with alpha
        (4, [25700, 32896], [[177] * 3]),
        (6, [25700, 257, 514, 65535, 25700, 0, 0, 0], [[100, 1, 2], [255] * 3]),
        (0, [25700, 65535], [[100] * 3, [255] * 3]),
    ],
)
def test_png_of_16_bits(tmp_path, kind, values, wanted):
    row = struct.pack(f">{len(values)}H", *values)
    assert read(tmp_path, png(kind, 16, len(wanted), row))[:, 0].T.tolist() == wanted
