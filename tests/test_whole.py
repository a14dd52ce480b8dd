"""A file or a folder is whole or as it was before, whatever happens while it is written."""

import pytest

from finetune.errors import ConfigError
from finetune.whole import beside, new_folder, require_free, write_whole


def _half(file):
    with beside(file) as partial:
        partial.write_bytes(b"half")
        raise OSError("disk is full")


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a"
    write_whole(file, b"one")
    write_whole(file, "zwei \u00e4\n")
    assert file.read_bytes() == "zwei \u00e4\n".encode()
    with pytest.raises(OSError, match="disk is full"):
        _half(file)
    with beside(file) as partial:
        partial.write_bytes(b"new")
        assert file.read_bytes() == "zwei \u00e4\n".encode()
    write_whole(file, file.read_bytes() + b"er")
    assert file.read_bytes() == b"newer"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_new_folder_takes_the_place_of_the_old_one_as_a_whole(tmp_path):
    target = tmp_path / "a" / "b"
    with new_folder(target) as folder:
        (folder / "one").write_text("1")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["one"]
    with pytest.raises(ConfigError, match="No such file"), new_folder(target) as folder:
        (folder / "two").write_text((folder / "three").read_text())
    assert [path.name for path in target.iterdir()] == ["one"]
    with new_folder(target) as folder:
        (folder / "two").write_text("2")
    assert [path.name for path in target.iterdir()] == ["two"]
    assert [path.name for path in target.parent.iterdir()] == ["b"]


def test_what_is_in_the_way(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="cannot be written"), new_folder(tmp_path / "file" / "x"):
        pass
    with pytest.raises(ConfigError, match="exists already"):
        require_free(tmp_path / "file", overwrite=False)
    require_free(tmp_path / "file", overwrite=True)
    require_free(tmp_path / "other", overwrite=False)
    assert (tmp_path / "file").read_text() == "mine"
