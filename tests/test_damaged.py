"""Training on damaged folders: it leaves out what it was told to leave out, or stops with one clear message."""

import csv
import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tiny import SMALL_PICTURES

import finetune
from finetune import FolderDataModule
from finetune.errors import DataError
from finetune.escaping import from_cell
from finetune.folders import scan
from finetune.left_out import leaving_out, look_before_training
from finetune.main import main

SKIP = ["--data.on_error", "skip"]
pytestmark = pytest.mark.filterwarnings("ignore:.*no pretrained weights.*")


@pytest.fixture
def damage(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.syspath_prepend(str(Path(finetune.__file__).parent.parent / "benchmarks"))
    yield importlib.import_module("damage")
    sys.modules.pop("damage")


def fit(*words, epochs=1):
    Path("run.yaml").write_text("seed_everything: 0\n")  # instead of the recipe that the pictures suggest
    main(["fit", "--config", "run.yaml", *SMALL_PICTURES, "--data.root", "photos", "--trainer.max_epochs", str(epochs), *words])


QUICKLY = ["--trainer.enable_checkpointing", "false"]  # no report at the end, either


def refusal(capsys, *words):
    """Return the message with which `fit` ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        fit(*words)
    said = capsys.readouterr()
    assert end.value.code == 2
    assert said.err.startswith("error: ")
    assert "Traceback" not in said.err + said.out
    return said.err


def only_run():
    (run,) = Path("runs/run").iterdir()
    return run


def rows(path):
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def flipped(path):
    """Change a byte in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def test_what_cannot_be_read_is_left_out_and_named(damage, capsys):
    cases = damage.damaged_folder(Path("photos"))
    fit(*SKIP, "--data.max_errors", "0.2")
    said = capsys.readouterr().out
    run = only_run()
    fatal = ("empty-file", "not-a-picture", "truncated", "damaged", "too-many-pixels")
    expected = {(case.file, case.kind) for case in cases if case.kind in fatal}
    expected |= {(f"val/ghost/{number}.png", "unknown-class") for number in range(2)}
    assert {(from_cell(row["file"]), row["kind"]) for row in rows(run / "left_out.csv")} == expected
    assert len(expected) == 15
    line = "left out: 15 of 114 pictures (13.2%): train/cat/bomb.png (too-many-pixels), "
    assert said.count(line) == 2  # before and after
    record = json.loads((run / "record.json").read_text())
    assert record["state"] == "finished"
    assert record["data"]["classes"] == ["Cat", "café", "cat", "dog", "few", "owl"]
    assert len(rows(run / "predictions.val.csv")) == 12

    # a later process takes the same pictures, and measures the same
    main(["validate", "--ckpt_path", str(run)])
    accuracy = next(float(row["val/acc"]) for row in rows(run / "metrics.csv") if row["val/acc"])
    assert ["val/acc", f"{accuracy:.4f}"] in [line.split() for line in capsys.readouterr().out.splitlines()]
    main(["fit", "--ckpt_path", str(run), "--trainer.max_epochs", "2", *QUICKLY])
    assert "epoch 2/2" in capsys.readouterr().out


def test_with_what_is_kept_of_frozen_stages(damage):
    damage.healthy_folder(Path("photos"))
    Path("photos/train/cat/3.png").write_bytes(b"")
    flipped(Path("photos/val/owl/1.png"))
    frozen = ["--model.freezing", "head", "--data.augment", "none", *SKIP, *QUICKLY]
    fit(*frozen)
    fit(*frozen, "--data.reuse", "exact", "--run.name", "reused")
    one, other = (
        next(row for row in rows(next(Path(f"runs/{name}").iterdir()) / "metrics.csv") if row["val/loss"])
        for name in ("run", "reused")
    )
    assert float(one["val/loss"]) == pytest.approx(float(other["val/loss"]), rel=1e-5)
    assert one["val/acc"] == other["val/acc"]


def test_looking_leaves_random_numbers_alone(damage):
    damage.healthy_folder(Path("photos"))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    scan("photos", choose=leaving_out(0.5))
    assert torch.rand(1) == expected


def test_training_does_not_start_with_files_that_cannot_be_read(damage, capsys):
    damage.healthy_folder(Path("photos"))
    Path("photos/train/cat/3.png").write_bytes(b"")
    whole = Path("photos/val/owl/1.png").read_bytes()
    Path("photos/val/owl/1.png").write_bytes(whole[:-200])
    Path("photos/test/dog").mkdir(parents=True)
    Path("photos/test/dog/x\x1b[2J.jpg").write_bytes(b"<html>")
    said = refusal(capsys)
    assert (
        "3 of 46 pictures of photos cannot be read: train/cat/3.png (empty-file), val/owl/1.png (truncated), test/dog/" in said
    )
    assert "x\\x1b[2J.jpg (not-a-picture)" in said
    assert "--data.on_error skip" in said
    assert "resnet-finetune check photos" in said
    assert not list(only_run().glob("checkpoints/*"))


def test_the_worst_folder_is_refused_in_a_sentence(damage, capsys):
    damage.damaged_folder(Path("photos"))
    assert "'empty' holds no picture" in refusal(capsys)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_damage_within_a_file_is_named_when_it_is_met(damage, capsys, workers):
    damage.healthy_folder(Path("photos"))
    flipped(Path("photos/train/dog/5.png"))
    said = refusal(capsys, "--data.workers", workers)
    assert said.startswith("error: photos/train/dog/5.png cannot be read as a picture: ")
    assert said.endswith(
        "Replace the file, or remove it from the folder. To train without such pictures: --data.on_error skip\n"
    )
    fit(*SKIP, *QUICKLY)


def test_a_picture_that_breaks_after_the_look(damage, capsys):
    damage.healthy_folder(Path("photos"))
    data = FolderDataModule("photos", on_error="skip", workers=0)
    data.setup("validate")
    loader = data.val_dataloader()
    Path("photos/val/cat/1.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"is empty.*go on with: fit --ckpt_path last"):
        list(loader)


def test_more_than_a_share_is_not_left_out(damage, capsys):
    damage.healthy_folder(Path("photos"))
    for number in range(3):
        Path(f"photos/train/cat/{number}.png").write_bytes(b"")
    said = refusal(capsys, *SKIP)
    assert "3 of 45 pictures of photos cannot be used, more than data.max_errors allows (5.0%): train/cat/0.png" in said
    assert not Path("runs").exists()
    fit(*SKIP, *QUICKLY, "--data.max_errors", str(3 / 45))


def test_classes_that_are_left_without_pictures(damage):
    damage.healthy_folder(Path("photos"), 2)
    for number in range(2):
        Path(f"photos/train/owl/{number}.png").write_bytes(b"")
    folder = scan("photos", choose=leaving_out(1.0))
    assert folder.classes == ("cat", "dog")
    assert set(folder.left_out.values()) == {"empty-file", "unknown-class"}
    assert len(folder.left_out) == 2 + 3
    with pytest.raises(DataError, match=r"5 of 15 pictures .* cannot be used"):
        scan("photos", choose=leaving_out(0.3))


def test_the_draw_is_of_what_can_be_used(damage):
    damage.healthy_folder(Path("photos"), 10)
    shutil.rmtree("photos/val")
    for number in range(5):
        Path(f"photos/train/owl/{number}.png").write_bytes(b"")
    folder = scan("photos", val_fraction=0.2, choose=leaving_out(0.2))
    assert folder.counts("train") == [8, 8, 4]
    assert folder.counts("val") == [2, 2, 1]


def test_the_look_says_what_else_may_be_wrong(damage, capsys):
    damage.healthy_folder(Path("photos"), 9)
    Path("photos/train/cat/more.zip").touch()
    look_before_training(scan("photos"))
    line = "check  few-pictures 3, archive 1. For all that is wrong: resnet-finetune check photos\n"
    assert capsys.readouterr().out == line
    look_before_training(scan("photos"), say=False)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [({"on_error": "ignore"}, "raise or skip, found 'ignore'"), ({"max_errors": 5}, "between 0 and 1, found 5")],
)
def test_mistakes(options, message):
    with pytest.raises(finetune.errors.ConfigError, match=message):
        FolderDataModule("digits", **options)
