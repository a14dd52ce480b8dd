"""Layouts, splits and mistakes, on folders whose right answer was counted by hand."""

import os
import subprocess
import sys
import time
import unicodedata

import pytest

from finetune.errors import DataError
from finetune.folders import scan, summary


def touch(root, *files):
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def names(root, split, **options):
    folder = scan(root, **options)
    return [(picture.file, folder.classes[picture.label]) for picture in folder.splits[split]]


@pytest.mark.parametrize(
    ("train", "val"),
    [("train", "val"), ("Train", "VALID"), ("TRAIN", "Validation"), ("train", "valid"), ("train", "validation")],
)
def test_split_layout(tmp_path, train, val):
    touch(tmp_path, f"{train}/b/1.jpg", f"{train}/a/deep/er/2.PNG", f"{train}/a/1.jpeg", f"{val}/b/3.webp", "Test/a/4.tif")
    folder = scan(tmp_path)
    assert folder.classes == ("a", "b")
    assert folder.drawn == ()
    assert {split: [tuple(p) for p in folder.splits[split]] for split in folder.splits} == {
        "train": [(f"{train}/a/1.jpeg", 0), (f"{train}/a/deep/er/2.PNG", 0), (f"{train}/b/1.jpg", 1)],
        "val": [(f"{val}/b/3.webp", 1)],
        "test": [("Test/a/4.tif", 0)],
    }


def test_a_class_that_validation_lacks_keeps_its_number(tmp_path):
    """Trap 39: ImageFolder would number the validation classes {'a': 0, 'c': 1}."""
    touch(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "train/c/1.jpg", "val/a/2.jpg", "val/c/2.jpg")
    (tmp_path / "val/b").mkdir()
    assert [p.label for p in scan(tmp_path).splits["val"]] == [0, 2]


def test_what_is_skipped_is_counted(tmp_path):
    touch(tmp_path, "a/1.jpg", "a/2.jpg", "b/1.jpg", "b/.cache/9.jpg", ".git/1.jpg", "__MACOSX/a/1.jpg", "a/._1.jpg")
    touch(tmp_path, "a/notes.txt", "Thumbs.db", "loose.jpg", "b/sub/archive.zip")
    (tmp_path / "a/broken.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "a/self.jpg").symlink_to(tmp_path / "a/self.jpg")
    folder = scan(tmp_path, val_fraction=0)
    assert folder.counts("train") == [2, 1]
    assert folder.skipped == {"hidden": 4, "not a picture": 3, "broken link": 2, "outside a class folder": 1}
    assert "skipped: 2 broken link, 4 hidden, 3 not a picture, 1 outside a class folder" in summary(folder)
    touch(tmp_path, "a/1.HEIC", "a/2.heic", "b/raw.dng")
    said = summary(scan(tmp_path, val_fraction=0))
    assert said.endswith(
        "1 in a format that is not read (.dng), 2 in a format that is not read (.heic): convert them to JPEG or PNG."
    )
    touch(tmp_path, "c/1.heic")
    with pytest.raises(DataError, match=r"(?s)'c' holds no picture.* 3 in a format that is not read \(\.heic\): convert them"):
        scan(tmp_path)


def test_links_are_followed_without_loops(tmp_path):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    touch(elsewhere, "x/1.jpg", "x/2.jpg")
    touch(root, "a/1.jpg", "b/1.jpg", "b/sub/2.jpg")
    (root / "a/linked").symlink_to(elsewhere / "x")
    (root / "b/up").symlink_to(root)  # would make every picture one of b
    (root / "b/sub/again").symlink_to(root / "b")
    (root / "c").symlink_to(elsewhere)  # a whole class
    (root / "a/picture.jpg").symlink_to(elsewhere / "x/1.jpg")
    assert names(root, "train", val_fraction=0) == [
        ("a/1.jpg", "a"),
        ("a/linked/1.jpg", "a"),
        ("a/linked/2.jpg", "a"),
        ("a/picture.jpg", "a"),
        ("b/1.jpg", "b"),
        ("b/sub/2.jpg", "b"),
        ("c/x/1.jpg", "c"),
        ("c/x/2.jpg", "c"),
    ]


def test_accents_are_one_name_however_they_are_stored(tmp_path):
    one, two = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    touch(tmp_path, f"train/{one}/1.jpg", "train/tea/1.jpg", f"val/{two}/2.jpg")
    folder = scan(tmp_path)
    assert folder.classes == ("café", "tea")
    assert [p.label for p in folder.splits["val"]] == [0]


# ------------------------------------------------------------------------------------------------------------- the draw


def counted(root, counts):
    for name, number in counts.items():
        touch(root, *(f"{name}/{i:03d}.jpg" for i in range(number)))


def test_the_draw_is_stratified_and_takes_rounded_shares(tmp_path):
    counted(tmp_path, {"a": 1, "b": 2, "c": 3, "d": 10, "e": 40})
    folder = scan(tmp_path, val_fraction=0.2, test_fraction=0.1)
    assert folder.drawn == ("val", "test")
    assert folder.counts("val") == [0, 1, 1, 2, 8]
    assert folder.counts("test") == [0, 0, 1, 1, 4]
    assert folder.counts("train") == [1, 1, 1, 7, 28]
    together = [p.file for split in folder.splits.values() for p in split]
    assert len(together) == len(set(together)) == 56
    assert scan(tmp_path, val_fraction=0.0).counts("train") == [1, 2, 3, 10, 40]
    assert scan(tmp_path, val_fraction=0.95).counts("train") == [1, 1, 1, 1, 2]


def test_the_draw_is_the_same_elsewhere_and_in_another_process(tmp_path):
    for place in ("one", "two"):
        counted(tmp_path / place, {"a": 30, "b": 20})
    code = "import sys; from finetune.folders import scan; print([p.file for p in scan(sys.argv[1]).splits['val']])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "two")],
        env=os.environ | {"PYTHONHASHSEED": "17"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str([p.file for p in scan(tmp_path / "one").splits["val"]])
    assert scan(tmp_path / "one", split_seed=1).splits["val"] != scan(tmp_path / "one").splits["val"]


def test_adding_pictures_hardly_moves_the_others(tmp_path):
    counted(tmp_path, {"a": 100, "b": 100})
    before = {p.file: split for split, files in scan(tmp_path, test_fraction=0.2).splits.items() for p in files}
    touch(tmp_path, *(f"a/new{i}.jpg" for i in range(5)))
    after = {p.file: split for split, files in scan(tmp_path, test_fraction=0.2).splits.items() for p in files}
    assert sum(after[file] != split for file, split in before.items()) <= 4
    assert all(after[file] == split for file, split in before.items() if file.startswith("b/"))


def test_the_test_draw_leaves_validation_alone(tmp_path):
    counted(tmp_path, {"a": 50, "b": 50})
    assert scan(tmp_path).splits["val"] == scan(tmp_path, test_fraction=0.3).splits["val"]


def test_only_missing_splits_are_drawn(tmp_path):
    counted(tmp_path / "train", {"a": 10, "b": 10})
    counted(tmp_path / "test", {"a": 3, "b": 3})
    folder = scan(tmp_path, val_fraction=0.2, test_fraction=0.5)
    assert folder.drawn == ("val",)
    assert [sum(folder.counts(split)) for split in ("train", "val", "test")] == [16, 4, 6]


def test_summary(tmp_path):
    counted(tmp_path, {"cat": 10, "dog": 5})
    lines = summary(scan(tmp_path)).splitlines()
    assert lines[0] == str(tmp_path)
    assert [line.split() for line in lines[1:]] == [
        ["class", "train", "val", "(drawn)", "test"],
        ["-------", "-------", "-------------", "------"],
        ["cat", "8", "2", "0"],
        ["dog", "4", "1", "0"],
        ["total", "12", "3", "0"],
    ]


def test_summary_of_many_classes(tmp_path):
    counted(tmp_path, {f"class{i:02d}": i + 1 for i in range(31)})
    rows = [line.split() for line in summary(scan(tmp_path, val_fraction=0)).splitlines()]
    assert ["31", "classes", "train", "val", "test"] in rows
    assert rows[3:6] == [["smallest", "1", "0", "0"], ["median", "16", "0", "0"], ["largest", "31", "0", "0"]]
    assert [row[0] for row in rows[6:11]] == [f"class{i:02d}" for i in range(5)]
    assert rows[11] == ["total", "496", "0", "0"]


# ------------------------------------------------------------------------------------------------------------- mistakes


def test_a_missing_folder_names_its_neighbour(tmp_path):
    touch(tmp_path, "photos/a/1.jpg")
    with pytest.raises(DataError, match=r"There is no folder .*photso .*Did you mean 'photos'\?"):
        scan(tmp_path / "photso")
    with pytest.raises(DataError, match="is a file, expected a folder"):
        scan(tmp_path / "photos/a/1.jpg")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["1.jpg", "2.jpg"], r"holds 2 pictures but no class folders\. Arrange the pictures as .*/<class>/<picture>"),
        ([], "holds no class folders"),
        (["a/1.jpg", "a/2.jpg"], r"holds 1 class \('a'\), expected at least 2"),
        (["a/1.jpg", "b/1.jpg", "c/readme.txt"], r"'c' holds no picture\. Add some"),
        (
            ["train/a/1.jpg", "train/b/1.jpg", "train/c/x.txt", "val/c/1.jpg"],
            "In the training pictures of .* 'c' holds no picture",
        ),
        (
            ["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "valid/a/1.jpg"],
            "both 'val' and 'valid': expected one folder for val",
        ),
        (["train/a/1.jpg", "Train/b/1.jpg"], "both 'Train' and 'train'"),
        (["val/a/1.jpg", "test/a/1.jpg"], r"holds 'test', 'val' but no 'train'"),
        (["train/1.jpg", "val/1.jpg"], r"train holds 1 pictures but no class folders"),
        (["train/cat/1.jpg", "train/dog/1.jpg", "val/cats/1.jpg"], r"'cats', which is no class .* Did you mean 'cat'\?"),
        (["train/cat/1.jpg", "train/dog/1.jpg", "test/Dog/1.jpg"], r"The test split .* 'Dog', .* Did you mean 'dog'\?"),
        (["train/cat/1.jpg", "train/dog/1.jpg", "extra/1.jpg"], "can be read in two ways"),
    ],
)
def test_mistakes_are_named(tmp_path, files, message):
    touch(tmp_path, *files)
    with pytest.raises(DataError, match=message):
        scan(tmp_path)


def test_classes_may_be_called_like_splits(tmp_path):
    touch(tmp_path, "train/1.jpg", "train/2.jpg", "car/1.jpg", "bus/1.jpg")
    assert scan(tmp_path).classes == ("bus", "car", "train")


def test_a_folder_that_may_not_be_read(tmp_path):
    if os.name == "nt" or os.geteuid() == 0:
        pytest.skip("this user may read everything")
    touch(tmp_path, "a/1.jpg", "b/1.jpg")
    (tmp_path / "b").chmod(0)
    try:
        with pytest.raises(DataError, match=r"b cannot be read: Permission denied"):
            scan(tmp_path)
    finally:
        (tmp_path / "b").chmod(0o700)


# ------------------------------------------------------------------------------------------------------------- the rest


def test_many_files_are_found_quickly(tmp_path):
    for name in "abcd":
        (tmp_path / name).mkdir()
        for i in range(2500):
            os.close(os.open(tmp_path / name / f"{i}.jpg", os.O_CREAT))
    start = time.perf_counter()
    assert sum(scan(tmp_path).counts("train")) == 8000
    assert time.perf_counter() - start < 2  # about 0.07 s; opening or stat-ing each file would take far longer on a network
