"""Walking: the order of whole paths, whatever lies between, with no more in memory than one folder."""

import os

import pytest

from finetune.errors import DataError
from finetune.walk import Pictures


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def below(root, found):
    return [os.path.relpath(path, root) for path in found]


def test_the_order_is_that_of_paths(tmp_path):
    names = ["a.png", "a/b.png", "a/b/c.png", "a/b/d/e.png", "a-b.png", "a!/x.png", "b.png", "B/z.png", "ü/1.png", "z/ü.png"]
    touch(tmp_path, *names, "a/notes.txt", ".hidden/3.jpg")
    pictures = Pictures([str(tmp_path)])
    assert below(tmp_path, pictures) == sorted(names)
    assert below(tmp_path, pictures) == sorted(names)  # again
    assert pictures.count() == len(names)


def test_places_in_the_order_they_are_named(tmp_path):
    touch(tmp_path, "b/2.jpg", "a/1.png", "single.strange", "c/x1.png", "c/x2.jpg", "c/y.png", "c/x3.txt")
    places = [str(tmp_path / "single.strange"), str(tmp_path / "b"), str(tmp_path / "c" / "x*"), tmp_path / "a"]
    assert below(tmp_path, Pictures(places)) == ["single.strange", "b/2.jpg", "c/x1.png", "c/x2.jpg", "a/1.png"]
    assert below(tmp_path, Pictures([str(tmp_path / "**" / "y.png"), str(tmp_path / "[ab]")])) == [
        "c/y.png",
        "a/1.png",
        "b/2.jpg",
    ]


def test_a_list_in_a_file(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"a b.png\r\n\n caf\xe9.png\nnot there.png")
    found = list(Pictures([], str(tmp_path / "list.txt")))
    assert found == ["a b.png", " caf\udce9.png", "not there.png"]
    with pytest.raises(DataError, match=r"The list of pictures .*nothing.* cannot be read"):
        list(Pictures([], str(tmp_path / "nothing")))


def test_links_that_turn_in_circles(tmp_path):
    touch(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "b" / "self.png").symlink_to(tmp_path / "b" / "self.png")
    (tmp_path / "b" / "gone.png").symlink_to(tmp_path / "nowhere")
    assert below(tmp_path, Pictures([str(tmp_path)])) == ["a/1.png", "b/2.png"]


def test_what_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"No images were named\. Expected a folder"):
        Pictures([]).all()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"There is no picture in .*empty: expected files ending in \.bmp"):
        Pictures([tmp_path / "empty"]).all()
    with pytest.raises(DataError, match="There is no folder"):
        Pictures([tmp_path / "none"]).all()
    with pytest.raises(DataError, match="Nothing matches the pattern"):
        Pictures([str(tmp_path / "*.png")]).all()
