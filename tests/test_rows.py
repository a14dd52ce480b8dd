"""A table in pieces: it continues only what it wrote itself, and two writers never mix."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.errors import ConfigError
from finetune.rows import GrowingFile

OPTIONS = {"topk": 3}


@pytest.fixture
def target(tmp_path):
    return tmp_path / "x.csv"


def begun(target, content=b"one\n"):
    """Leave a table as an interruption does, after one piece."""
    table = GrowingFile(target, OPTIONS)
    table.append(content, 1, "a")
    table.close()


def test_pieces_become_a_file_and_nothing_else_is_left(target):
    begun(target)
    table = GrowingFile(target, OPTIONS)
    assert (table.rows, table.last) == (1, "a")
    table.append(b"two\n", 1, "b")
    assert not target.exists()
    table.finish()
    table.close()
    assert target.read_bytes() == b"one\ntwo\n"
    assert [path.name for path in target.parent.iterdir()] == ["x.csv"]


def test_what_was_written_behind_the_last_piece_is_dropped(target):
    begun(target)
    with Path(f"{target}.part").open("ab") as file:
        file.write(b"half a li")
    table = GrowingFile(target, OPTIONS)
    table.append(b"two\n", 1, "b")
    table.finish()
    assert target.read_bytes() == b"one\ntwo\n"


def _their_file(target):
    Path(f"{target}.part").write_text("mine")


def _their_state(target):
    Path(f"{target}.part.json").write_text('{"rows": 1}')


def _forged_state(target):
    """The table of an interruption, copied over by the user's file: its inode is another one."""
    begun(target)
    Path(f"{target}.part").unlink()
    Path(f"{target}.mine").write_text("mine, and longer than the state says")
    Path(f"{target}.mine").rename(f"{target}.part")


def _link(target):
    begun(target)
    Path(f"{target}.part").rename(target.with_name("mine"))
    Path(f"{target}.part").symlink_to(target.with_name("mine"))


def _linked_state(target):
    begun(target)
    Path(f"{target}.part.json").rename(target.with_name("mine"))
    Path(f"{target}.part.json").symlink_to(target.with_name("mine"))


def _broken_link(target):
    Path(f"{target}.part").symlink_to(target.with_name("nowhere"))


def _pipe(target):
    os.mkfifo(f"{target}.part")


def _deep(target):
    begun(target)
    Path(f"{target}.part.json").write_text("[" * 100_000)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("make", [_their_file, _their_state, _forged_state, _link, _linked_state, _broken_link, _pipe, _deep])
def test_what_is_not_ours_is_neither_continued_nor_replaced(target, make, overwrite):
    make(target)
    before = {p.name: p.read_bytes() if p.is_file() else None for p in target.parent.iterdir()}
    with pytest.raises(ConfigError, match="Give another --out, or move them away"):
        GrowingFile(target, OPTIONS, overwrite)
    assert {p.name: p.read_bytes() if p.is_file() else None for p in target.parent.iterdir()} == before


@pytest.mark.parametrize("field", ["rows", "bytes", "options", "file", "format", "written_by"])
@pytest.mark.parametrize("value", [None, -1, "x", [1]])
def test_a_state_of_another_kind_is_refused(target, field, value):
    begun(target)
    state = json.loads(Path(f"{target}.part.json").read_text())
    Path(f"{target}.part.json").write_text(json.dumps({**state, field: value}))
    with pytest.raises(ConfigError, match="is in the way"):
        GrowingFile(target, OPTIONS)


def test_overwriting_begins_anew_where_options_differ(target):
    begun(target)
    with pytest.raises(ConfigError, match="topk: 3 then, 2 now"):
        GrowingFile(target, {"topk": 2})
    assert Path(f"{target}.part").read_bytes() == b"one\n"  # a refusal leaves it
    table = GrowingFile(target, {"topk": 2}, overwrite=True)
    assert table.rows == 0
    table.append(b"new\n", 1, "a")
    table.finish()
    assert target.read_bytes() == b"new\n"


def test_a_state_whose_table_is_gone_does_not_count(target):
    begun(target)
    Path(f"{target}.part").unlink()
    table = GrowingFile(target, {"topk": 2})
    assert table.rows == 0
    table.close()
    assert not list(target.parent.iterdir())


def test_a_file_that_comes_to_the_target_meanwhile_stays(target):
    table = GrowingFile(target, OPTIONS)
    table.append(b"one\n", 1, "a")
    target.write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        table.finish()
    table.close()
    assert target.read_text() == "mine"
    target.unlink()
    table = GrowingFile(target, OPTIONS)
    assert table.rows == 1
    table.finish()


def test_a_partial_file_that_was_exchanged_meanwhile_is_not_moved(target):
    table = GrowingFile(target, OPTIONS)
    table.append(b"one\n", 1, "a")
    Path(f"{target}.part").unlink()
    Path(f"{target}.part").write_text("mine")
    with pytest.raises(ConfigError, match="is in the way"):
        table.finish()
    table.close()
    assert Path(f"{target}.part").read_text() == "mine"
    assert not target.exists()


SECOND = """
import sys; from pathlib import Path; from finetune.errors import ConfigError; from finetune.rows import GrowingFile
try:
    GrowingFile(Path(sys.argv[1]), {"topk": 3}, overwrite=True)
except ConfigError as error:
    print(error)
"""


@pytest.mark.parametrize("rows", [0, 1])
def test_two_at_once_do_not_mix(target, rows):
    """The second is refused, in this process and in another one; a third may begin when the first is done."""
    first = GrowingFile(target, OPTIONS, overwrite=True)
    if rows:
        first.append(b"one\n", 1, "a")
    for _ in range(2):  # a refusal does not give the first one's lock away
        with pytest.raises(ConfigError, match="Another process is writing"):
            GrowingFile(target, OPTIONS, overwrite=True)
        done = subprocess.run([sys.executable, "-c", SECOND, str(target)], capture_output=True, text=True, check=True)
        assert "Another process is writing" in done.stdout
    first.append(b"two\n", 1, "b")
    first.finish()
    GrowingFile(target, OPTIONS, overwrite=True).close()
    assert target.read_bytes() == b"one\ntwo\n"[-4 * (1 + rows) :]
