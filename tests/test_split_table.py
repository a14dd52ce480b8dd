"""The table of a run's images: what is written is read back, and what a run was started with is never written again."""

import csv
import os
from random import Random

import pytest

from finetune.errors import DataError
from finetune.split_table import Row, SplitTable, read_table, write_table

START = SplitTable((Row("a, b/=1.png", "a, b", "train", 3, "aa"), Row("c/é\udce9\n.png", "c", "val", 4, "bb")))


def test_what_is_written_is_read_back(tmp_path):
    write_table(tmp_path, START)
    assert read_table(tmp_path) == START
    with (tmp_path / "split.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert [(row["label"], row["split"], row["size"], row["digest"]) for row in rows] == [
        ("a, b", "train", "3", "aa"),
        ("c", "val", "4", "bb"),
    ]
    os.utime(tmp_path / "split.csv", (1, 1))
    write_table(tmp_path, START)
    later = START.with_rows([Row("c/2.png", "c", "train", 5, "cc", 3)])
    write_table(tmp_path, later)
    assert (tmp_path / "split.csv").stat().st_mtime == 1  # the same content is left alone
    assert read_table(tmp_path) == later
    later = later.with_rows([Row("c/2.png", "c", "removed", 5, "cc", 4)])
    write_table(tmp_path, later)
    assert read_table(tmp_path) == later
    assert sorted(os.listdir(tmp_path)) == ["split.csv", "split.resumed.csv"]


def test_another_start_replaces_the_table_and_what_came_after_it(tmp_path):
    write_table(tmp_path, START.with_rows([Row("c/2.png", "c", "train", 5, "cc", 3)]))
    other = SplitTable(START.start[:1])
    write_table(tmp_path, other)
    assert read_table(tmp_path) == other


def test_a_checkpoint_knows_its_table_also_after_rows_were_added():
    later = START.with_rows([Row("c/2.png", "c", "train", 5, "cc", 3)])
    assert later.knows(START.digest)
    assert later.knows(later.digest)
    assert not START.knows(later.digest)
    edited = SplitTable((START.start[0]._replace(role="val"), START.start[1]))
    assert not edited.knows(START.digest)


def test_tables_of_older_versions_are_read(tmp_path):
    (tmp_path / "split.csv").write_text("file,label,split\na/1.png,a,train\n")
    assert read_table(tmp_path) == SplitTable((Row("a/1.png", "a", "train"),))
    assert read_table(tmp_path / "none") is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"a,b\n",
        b"file,label,split\na,b\n",
        b"file,label,split\na,b,c\n",
        b"file,label,split,size,digest\na,b,val,x,d\n",
        b"file,label,split\n" + b"a" * 200_000 + b",b,val\n",
        b'file,label,split\n"a\0\n',
    ],
)
def test_a_table_that_cannot_be_read_is_named(tmp_path, content):
    (tmp_path / "split.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"split\.csv cannot be read as the table of a run's images"):
        read_table(tmp_path)


def test_damaged_tables_are_read_or_named(tmp_path):
    random = Random(0)
    write_table(tmp_path, START.with_rows([Row("c/2.png", "c", "train", 5, "cc", 3)]))
    whole = {name: (tmp_path / name).read_bytes() for name in ("split.csv", "split.resumed.csv")}
    refused = 0
    for _ in range(500):
        for name, content in whole.items():
            damaged = bytearray(content)
            for _ in range(random.randrange(1, 4)):
                at = random.randrange(len(damaged))
                damaged[at : at + random.choice([0, 1, 9])] = random.choice(
                    [b"", b"\0", b'"', b"\n", b",", b"\xff", b"9" * 5000]
                )
            (tmp_path / name).write_bytes(damaged)
        try:
            read_table(tmp_path)
        except DataError:  # any other error fails the test
            refused += 1
    assert 50 < refused < 500
