"""Checkpoints of other formats: one that version 0.1.0 wrote goes on training, what is newer or nonsense is refused by name."""

import csv
import shutil
from pathlib import Path

import pytest
import torch

from finetune import CheckpointError
from finetune.checkpoints import read, read_own
from finetune.formats import FORMAT, KEY, upgrade
from finetune.main import main

OLD = Path(__file__).parent / "data" / "format_1"
BACKBONE = """
from torch import nn


class Tiny(nn.Module):
    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(4, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.fc = nn.Linear(8, num_classes)

    def forward(self, images):
        return self.fc(self.body(self.stem(images)))
"""


def test_a_run_of_format_1_goes_on(tmp_path, monkeypatch, capsys):
    assert torch.load(OLD / "checkpoints" / "last.ckpt", weights_only=True)[KEY]["format"] == 1
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "tiny_backbone.py").write_text(BACKBONE)
    run = shutil.copytree(OLD, tmp_path / "runs" / "tiny" / "1")
    shutil.copy(run / "checkpoints" / "last.ckpt", run / "checkpoints" / "best.ckpt")  # a score without its file is forgotten
    main(["fit", "--ckpt_path", str(run), "--trainer.max_epochs", "3", "--run.gradients_every", "0"])
    said = capsys.readouterr().out
    assert "2 epochs are done" in said
    assert "epoch 3/3" in said
    assert "epoch 2/3" not in said
    now = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert (now["epoch"], now[KEY]["format"]) == (2, FORMAT)
    # the best score of a run that was moved is still known: in the third epoch best.ckpt is written only if it is better
    before = torch.load(OLD / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    (best,) = [state for key, state in now["callbacks"].items() if "val/acc" in key]
    (old,) = [state for key, state in before.items() if "val/acc" in key]
    with (run / "metrics.csv").open(newline="") as file:
        (accuracy,) = [float(row["val/acc"]) for row in csv.DictReader(file) if row.get("val/acc")]
    assert float(best["best_model_score"]) == pytest.approx(max(accuracy, float(old["best_model_score"])))
    assert Path(best["dirpath"]) == run / "checkpoints"
    assert Path(best["best_model_path"]) == run / "checkpoints" / "best.ckpt"


def test_what_format_1_lacks_is_added():
    checkpoint = read_own(OLD / "checkpoints" / "last.ckpt")
    assert checkpoint[KEY]["format"] == FORMAT
    assert checkpoint[KEY]["run"] == {}
    assert not any("'monitor': None" in key for key in checkpoint["callbacks"])
    again = upgrade({**checkpoint})
    assert again[KEY] == checkpoint[KEY]


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (FORMAT + 1, rf"format {FORMAT + 1} \(written by version 9\.8\).*reads up to {FORMAT}.*pip install -U"),
        (0, r"format is 0; expected one from 1"),
        ("two", r"format is 'two'; expected one from 1"),
        (None, r"format is None; expected one from 1"),
    ],
)
def test_formats_that_are_refused(tmp_path, found, says):
    torch.save({"state_dict": {}, KEY: {"format": found, "version": "9.8"}}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=says):
        read(tmp_path / "a.ckpt")


def test_checkpoints_of_others_stay_as_they_are():
    assert upgrade({"state_dict": {}}) == {"state_dict": {}}
