"""A file or a folder is whole or as it was before, whatever happens while it is written."""

import errno
import json
import os
import re
import stat

import pytest

from finetune.errors import ConfigError
from finetune.files import (
    MARK,
    Unmarked,
    atomic_write,
    is_ours,
    mark_folder,
    new_folder,
    read_plain,
    remove_leftovers,
    remove_ours,
    require_free,
    require_free_folder,
    write_atomically,
)


def _half(file):
    with atomic_write(file) as partial:
        partial.write_bytes(b"half")
        raise OSError("disk is full")


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    file = tmp_path / "a"
    write_atomically(file, b"one")
    write_atomically(file, "zwei \u00e4\n")
    assert file.read_bytes() == "zwei \u00e4\n".encode()
    with pytest.raises(OSError, match="disk is full"):
        _half(file)
    with atomic_write(file) as partial:
        partial.write_bytes(b"new")
        assert file.read_bytes() == "zwei \u00e4\n".encode()
    write_atomically(file, file.read_bytes() + b"er")
    assert file.read_bytes() == b"newer"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_new_folder_takes_the_place_of_the_old_one_as_a_whole(tmp_path):
    target = tmp_path / "a" / "b"
    with new_folder(target) as folder:
        (folder / "one").write_text("1")
        assert not target.exists()
    assert sorted(path.name for path in target.iterdir()) == [MARK, "one"]
    with pytest.raises(ConfigError, match="No such file"), new_folder(target, overwrite=True) as folder:
        (folder / "two").write_text((folder / "three").read_text())
    assert sorted(path.name for path in target.iterdir()) == [MARK, "one"]
    with new_folder(target, overwrite=True) as folder:
        (folder / "two").write_text("2")
    assert sorted(path.name for path in target.iterdir()) == [MARK, "two"]
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


def tree(folder):
    """Return kind and content of all that is in a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        content = os.readlink(path) if stat.S_ISLNK(mode) else path.read_bytes() if stat.S_ISREG(mode) else None
        found[path.relative_to(folder).as_posix()] = (stat.S_IFMT(mode), content)
    return found


def test_temporary_names_are_random_and_links_are_replaced_not_followed(tmp_path):
    mine, target = tmp_path / "mine", tmp_path / "x.csv"
    mine.write_text("mine")
    for name in ("x.csv.part", f"x.csv.{os.getpid()}.part", "x.csv"):
        (tmp_path / name).symlink_to(mine)
    names = set()
    for _ in range(5):
        with atomic_write(target) as partial:
            assert partial.parent == tmp_path
            names.add(partial.name)
            partial.write_text("new")
    assert len(names) == 5
    assert (mine.read_text(), target.read_text(), target.is_symlink()) == ("mine", "new", False)
    assert (tmp_path / "x.csv.part").is_symlink()


def test_a_temporary_name_that_is_taken_is_not_followed(tmp_path, monkeypatch):
    (tmp_path / "mine").write_text("mine")
    monkeypatch.setattr("finetune.files.secrets.token_hex", lambda number: "0" * 2 * number)
    (tmp_path / ".x.resnet-finetune-0000000000000000.part").symlink_to(tmp_path / "mine")
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "x", "new")
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "x").exists()


def test_devices_and_pipes_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no plain file") as caught:
        write_atomically(tmp_path / "pipe", "x")
    assert caught.value.errno == errno.EEXIST
    with pytest.raises(ConfigError, match="is a device, pipe or socket"):
        require_free(tmp_path / "pipe", overwrite=True)
    with pytest.raises(ConfigError, match="is a folder"):
        require_free(tmp_path, overwrite=True)
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="exists already"):
        require_free(tmp_path / "broken", overwrite=False)
    assert stat.S_ISFIFO((tmp_path / "pipe").lstat().st_mode)


def test_only_plain_files_of_a_size_are_read(tmp_path):
    (tmp_path / "file").write_text("12345")
    assert read_plain(tmp_path / "file", 5) == b"12345"
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe", ".", "nothing"):
        with pytest.raises(OSError):  # noqa: PT011 - the system says which
            read_plain(tmp_path / name, 5)
    with pytest.raises(OSError, match="too large"):
        read_plain(tmp_path / "file", 4)


def test_leftovers_of_one_file_are_removed_and_nothing_else(tmp_path):
    ours = ".a.ckpt.resnet-finetune-0123456789abcdef.part"
    others = ["a.ckpt", "a.ckpt.part", ".b.ckpt.resnet-finetune-0123456789abcdef.part", ".a.ckpt.resnet-finetune-xyz.part"]
    for name in (ours, *others):
        (tmp_path / name).write_text("x")
    (tmp_path / ".a.ckpt.resnet-finetune-1123456789abcdef.part").mkdir()
    remove_leftovers(tmp_path / "a.ckpt")
    assert {path.name for path in tmp_path.iterdir()} == {*others, ".a.ckpt.resnet-finetune-1123456789abcdef.part"}


# --------------------------------------------------------------------------------------------------------------- folders


def _theirs(folder):
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "photo.png").write_bytes(b"mine")


def _ours(folder):
    with new_folder(folder) as inside:
        (inside / "sub").mkdir()
        (inside / "sub" / "[a].csv").write_text("ours")


def _forged(folder):
    _theirs(folder)
    (folder / MARK).write_text('{"written_by": "another program 1", "format": 1, "files": ["sub/photo.png"]}')


def _linked_mark(folder):
    _ours(folder.with_name("ours"))
    _theirs(folder)
    (folder / MARK).symlink_to(folder.with_name("ours") / MARK)


def _joined(folder):
    _ours(folder)
    (folder / "sub" / "notes.txt").write_text("mine")


def _link_inside(folder):
    _ours(folder)
    (folder / "sub" / "more").symlink_to(folder.parent / "mine")


def _link(folder):
    _ours(folder.with_name("ours"))
    folder.symlink_to(folder.with_name("ours"))


def _file(folder):
    folder.write_text("mine")


def _deep(folder):
    _theirs(folder)
    (folder / MARK).write_text("[" * 100_000)


CASES = [_theirs, _forged, _linked_mark, _joined, _link_inside, _link, _file, _deep]


@pytest.mark.parametrize("make", CASES)
def test_what_we_did_not_write_is_neither_deleted_nor_replaced(tmp_path, make):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a").write_text("mine")
    target = tmp_path / "target"
    make(target)
    before = tree(tmp_path)
    with pytest.raises(ConfigError, match=r"not deleted|not replaced"):
        remove_ours(target)
    with pytest.raises(ConfigError, match="exists already"), new_folder(target):
        raise AssertionError
    with pytest.raises(ConfigError, match=r"[Gg]ive another --out"), new_folder(target, overwrite=True):
        raise AssertionError
    assert tree(tmp_path) == before


def test_what_comes_to_the_target_meanwhile_stays(tmp_path):
    with pytest.raises(ConfigError, match="did not write it"), new_folder(tmp_path / "x", overwrite=True):
        _theirs(tmp_path / "x")
    assert list(tree(tmp_path)) == ["x", "x/sub", "x/sub/photo.png"]


def test_what_we_wrote_is_replaced_and_deleted_without_following_links(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a").write_text("mine")
    target = tmp_path / "target"
    _ours(target)
    assert is_ours(target)
    assert json.loads((target / MARK).read_text())["files"] == ["sub/[a].csv"]
    with new_folder(target, overwrite=True) as folder:
        (folder / "link").symlink_to(tmp_path / "mine")
    assert sorted(tree(target)) == [MARK, "link"]
    remove_ours(target)
    assert list(tree(tmp_path)) == ["mine", "mine/a"]
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty", overwrite=True) as folder:
        (folder / "a").write_text("ours")
    assert is_ours(tmp_path / "empty")


def test_names_that_may_come_along(tmp_path):
    (tmp_path / "store").mkdir()
    mark_folder(tmp_path / "store")
    for name in ("rows", "lock-3"):
        (tmp_path / "store" / name).write_text("x")
    with pytest.raises(ConfigError, match=re.escape("did not write there: lock-3. Move")):
        remove_ours(tmp_path / "store", ["rows"])
    remove_ours(tmp_path / "store", ["rows", "lock-*"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [None, "more", "less", "text", "folder"])
def test_what_older_versions_wrote_is_known_by_its_exact_files(tmp_path, change):
    older, target = [Unmarked(frozenset({"a", "b"}), "b", "of ours")], tmp_path / "x"
    target.mkdir()
    (target / "a").write_text("1")
    (target / "b").write_text("of theirs" if change == "text" else "one of ours")
    if change == "more":
        (target / "c").write_text("mine")
    elif change == "less":
        (target / "a").unlink()
    elif change == "folder":
        (target / "a").unlink()
        (target / "a").mkdir()
    assert is_ours(target, older) is (change is None)
    if change is None:
        with new_folder(target, overwrite=True, older=older) as folder:
            (folder / "new").write_text("2")
        assert sorted(tree(tmp_path)) == ["x", f"x/{MARK}", "x/new"]
    else:
        with pytest.raises(ConfigError, match="not deleted"):
            require_free_folder(target, overwrite=True, older=older)
