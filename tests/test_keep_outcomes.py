"""The tables of a run against its checkpoints, computed again; they are those of the best epoch, not of the last."""

import csv
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

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
