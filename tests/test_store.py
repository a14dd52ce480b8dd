"""Rows that are computed once: whole or not believed, whoever makes them and whoever is killed."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from finetune.errors import DataError
from finetune.files import MARK
from finetune.store import Store, clear, file_identity, key_hash, list_kept, take

COUNT = 300  # rows: four whole blocks and a part of one


def expected(numbers):
    return np.stack([np.full(3, number, np.float32) for number in numbers])


def load(ranges):
    yield from ranges


def make(store):
    asked = []

    def compute(numbers):
        asked.append(numbers)
        return expected(numbers)

    store.make(load, compute)
    return asked


def test_rows_are_made_once_and_found_again(tmp_path):
    store = Store({"a": 1}, (COUNT, 3), root=tmp_path)
    assert not store.complete
    assert [len(numbers) for numbers in make(store)] == [64, 64, 64, 64, 44]
    again = Store({"a": 1}, (COUNT, 3), root=tmp_path)
    assert again.complete
    assert make(again) == []
    rows = again.rows()
    assert (rows == expected(range(COUNT))).all()
    with pytest.raises(ValueError, match="read-only"):
        rows[0] = 1
    assert sorted(path.name for path in store.folder.iterdir()) in (
        [MARK, "about.json", "rows"],
        [MARK, "about.json", "lock", "rows"],
    )


@pytest.mark.parametrize("other", [{"key": {"a": 2}}, {"shape": (COUNT, 4)}, {"dtype": "float16"}])
def test_anything_else_is_another_store(tmp_path, other):
    same = {"key": {"a": 1}, "shape": (COUNT, 3), "dtype": "float32", "root": tmp_path}
    make(Store(**same))
    assert not Store(**{**same, **other}).complete


def test_the_identity_of_a_file_changes_with_content_and_time(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"1")
    os.utime(path, ns=(1, 1))
    first = file_identity(path)
    assert file_identity(path) == first
    os.utime(path, ns=(1, 2))
    touched = file_identity(path)
    path.write_bytes(b"12")
    os.utime(path, ns=(1, 1))
    assert len({first, touched, file_identity(path)}) == 3


def test_an_unfinished_store_is_continued_and_never_believed(tmp_path):
    store = Store({"a": 1}, (COUNT, 3), root=tmp_path)

    def breaks(numbers):
        if numbers.start >= 128:
            raise KeyboardInterrupt
        return expected(numbers)

    with pytest.raises(KeyboardInterrupt):
        store.make(load, breaks)
    assert not store.complete
    assert [numbers.start for numbers in make(store)] == [128, 192, 256]
    assert (store.rows() == expected(range(COUNT))).all()


@pytest.mark.parametrize("damage", ["rows", "about.json"])
def test_a_store_that_lost_a_part_is_made_again(tmp_path, damage):
    store = Store({"a": 1}, (COUNT, 3), root=tmp_path)
    make(store)
    if damage == "rows":
        os.truncate(store.folder / "rows", store.bytes - 1)
    else:
        (store.folder / "about.json").unlink()
    assert not store.complete
    assert len(make(store)) == 5
    assert (store.rows() == expected(range(COUNT))).all()


def test_beginning_elsewhere_makes_the_same_rows(tmp_path):
    store = Store({"a": 1}, (COUNT, 3), root=tmp_path)
    starts = []
    store.make(load, lambda numbers: starts.append(numbers.start) or expected(numbers), first=0.5)
    assert starts == [128, 192, 256, 0, 64]
    assert (store.rows() == expected(range(COUNT))).all()


PROGRAM = """
import os, sys, time
from dataclasses import replace
from pathlib import Path
import numpy as np
from finetune.store import Store
store = Store({"a": 1}, (300, 3), root=Path(sys.argv[1]))
def compute(numbers):
    time.sleep(0.3)
    print("made", numbers.start, flush=True)
    return np.stack([np.full(3, number, np.float32) for number in numbers])
store.make(iter, compute)
assert (store.rows()[:, 0] == np.arange(300)).all()
"""


def run(folder):
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_share_the_work_and_both_end_right(tmp_path):
    both = [run(tmp_path) for _ in range(2)]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    made = [line for out, _ in said for line in out.splitlines()]
    assert sorted(made) == sorted(f"made {start}" for start in range(0, 300, 64))


def test_after_a_kill_the_next_process_goes_on(tmp_path):
    with run(tmp_path) as killed:
        killed.stdout.readline()
        time.sleep(0.1)  # it is at the second block
        os.kill(killed.pid, signal.SIGKILL)
    assert not Store({"a": 1}, (300, 3), root=tmp_path).complete
    with run(tmp_path) as second:
        out, err = second.communicate()
    assert second.returncode == 0, err
    assert out.splitlines() == ["made 64", "made 128", "made 192", "made 256"]


def test_too_little_room_is_told_before_anything_is_written(tmp_path):
    store = Store({"a": 1}, (2**50, 3), root=tmp_path)
    with pytest.raises(DataError, match=r"needs .* TB in .* are free.*RESNET_FINETUNE_CACHE"):
        store.make(load, expected)
    assert not (store.folder / "rows").exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="RESNET_FINETUNE_CACHE"):
        make(Store({"a": 1}, (COUNT, 3), root=tmp_path / "file"))


def test_listing_and_clearing(tmp_path):
    assert list_kept(tmp_path / "nowhere") == []
    for number in range(2):
        make(Store({"a": number}, (COUNT, 3), about={"what": number}, root=tmp_path))
    os.utime(tmp_path / key_hash({"a": 0, "shape": [COUNT, 3], "dtype": "float32"}) / "about.json", (2e9, 2e9))
    kept = list_kept(tmp_path)
    assert [one.about["what"] for one in kept] == [0, 1]
    assert all(one.bytes >= COUNT * 3 * 4 for one in kept)
    assert all(clear(one) for one in kept)
    assert list_kept(tmp_path) == []


def test_what_was_read_does_not_stay_in_memory(tmp_path, monkeypatch):
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("needs /proc")

    def mapped():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("RssFile")) / 1000

    monkeypatch.setenv("RESNET_FINETUNE_CACHE", str(tmp_path))
    store = Store({"of": "memory"}, (256, 256 * 1024), "float32", {})  # 1 MB a row
    before = mapped()
    store.make(lambda ranges: iter(ranges), lambda numbers: [np.full(256 * 1024, n, np.float32) for n in numbers])
    rows = store.rows()
    for start in range(0, 256, 32):
        taken = take(rows, range(start, start + 32))
        assert taken[:, 5].tolist() == list(range(start, start + 32))
    assert mapped() - before < 100  # of 268
    assert rows[:, 0].tolist() == list(range(256))
    assert mapped() - before > 0.9


@pytest.mark.parametrize("change", ["name", "more", "folder", "link", "rows"])
def test_only_stores_are_listed_and_cleared(tmp_path, change):
    """A folder of the user's among the stores stays, and so does one that the user put something into."""
    store = Store({"a": 1}, (COUNT, 3), root=tmp_path / "kept")
    make(store)
    (kept,) = list_kept(tmp_path / "kept")
    if change == "name":
        kept = replace(kept, folder=store.folder.rename(tmp_path / "kept" / "photos"))
    elif change == "more":
        (store.folder / "notes.txt").write_text("mine")
    elif change == "folder":
        (store.folder / "photos").mkdir()
    elif change == "link":
        kept = replace(kept, folder=tmp_path / "kept" / ("0" * 32))
        store.folder.rename(tmp_path / "mine")
        kept.folder.symlink_to(tmp_path / "mine")
    else:
        (store.folder / "rows").rename(tmp_path / "mine")
        (store.folder / "rows").symlink_to(tmp_path / "mine")
    before = sorted(tmp_path.rglob("*"))
    assert list_kept(tmp_path / "kept") == []
    assert not clear(kept)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("complete", [True, False])
def test_stores_of_a_version_before_the_mark_are_cleared(tmp_path, complete):
    store = Store({"a": 1}, (COUNT, 3), root=tmp_path)
    make(store)
    (store.folder / MARK).unlink()
    if not complete:
        (store.folder / "about.json").rename(store.folder / "done")
    (kept,) = list_kept(tmp_path)
    assert clear(kept)
    assert not list(tmp_path.iterdir())
