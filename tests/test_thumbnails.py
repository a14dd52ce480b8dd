"""Small pictures and sheets, read back with Pillow."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from finetune.thumbnails import data_uri, jpeg, sheet, thumbnail


@pytest.mark.parametrize(("size", "small"), [((400, 100), (160, 40)), ((30, 60), (30, 60)), ((1, 5000), (1, 160))])
def test_a_thumbnail_keeps_the_ratio_of_its_sides(tmp_path, size, small):
    Image.new("RGB", size, (10, 200, 30)).save(tmp_path / "a.png")
    found = thumbnail(tmp_path / "a.png")
    assert found.shape == (small[1], small[0], 3)
    assert found[0, 0].tolist() == [10, 200, 30]


def test_what_is_missing_or_no_picture_is_none(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    assert thumbnail(tmp_path / "a.jpg") is None
    assert thumbnail(tmp_path / "b.jpg") is None
    assert thumbnail(tmp_path) is None


def test_a_data_address_holds_a_jpeg():
    picture = np.full((8, 12, 3), 128, np.uint8)
    kind, _, text = data_uri(picture).partition(",")
    assert kind == "data:image/jpeg;base64"
    assert base64.b64decode(text) == jpeg(picture)
    assert Image.open(io.BytesIO(jpeg(picture))).size == (12, 8)


@pytest.mark.parametrize(("size", "factor", "letters"), [(224, 1, 20), (64, 3, 17), (32, 6, 17), (100, 2, 18), (130, 1, 13)])
def test_a_sheet_holds_every_picture_as_it_is(size, factor, letters):
    numbers = np.random.default_rng(0)
    pictures = [numbers.integers(0, 256, (size, size, 3), np.uint8) for _ in range(5)]
    found = sheet(pictures, ["cat", "a" * 500, "", "猫", "é"], columns=4)
    cell = size * factor
    for number, picture in enumerate(pictures):
        top, left = number // 4 * (cell + letters + 12), number % 4 * (cell + 6)
        shown = found[top : top + cell, left : left + cell]
        np.testing.assert_array_equal(shown[::factor, ::factor], picture)
        np.testing.assert_array_equal(shown[factor - 1 :: factor, factor - 1 :: factor], picture)
    assert found.shape == (2 * (cell + letters + 12) - 6, 4 * (cell + 6) - 6, 3)
    assert (found[cell + 2 : cell + letters + 6, :cell] < 128).any()  # the caption


def test_without_captions_there_is_no_room_for_them():
    assert sheet([np.zeros((200, 100, 3), np.uint8)] * 3, ["", "", ""], columns=2).shape == (406, 206, 3)
