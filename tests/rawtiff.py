"""TIFF files written by hand as the specification says (TIFF 6.0), so that no library stands behind both sides."""

import struct

_TYPES = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i"}


def tiff(width, height, data, *, bits, photometric, samples=1, fmt=1, order="<", more=()):
    """Return a file with one uncompressed strip.

    Args:
        width: In pixels.
        height: In pixels.
        data: The strip, in the byte order of the file.
        bits: Bits per sample.
        photometric: 0 MinIsWhite, 1 MinIsBlack, 2 RGB, 3 palette, 5 CMYK.
        samples: Samples per pixel.
        fmt: SampleFormat: 1 unsigned, 2 signed, 3 floating point.
        order: "<" for II, ">" for MM.
        more: Further tags: (tag, type, values).
    """
    tags = [
        (256, 4, [width]),
        (257, 4, [height]),
        (258, 3, [bits] * samples),
        (259, 3, [1]),
        (262, 3, [photometric]),
        (277, 3, [samples]),
        (278, 4, [height]),
        (279, 4, [len(data)]),
        (339, 3, [fmt] * samples),
        *more,
    ]
    tags.append((273, 4, [0]))
    tags.sort()
    head = 8 + 2 + 12 * len(tags) + 4
    extra, place = b"", 0
    entries = []
    for tag, kind, values in tags:
        raw = struct.pack(f"{order}{len(values)}{_TYPES[kind]}", *values)
        if len(raw) > 4:
            entries.append((tag, kind, len(values), struct.pack(f"{order}I", head + len(extra))))
            extra += raw + b"\0" * (len(raw) % 2)
        else:
            place = len(entries) if tag == 273 else place
            entries.append((tag, kind, len(values), raw.ljust(4, b"\0")))
    entries[place] = (273, 4, 1, struct.pack(f"{order}I", head + len(extra)))
    ifd = struct.pack(f"{order}H", len(entries))
    ifd += b"".join(struct.pack(f"{order}HHI", tag, kind, count) + raw for tag, kind, count, raw in entries)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}I", 8) + ifd + b"\0\0\0\0" + extra + data
