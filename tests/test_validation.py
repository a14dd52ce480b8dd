"""Runs that are not validated after every epoch: what is printed, kept and averaged is of the weights that were measured."""

import csv
import re
from pathlib import Path

import pytest
import torch
from tiny import TINY

from finetune.main import main
from finetune.sample import digits_folder

RUN = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--run.gradients_every", "0"]
RUN += ["--data.root", "photos", "--data.batch_size", "8", "--model.lr", "0.05", "--model.schedule", "flat"]


@pytest.fixture(autouse=True)
def _working_folder(tmp_path, monkeypatch):
    """Three classes, of which 48 images are trained with, in 6 batches, and 12 are validated with."""
    monkeypatch.chdir(tmp_path)
    Path("plain.yaml").write_text("run: {}\n")
    for folder in sorted((digits_folder() / "train").iterdir())[:3]:
        (tmp_path / "photos" / folder.name).mkdir(parents=True)
        for image in sorted(folder.iterdir())[:20]:
            (tmp_path / "photos" / folder.name / image.name).symlink_to(image)


def fit(capsys, *words):
    main(["fit", "--config", "plain.yaml", *TINY, *RUN, *words])
    said = capsys.readouterr().out
    (run,) = Path("runs").glob("*/*")
    with (run / "metrics.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    measured = {int(row["epoch"]) + 1: float(row["val/acc"]) for row in rows if row.get("val/acc")}
    lines = dict(re.findall(r"^epoch (\d+)/\d+  (.*)$", said, re.MULTILINE))
    return said, run, measured, {int(epoch): line for epoch, line in lines.items()}


def epoch_of(path):
    return torch.load(path, weights_only=True)["epoch"] + 1


def test_seven_epochs_that_are_validated_every_third(capsys):
    words = ["--trainer.max_epochs", "7", "--trainer.check_val_every_n_epoch", "3", "--run.soup", "2"]
    said, run, measured, lines = fit(capsys, *words, "--run.patience", "5")
    assert list(measured) == [3, 6, 7]
    assert list(lines) == [1, 2, 3, 4, 5, 6, 7]
    assert {epoch for epoch, line in lines.items() if "val/" in line} == {3, 6, 7}
    assert all(f"val/acc {value:.4f}" in lines[epoch] for epoch, value in measured.items())
    assert "note: validation runs every 3 epochs, and after the last one" in said
    assert "without validation" not in said
    best = max(measured.values())
    if "better: it is" not in said:
        assert measured[epoch_of(run / "checkpoints" / "best.ckpt")] == best
    kept = sorted(epoch_of(path) for path in (run / "checkpoints" / "epochs").iterdir())
    assert len(kept) == 2
    assert set(kept) < set(measured)
    assert min(measured[epoch] for epoch in kept) == sorted(measured.values())[1]

    capsys.readouterr()  # a resumed run has another last epoch
    main(["fit", "--ckpt_path", str(run), "--trainer.max_epochs", "8", "--run.soup", "null"])
    lines = dict(re.findall(r"^epoch (\d+)/\d+  (.*)$", capsys.readouterr().out, re.MULTILINE))
    assert list(lines) == ["8"]
    assert "val/acc" in lines["8"]


def test_patience_counts_validations(capsys):
    words = [
        "--trainer.check_val_every_n_epoch",
        "2",
        "--run.patience",
        "2",
        "--model.lr",
        "1e-12",
        "--model.bn",
        "frozen",
        "--trainer.max_epochs",
        "20",
    ]
    _, _, measured, lines = fit(capsys, *words)
    assert list(measured) == [2, 4, 6]  # the first, and two that are no better
    assert max(lines) == 6


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["--trainer.val_check_interval", "4"], [3, 5, 9, 11]),  # also behind the last step of each epoch
        (["--trainer.max_steps", "8"], [5, 7]),  # the run ends within an epoch
        (["--trainer.val_check_interval", "8", "--trainer.check_val_every_n_epoch", "null"], [7, 11]),
    ],
)
def test_what_is_kept_was_measured(capsys, words, steps):
    _, run, _, lines = fit(capsys, "--trainer.max_epochs", "2", *words)
    with (run / "metrics.csv").open(newline="") as handle:
        rows = {int(row["step"]): row["val/loss"] for row in csv.DictReader(handle) if row.get("val/loss")}
    assert list(rows) == steps
    last = list(rows.values())[-1]
    assert f"val/loss {float(last):.4f}" in lines[2]
    assert ("val/" in lines[1]) == (5 in steps)
    done = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["global_step"] - 1
    assert done in steps


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--trainer.limit_val_batches", "0"],
            "but trainer.limit_val_batches is 0. Set it above 0, or leave run.patience out.",
        ),
        (["--data.val_fraction", "0"], "but there are no validation pictures. Give some"),
    ],
)
def test_patience_without_validation_is_refused_for_its_reason(capsys, words, says):
    with pytest.raises(SystemExit):
        main(["fit", "--config", "plain.yaml", *TINY, *RUN, "--trainer.max_epochs", "1", "--run.patience", "1", *words])
    assert says in capsys.readouterr().err
