"""Every format and mode against the values that were put in, or against Pillow's own conversion."""

import contextlib
import io
import os
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from finetune import images
from finetune.errors import DataError
from finetune.images import IMAGE_SUFFIXES, read_image

RNG = np.random.default_rng(0)
COLOURS = Image.fromarray(RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((28, 20), Image.Resampling.BICUBIC)
GREY = COLOURS.convert("L")


def expected(image):
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def write(folder, image, kind, **options):
    path = folder / f"picture.{kind.lower()}"
    image.save(path, kind, **options)
    return path


@pytest.fixture(params=["torchvision", "pillow"])
def decoder(request, monkeypatch):
    """Read with and without torchvision's decoder, which a later release removes."""
    if request.param == "pillow":
        monkeypatch.setattr(images, "_DECODE", None)
    return request.param


@pytest.mark.parametrize(
    ("kind", "image", "options"),
    [
        ("PNG", COLOURS, {}),
        ("PNG", GREY, {}),
        ("PNG", COLOURS.convert("P"), {}),
        ("PNG", COLOURS.convert("1"), {}),
        ("WEBP", COLOURS, {"lossless": True}),
        ("BMP", COLOURS, {}),
        ("BMP", GREY, {}),
        ("TIFF", COLOURS, {}),
        ("TIFF", COLOURS, {"compression": "tiff_lzw"}),
        ("TIFF", COLOURS.convert("CMYK"), {}),
        ("GIF", COLOURS.convert("P"), {}),
        ("PPM", COLOURS, {}),
    ],
)
def test_formats_without_loss_give_the_values_that_were_put_in(tmp_path, decoder, kind, image, options):
    result = read_image(write(tmp_path, image, kind, **options))
    assert result.dtype == torch.uint8
    assert result.permute(1, 2, 0).is_contiguous()
    assert torch.equal(result, expected(image))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 50, "subsampling": 2}])
def test_jpeg_is_what_pillow_reads(tmp_path, decoder, mode, options):
    path = write(tmp_path, COLOURS.convert(mode), "JPEG", **options)
    with Image.open(path) as image:
        assert image.mode == mode
        theirs = expected(image)
    result = read_image(path)
    assert result.permute(1, 2, 0).is_contiguous()
    assert (result.int() - theirs.int()).abs().max() <= 1


def test_lossy_webp_is_what_pillow_reads(tmp_path, decoder):
    path = write(tmp_path, COLOURS, "WEBP")
    with Image.open(path) as image:
        assert (read_image(path).int() - expected(image).int()).abs().max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_of_grey_are_scaled_not_clipped(tmp_path, decoder, kind):
    values = np.array([[0, 255, 256, 257], [32768, 40000, 65279, 65535]], dtype=np.uint16)
    result = read_image(write(tmp_path, Image.fromarray(values), kind))
    assert result[0].tolist() == [[0, 1, 1, 1], [128, 156, 254, 255]]  # value / 257, rounded
    assert torch.equal(result[0], result[2])


def test_16_bits_of_colour(tmp_path, decoder):
    # Pillow writes no such PNG, so its chunks are put together here
    import struct
    import zlib

    rows = [[(0, 65535, 257), (32768, 257 * 77, 257 * 200)]]
    body = b"".join(b"\0" + b"".join(struct.pack(">3H", *pixel) for pixel in row) for row in rows)

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">2I5B", 2, 1, 16, 2, 0, 0, 0)
    path = tmp_path / "deep.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b""))
    wanted = torch.tensor([[[0, 128]], [[255, 77]], [[1, 200]]])
    assert (read_image(path).int() - wanted).abs().max() <= 1


def test_32_bits_mode_i_and_floats(tmp_path):
    whole = Image.fromarray(np.array([[0, 25700, 65535]], dtype=np.int32))
    assert read_image(write(tmp_path, whole, "TIFF"))[0].tolist() == [[0, 100, 255]]
    floats = Image.fromarray(np.array([[0.0, 0.2, 1.0]], dtype=np.float32))
    assert read_image(write(tmp_path, floats, "TIFF"))[0].tolist() == [[0, 51, 255]]
    for wrong in (np.array([[0, 70000]], dtype=np.int32), np.array([[-1.0, np.nan]], dtype=np.float32)):
        with pytest.raises(DataError, match=r"picture\.tiff .* grey values go from .* expected 0 to"):
            read_image(write(tmp_path, Image.fromarray(wrong), "TIFF"))


@pytest.mark.parametrize(("kind", "mode"), [("PNG", "RGBA"), ("PNG", "LA"), ("WEBP", "RGBA"), ("TIFF", "RGBA")])
def test_transparency_is_laid_on_white(tmp_path, decoder, kind, mode):
    image = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((0, 51, 255)):  # clear, a fifth, opaque
        image.putpixel((x, 0), (100, 100, 100, alpha))
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    result = read_image(write(tmp_path, image.convert(mode), kind, **options))
    assert result[:, 0].tolist() == [[255, 224, 100]] * 3  # 0.2 * 100 + 0.8 * 255 = 224


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_palette_colour_is_white(tmp_path, decoder, kind):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putpixel((1, 0), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = read_image(write(tmp_path, image, kind, transparency=0))
        assert result[:, 0].T.tolist() == [[255, 255, 255], [200, 0, 0]]
        several = read_image(write(tmp_path, image, "PNG", transparency=bytes([0, 255])))
        assert several[:, 0].T.tolist() == [[255, 255, 255], [200, 0, 0]]


def test_a_transparent_colour_of_an_rgb_png_is_white(tmp_path, decoder):
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (4, 5, 6))
    assert read_image(write(tmp_path, image, "PNG", transparency=(1, 2, 3)))[:, 0].T.tolist() == [[255] * 3, [4, 5, 6]]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(tmp_path, decoder, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    path = write(tmp_path, COLOURS, kind, exif=exif, **options)
    turns = {2: [0], 3: [3], 4: [1], 5: [5], 6: [4], 7: [6], 8: [2]}  # Pillow's transpositions, from the EXIF standard
    upright = COLOURS
    for turn in turns.get(orientation, []):
        upright = upright.transpose(Image.Transpose(turn))
    result = read_image(path)
    assert result.shape == expected(upright).shape
    assert (result.int() - expected(upright).int()).abs().max() <= (6 if kind == "JPEG" else 0)


def test_exif_behind_xmp(tmp_path, decoder):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = write(tmp_path, COLOURS, "JPEG", exif=exif)
    data, xmp = path.read_bytes(), b"http://ns.adobe.com/xap/1.0/\0<x/>"
    path.write_bytes(data[:2] + b"\xff\xe1" + (len(xmp) + 2).to_bytes(2, "big") + xmp + data[2:])
    with Image.open(path) as image:
        assert torch.equal(read_image(path), expected(ImageOps.exif_transpose(image)))


@pytest.mark.parametrize("kind", ["WEBP", "GIF", "TIFF", "PNG"])
def test_of_several_pictures_it_is_the_first(tmp_path, kind):
    first, second = Image.new("RGB", (6, 4), (250, 0, 0)), Image.new("RGB", (6, 4), (0, 0, 250))
    options = {"lossless": True} if kind == "WEBP" else {}
    path = write(tmp_path, first, kind, save_all=True, append_images=[second], **options)
    assert torch.equal(read_image(path), expected(first))


def test_the_content_decides_not_the_name(tmp_path):
    path = tmp_path / "really_a_bmp.jpg"
    COLOURS.save(path, "BMP")
    assert torch.equal(read_image(str(path)), expected(COLOURS))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_a_file_that_is_cut_off(tmp_path, decoder, kind):
    noise = Image.fromarray(RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    path = write(tmp_path, noise.convert("P") if kind == "GIF" else noise, kind)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"picture\.{kind.lower()} cannot be read as a picture: .*Replace the file"):
        read_image(path)


def test_files_that_are_no_pictures(tmp_path):
    empty, page = tmp_path / "empty.jpg", tmp_path / "page.png"
    empty.touch()
    page.write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(DataError, match=r"empty\.jpg is empty: expected a picture, found 0 bytes"):
        read_image(empty)
    with pytest.raises(DataError, match=r"page\.png is not a picture in a known format: it starts with b'<!DOCTYP'"):
        read_image(page)
    with pytest.raises(DataError, match=r"none\.png cannot be opened: No such file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(DataError, match="cannot be opened: "):
        read_image(tmp_path)


def test_a_decompression_bomb_names_its_size(tmp_path, decoder, monkeypatch):
    path = write(tmp_path, COLOURS, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 28 * 20 - 1)
    with pytest.raises(DataError, match="28 x 20 pixels, more than the limit of 559"):
        read_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # where Pillow itself refuses
    with pytest.raises(DataError, match=r"560 pixels"):
        read_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read_image(path).shape == (3, 20, 28)


def test_the_usual_jpeg_is_not_decoded_by_pillow(tmp_path, monkeypatch):
    if images._DECODE is None:
        pytest.skip("this torchvision has no decoder")
    exif = Image.Exif()
    exif[0x0112] = 6
    path = write(tmp_path, COLOURS, "JPEG", exif=exif)
    monkeypatch.setattr(Image, "open", None)
    assert read_image(path).shape == (3, 28, 20)


def test_suffixes_are_those_that_pillow_knows():
    Image.init()
    assert set(Image.EXTENSION) >= IMAGE_SUFFIXES


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"])
def test_damaged_bytes_give_a_picture_or_a_data_error(tmp_path, kind):
    """Torchvision's PNG decoder ends the process on the first of these."""
    buffer = io.BytesIO()
    (COLOURS.convert("P") if kind == "GIF" else COLOURS).save(buffer, kind)
    path = tmp_path / "damaged"
    for seed in range(30):
        rng = np.random.default_rng(seed)
        data = np.frombuffer(buffer.getvalue(), np.uint8).copy()
        data[rng.integers(4, len(data), 8)] = rng.integers(0, 256, 8)
        path.write_bytes(data.tobytes())
        with contextlib.suppress(DataError):
            assert read_image(path).dtype == torch.uint8


def test_no_other_program_is_given_a_picture(tmp_path):
    path = tmp_path / "cat.jpg"
    Image.new("RGB", (8, 8), (200, 0, 0)).save(path, "EPS")  # a program in PostScript, which Ghostscript would run
    with pytest.raises(DataError, match="not a picture in a known format"):
        read_image(path)


def test_a_pipe_or_a_device_is_no_picture_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path, said in ((tmp_path / "pipe.png", "no plain file"), ("/dev/zero", "no plain file"), (tmp_path, "directory")):
        with pytest.raises(DataError, match=said):
            read_image(path)
    Image.new("RGB", (3, 2)).save(tmp_path / "a.png")
    (tmp_path / "link.png").symlink_to("a.png")
    assert read_image(tmp_path / "link.png").shape == (3, 2, 3)
