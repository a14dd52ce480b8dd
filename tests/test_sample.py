"""The built-in digits against scikit-learn's arrays, and several processes that make them at once."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from finetune.errors import DataError
from finetune.sample import BUILT_IN, digits_folder

MAKE = "from finetune.sample import digits_folder; print(digits_folder())"


@pytest.fixture(scope="module")
def digits():
    return digits_folder()


def test_every_digit_is_there_once_in_its_class(digits):
    data = load_digits()
    files = sorted(digits.glob("*/*/*.png"), key=lambda file: file.stem)
    assert [int(file.stem) for file in files] == list(range(1797))
    assert [int(file.parent.name) for file in files] == data.target.tolist()


def test_the_pictures_are_the_arrays(digits):
    data = load_digits()
    for file in list(digits.glob("*/*/*.png"))[::50]:
        with Image.open(file) as image:
            assert (image.size, image.mode) == ((32, 32), "L")
            pixels = np.asarray(image)
            small = np.asarray(image.crop((2, 2, 30, 30)).resize((8, 8), Image.Resampling.BOX), dtype=float)
        edges = np.concatenate([pixels[:2].ravel(), pixels[-2:].ravel(), pixels[:, :2].ravel(), pixels[:, -2:].ravel()])
        assert not edges.any()
        assert np.corrcoef(small.ravel(), data.images[int(file.stem)].ravel())[0, 1] > 0.97


def test_the_split_is_stratified(digits):
    for digit in range(10):
        counts = {split: len(list((digits / split / str(digit)).glob("*"))) for split in ("train", "val", "test")}
        total = sum(counts.values())
        assert counts["val"] == counts["test"] == round(0.15 * total)


def test_two_processes_at_once_make_the_same_folder(tmp_path, digits):
    env = os.environ | {"RESNET_FINETUNE_CACHE": str(tmp_path)}
    running = [subprocess.Popen([sys.executable, "-c", MAKE], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in running:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert Path(output.strip()) == tmp_path / "digits-v1"
    assert [entry.name for entry in tmp_path.iterdir()] == ["digits-v1"]  # nothing temporary is left
    again = {str(file.relative_to(tmp_path / "digits-v1")): file.read_bytes() for file in tmp_path.glob("*/*/*/*.png")}
    assert again == {str(file.relative_to(digits)): file.read_bytes() for file in digits.glob("*/*/*.png")}


def test_a_folder_that_lost_pictures_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("RESNET_FINETUNE_CACHE", str(tmp_path))
    (tmp_path / "digits-v1/train/0").mkdir(parents=True)
    (tmp_path / "digits-v1/train/0/half-made.png").touch()
    folder = BUILT_IN["digits"]()
    assert len(list(folder.glob("*/*/*.png"))) == 1797
    assert not (folder / "train/0/half-made.png").exists()
    made = folder.stat().st_ino
    assert digits_folder().stat().st_ino == made  # and is then left alone


def test_where_the_cache_is(monkeypatch, tmp_path):
    from finetune.sample import cache_folder

    monkeypatch.delenv("RESNET_FINETUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "resnet-finetune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache/resnet-finetune"


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RESNET_FINETUNE_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(DataError, match=r"cannot be written to .* Set the environment variable RESNET_FINETUNE_CACHE"):
        digits_folder()


@pytest.mark.parametrize("name", ["train/holiday.png", "train/0/holiday.png", "notes.txt", "link"])
def test_a_folder_of_somebody_else_in_the_cache_is_left_alone(tmp_path, monkeypatch, name):
    monkeypatch.setenv("RESNET_FINETUNE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "digits-v1"
    if name == "link":
        (tmp_path / "mine").mkdir()
        folder.parent.mkdir()
        folder.symlink_to(tmp_path / "mine")
    else:
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match="Move that away, or set the environment variable"):
        digits_folder()
    assert sorted(tmp_path.rglob("*")) == before
