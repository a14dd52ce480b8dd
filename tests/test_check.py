"""A folder that was damaged on purpose: `check` names each fault, by the kind that the one who made it knows."""

import csv
import importlib
import json
import os
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from PIL import Image

import finetune
from finetune import examined
from finetune.check import check
from finetune.escaping import from_cell
from finetune.examine import examine
from finetune.findings import KINDS
from finetune.main import main

ROOT = Path(finetune.__file__).parent.parent


@pytest.fixture
def damage(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("damage")
    sys.modules.pop("damage")


def kinds(found):
    return {(finding.kind, finding.file) for finding in found}


def exit_code(words):
    try:
        main(["check", *map(str, words)])
    except SystemExit as end:
        return end.code
    return 0


def test_every_damage_has_its_kind(damage, tmp_path):
    cases = damage.damaged_folder(tmp_path / "photos")
    found = check(tmp_path / "photos").findings
    assert len({case.kind for case in cases}) >= 30
    assert {(case.kind, case.file) for case in cases} <= kinds(found)
    told = {case.file for case in cases}
    assert {(f.kind, f.file) for f in found if f.file not in told} == {  # the other half of a pair, and `dog/sub`
        ("two-labels", "train/cat/1.png"),
        ("in-two-splits", "train/dog/2.png"),
        ("mixed-nesting", "train/dog"),
    }


def test_a_healthy_folder_is_not_complained_of(damage, tmp_path, capsys):
    damage.healthy_folder(tmp_path / "photos")
    assert exit_code([tmp_path / "photos", "--strict"]) == 0
    assert capsys.readouterr().out.endswith("photos: 45 pictures, 0 errors, 0 warnings, 0 notes\n")


def test_layouts_that_cannot_be_read(damage, tmp_path, capsys):
    for case in damage.broken_layouts(tmp_path):
        assert "layout" in {finding.kind for finding in check(tmp_path / case.file).findings}
        assert exit_code([tmp_path / case.file]) == 1


@pytest.mark.parametrize(("train", "test"), [("Training", "Testing"), ("TRAIN", "test")])
def test_splits_by_their_other_names(damage, tmp_path, train, test):
    damage.healthy_folder(tmp_path)
    (tmp_path / "train").rename(tmp_path / train)
    (tmp_path / "val").rename(tmp_path / test)
    assert not check(tmp_path).findings


def test_what_is_written_is_what_was_found(damage, tmp_path, capsys):
    root = tmp_path / "photos"
    damage.damaged_folder(root)
    assert exit_code([root, "--out", tmp_path / "found.csv"]) == 1
    assert exit_code([root, "--out", tmp_path / "found.json"]) == 1
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "\u202e" not in said
    wanted = check(root).findings
    with (tmp_path / "found.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    assert [(row["kind"], from_cell(row["file"])) for row in rows] == [(f.kind, f.file) for f in wanted]
    assert all(row["severity"] == KINDS[row["kind"]].severity for row in rows)
    content = json.loads((tmp_path / "found.json").read_text())
    assert [(each["kind"], each["file"], each["detail"]) for each in content["findings"]] == [tuple(f) for f in wanted]
    assert content["pictures"] == 114
    assert sum(content["counts"].values()) == len(wanted)
    assert exit_code([root, "--out", tmp_path / "found.json"]) == 2  # it is there already


def test_exit_codes(damage, tmp_path, capsys):
    root = tmp_path / "photos"
    damage.healthy_folder(root)
    (root / "val" / "owl" / "leak.png").write_bytes((root / "train" / "owl" / "0.png").read_bytes())
    assert exit_code([root]) == 0
    assert exit_code([root, "--strict"]) == 1
    (root / "val" / "owl" / "1.png").write_bytes(b"")
    assert exit_code([root]) == 1
    assert exit_code([tmp_path / "nowhere"]) == 2
    assert exit_code([root, "--out", "found.txt"]) == 2
    assert "Expected --out to end in .json or .csv" in capsys.readouterr().err


def test_a_quick_look_decodes_nothing_that_looks_whole(damage, tmp_path):
    damage.damaged_folder(tmp_path)
    quick, full = kinds(check(tmp_path, quick=True).findings), kinds(check(tmp_path).findings)
    assert quick <= full
    assert {kind for kind, _ in full - quick} == {"damaged", "one-colour", "duplicate", "two-labels", "in-two-splits"}
    assert ("damaged", "train/cat/rot.png") in full - quick


def test_a_picture_is_looked_at_once_and_again_after_it_changed(damage, tmp_path, monkeypatch):
    damage.healthy_folder(tmp_path / "photos")
    looked = []

    def counting(path, full):
        looked.append(Path(path).name)
        return examine(path, full)

    monkeypatch.setattr(examined, "examine", counting)
    check(tmp_path / "photos", quick=True)
    assert len(looked) == 45
    check(tmp_path / "photos", quick=True)
    assert len(looked) == 45
    check(tmp_path / "photos")  # a full look sees more
    check(tmp_path / "photos")
    check(tmp_path / "photos", quick=True)
    assert len(looked) == 90
    (tmp_path / "photos" / "val" / "owl" / "new.png").write_bytes(b"")
    (tmp_path / "photos" / "val" / "cat" / "1.png").write_bytes(b"GIF89a")
    found = check(tmp_path / "photos").findings
    assert sorted(looked[90:]) == ["1.png", "new.png"]
    assert kinds(found) == {("empty-file", "val/owl/new.png"), ("truncated", "val/cat/1.png")}


def test_an_interrupted_check_goes_on(damage, tmp_path):
    damage.healthy_folder(tmp_path)
    files = [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.glob("*/*/*.png"))]
    looks = examined.examine_all(tmp_path, files, full=True)
    for _ in range(20):
        next(looks)
    looks.close()
    with examined.Memory(tmp_path) as memory:
        assert [memory.recall(tmp_path, file, True) is not None for file in files] == [True] * 20 + [False] * 25


def test_without_a_place_to_remember(damage, tmp_path, monkeypatch):
    damage.healthy_folder(tmp_path / "photos")
    (tmp_path / "file").touch()
    monkeypatch.setenv("RESNET_FINETUNE_CACHE", str(tmp_path / "file"))  # where no folder can be made
    assert check(tmp_path / "photos").pictures == 45
    monkeypatch.setenv("RESNET_FINETUNE_CACHE", str(tmp_path / "cache"))
    check(tmp_path / "photos")
    (base,) = (tmp_path / "cache" / "checked").glob("*.sqlite")
    base.write_bytes(b"no database, which is longer than a header of one would be " * 20)
    with pytest.raises(sqlite3.Error):
        sqlite3.connect(base).execute("SELECT * FROM looks")
    assert check(tmp_path / "photos").pictures == 45


def test_several_processes_say_the_same(damage, tmp_path, monkeypatch):
    damage.damaged_folder(tmp_path / "photos")
    one = check(tmp_path / "photos", workers=0)
    monkeypatch.setenv("RESNET_FINETUNE_CACHE", str(tmp_path / "cache"))
    assert check(tmp_path / "photos", workers=2) == one


def test_a_picture_with_more_pixels_than_the_limit(tmp_path, monkeypatch):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1199)
    assert examine(str(tmp_path / "a.png"), full=False)[:2] == ("too-many-pixels", "40 x 30")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1200)
    assert examine(str(tmp_path / "a.png"), full=False)[:2] == ("", "")


AS_NOBODY = """
import os, sys
from finetune.check import check
check(sys.argv[1])  # imports what it needs while this user may read everything
os.setgid(65534)
os.setuid(65534)
found = check(sys.argv[2]).findings
print(*(f"{finding.kind} {finding.file}" for finding in found if finding.severity == "error"), sep=chr(10))
"""


def test_what_may_not_be_read(damage):
    if os.name == "nt" or os.geteuid() != 0:
        pytest.skip("needs a user who may read everything and can become one who may not")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        other, root = Path(folder, "other"), Path(folder, "photos")
        damage.healthy_folder(other, 1)
        damage.healthy_folder(root)
        (root / "train" / "cat" / "0.png").chmod(0)
        (root / "train" / "dog" / "sub").mkdir(mode=0)
        (root / "val" / "owl").chmod(0)
        Path(folder, "cache").mkdir()
        Path(folder, "cache").chmod(0o777)
        environment = {**os.environ, "RESNET_FINETUNE_CACHE": str(Path(folder, "cache"))}
        words = [sys.executable, "-c", AS_NOBODY, str(other), str(root)]
        done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:3] == [
        "unreadable-folder train/dog/sub",
        "unreadable-folder val/owl",
        "unreadable-file train/cat/0.png",
    ]
