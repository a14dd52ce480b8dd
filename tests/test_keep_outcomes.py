"""The tables of a run against its checkpoints, computed again; they are those of the best epoch, not of the last."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import timm
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

import finetune
from finetune import FinetuneModule, FolderDataModule
from finetune.keep_outcomes import KeepOutcomes
from finetune.main import main
from finetune.outcomes import read_outcome
from finetune.predictor import Predictor

FIT = ["fit", "--config", "small", "--model.backbone", "test_resnet", "--model.weights", "none", "--data.workers", "0"]
FIT += ["--data.image_size", "32", "--model.freezing", "full", "--trainer.accelerator", "cpu", "--data.test_fraction", "0.1"]


def test_the_tables_are_what_the_best_checkpoint_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main([*FIT, "--trainer.max_epochs", "4", "--model.lr", "0.03", "--model.schedule", "flat"])
    (run,) = Path("runs/small").iterdir()
    with (run / "metrics.csv").open(newline="") as file:
        scores = [float(row["val/acc"]) for row in csv.DictReader(file) if row.get("val/acc")]
    data = FolderDataModule("digits", test_fraction=0.1)
    for split in ("val", "test"):
        outcome = read_outcome(run / f"predictions.{split}.csv")
        assert list(outcome.files) == [str(path.absolute()) for path in data.files(split)]
        assert outcome.labels.tolist() == data.labels(split)
        np.testing.assert_allclose(outcome.probabilities, Predictor(run).probabilities(outcome.files), atol=1e-4)
    assert 'id="explained"' in (run / "report.html").read_text()
    accuracy = (outcome := read_outcome(run / "predictions.val.csv")).predicted == outcome.labels
    assert accuracy.mean() == pytest.approx(max(scores), abs=1e-6)


class Pairs(L.LightningDataModule):
    """A data module of somebody else: pairs, and no file names."""

    num_classes = 3

    def __init__(self, number):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.pictures = torch.rand(number, 3, 16, 16, generator=generator)
        self.numbers = torch.randint(0, 3, (number,), generator=generator)

    def train_dataloader(self):
        return DataLoader(TensorDataset(self.pictures, self.numbers), 4)

    val_dataloader = train_dataloader


def test_data_without_file_names(tmp_path):
    data = Pairs(10)
    model = FinetuneModule("test_resnet", num_classes=3, weights="none", lr=1e-4)
    best = ModelCheckpoint(tmp_path, monitor="val/acc", mode="max")
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(max_epochs=1, callbacks=[KeepOutcomes(tmp_path, best), best], **options).fit(model, data)
    outcome = read_outcome(tmp_path / "predictions.val.csv")
    assert list(outcome.files) == [str(number) for number in range(10)]
    assert outcome.labels.tolist() == data.numbers.tolist()
    with torch.no_grad():
        expected = model.eval()(data.pictures).softmax(1)
    np.testing.assert_allclose(outcome.probabilities, expected.numpy(), atol=1e-5)
    assert outcome.classes == ("0", "1", "2")


def test_two_processes_keep_frozen_work_together_and_count_every_picture_once(tmp_path):
    """269 test pictures do not divide by two."""
    words = [
        "fit",
        "--config",
        "linear_probe",
        "--model.backbone",
        "test_resnet",
        "--model.weights",
        str(tmp_path / "start.pth"),
    ]
    words += ["--data.image_size", "32", "--data.workers", "0", "--data.test_fraction", "0.1", "--data.val_fraction", "0.3"]
    words += ["--trainer.devices", "2", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "2"]
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "start.pth")
    environment = {**os.environ, "RESNET_FINETUNE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(finetune.__file__).parent.parent / "cli.py"), *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs" / "linear_probe").iterdir()
    with (run / "predictions.test.csv").open(newline="") as file:
        assert len({row["file"] for row in csv.DictReader(file)}) == 269
    for split in ("val", "test"):
        outcome = read_outcome(run / f"predictions.{split}.csv")
        np.testing.assert_allclose(outcome.probabilities, Predictor(run).probabilities(outcome.files), atol=1e-4)
    stores = list((tmp_path / "cache" / "kept").iterdir())
    assert len(stores) == 2  # training and validation, whoever made them
    assert all((store / "about.json").is_file() for store in stores)
