"""Pictures that were decoded and made smaller once are the pictures, made smaller."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from finetune import DataError, FolderDataModule
from finetune.decoded import keep_decoded, row_bytes
from finetune.images import read_image
from finetune.sample import digits_folder


@pytest.fixture(autouse=True)
def _own_store(tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.store.kept_folder", lambda: tmp_path / "kept")


@pytest.fixture
def pictures(tmp_path):
    """Pictures (height x width): upright, flat, small, and longer than 4 : 1."""
    paths = []
    for number, (height, width) in enumerate([(300, 200), (90, 400), (20, 30), (40, 1000)]):
        values = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        smooth = Image.fromarray(values).resize((max(2, width // 20), max(2, height // 20))).resize((width, height))
        smooth.save(tmp_path / f"{number}.png")
        paths.append(str(tmp_path / f"{number}.png"))
    return paths


def test_sizes_and_pixels(pictures):
    kept = keep_decoded(pictures, 50, workers=0)
    assert [tuple(kept[i].shape) for i in range(4)] == [(3, 75, 50), (3, 50, 200), (3, 20, 30), (3, 40, 160)]
    assert torch.equal(kept[2], read_image(pictures[2]))
    with Image.open(pictures[0]) as image:
        wanted = np.asarray(image.resize((50, 75), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(kept[0].permute(1, 2, 0).numpy().astype(int) - wanted).max() <= 2
    assert kept[0].dtype == torch.uint8


def count_reads(monkeypatch):
    read = []
    monkeypatch.setattr("finetune.decoded.read_image", lambda path, *options: read.append(path) or read_image(path, *options))
    return read


def test_files_are_read_once(tmp_path, monkeypatch):
    paths = sorted(map(str, (digits_folder() / "val" / "3").iterdir()))
    assert len(paths) > 8
    read = count_reads(monkeypatch)
    first = keep_decoded(paths, 20, workers=0)
    assert sorted(read) == paths
    del read[:]
    second = keep_decoded(paths, 20, workers=0)
    assert len(read) == 4  # a few are compared with what was kept
    assert {paths[0], paths[-1]} < set(read)
    assert all(torch.equal(first[n], second[n]) for n in range(len(paths)))
    keep_decoded(paths, 10, workers=0)  # another size: the files are read again
    assert sorted(read[4:]) == paths


def test_a_file_of_equal_size_and_time_is_noticed(pictures):
    keep_decoded(pictures, 50, workers=0)
    status = os.stat(pictures[0])
    with open(pictures[0], "wb") as file:
        file.write(bytes(status.st_size))
    os.utime(pictures[0], ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DataError, match=r"0\.png is not a picture"):
        keep_decoded(pictures, 50, workers=0)


def test_rows_that_are_not_what_is_decoded_are_made_again(tmp_path, pictures, capsys):
    first = keep_decoded(pictures, 50, workers=0)
    wanted = [first[n].clone() for n in range(4)]
    (rows,) = (tmp_path / "kept").glob("*/rows")
    with rows.open("r+b") as file:
        file.seek(4 + 3 * 50 * 50 * 4 + 4)  # the pixels of the second image
        file.write(bytes(3 * 50 * 200))
    assert torch.equal(first[1], torch.zeros(3, 50, 200, dtype=torch.uint8))
    second = keep_decoded(pictures, 50, workers=0)
    assert "not what is decoded now" in capsys.readouterr().out
    assert all(torch.equal(second[n], wanted[n]) for n in range(4))


@pytest.mark.parametrize("side", [30, 50, 300])
def test_the_size_that_is_expected_is_what_is_written(pictures, side):
    """Against the images as they are made smaller."""
    kept = keep_decoded(pictures, side, workers=0)
    assert [row_bytes(path, side) for path in pictures] == [4 + kept[n].numel() for n in range(4)]
    with Image.open(pictures[0]) as image:
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned
        image.save(pictures[0] + ".jpg", exif=exif)
    assert row_bytes(pictures[0] + ".jpg", side) == 4 + keep_decoded([pictures[0] + ".jpg"], side, workers=0)[0].numel()


def test_room_that_no_picture_fills_is_not_taken(tmp_path, pictures):
    keep_decoded(pictures, 50, workers=0)
    (rows,) = (tmp_path / "kept").glob("*/rows")
    status = rows.stat()
    assert status.st_size == 4 * (4 + 3 * 50 * 50 * 4)
    assert status.st_blocks * 512 <= status.st_size


def test_batches_are_those_of_the_files_where_nothing_has_to_be_made_smaller():
    options = {"batch_size": 16, "workers": 0, "image_size": 24, "augment": "medium"}
    plain, kept = (FolderDataModule(digits_folder(), **options, decoded=side) for side in (None, 32))
    for split in ("train_dataloader", "val_dataloader"):
        wanted, found = (next(iter(getattr(data, split)())) for data in (plain, kept))
        assert all(torch.equal(wanted[key], found[key]) for key in wanted)
