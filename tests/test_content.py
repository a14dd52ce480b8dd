"""Hashes of files against hashlib, and what makes a file be read again."""

import hashlib
import os

import pytest

from finetune import content
from finetune.content import contents


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RESNET_FINETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(content, "_SETTLED", 0)
    root = tmp_path / "images"
    root.mkdir()
    for number in range(5):
        (root / f"{number}.png").write_bytes(os.urandom(3 << 19) if number else b"")
    return root


def test_hashes_are_those_of_the_bytes_and_each_file_is_read_once(folder, monkeypatch):
    files = sorted(os.listdir(folder))
    found = contents(folder, [*files, "missing.png"])
    for file in files:
        data = (folder / file).read_bytes()
        assert found[file] == (len(data), hashlib.blake2b(data, digest_size=16).hexdigest())
    assert found["missing.png"] == (0, "")
    read = []
    digest = content.file_digest
    monkeypatch.setattr(content, "file_digest", lambda path: read.append(os.path.basename(path)) or digest(path))
    assert contents(folder, files) == {file: found[file] for file in files}
    assert read == []
    before = os.stat(folder / "1.png")
    (folder / "1.png").write_bytes(bytes(before.st_size))  # as many bytes, and the time of modification is restored
    os.utime(folder / "1.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(folder / "2.png", folder / "3.png")
    now = contents(folder, ["0.png", "1.png", "3.png", "4.png"])
    assert sorted(read) == ["1.png", "3.png"]
    assert now["3.png"] == found["2.png"]
    assert now["1.png"] != found["1.png"]


def test_a_file_that_has_just_changed_is_not_believed(folder, monkeypatch):
    monkeypatch.setattr(content, "_SETTLED", 10**18)
    first = contents(folder, ["1.png"])
    (folder / "1.png").write_bytes(b"other")
    assert contents(folder, ["1.png"]) != first
