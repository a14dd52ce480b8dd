"""Every command after a training, with every kind of data module: it works, or says why not and what to do."""

import csv
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.main import main

NETWORK = ["--model.backbone", "test_resnet", "--model.weights", "none", "--data.workers", "0", "--data.image_size", "32"]
OWN = '''
import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset


class Own(L.LightningDataModule):
    """Images made in memory: bright ones and dark ones."""

    num_classes = 2

    def __init__(self, workers: int = 0, image_size: int = 32):
        super().__init__()
        self.classes = ["a", "b"]

    def loader(self):
        labels = torch.arange(8) % 2
        images = torch.full((8, 3, 32, 32), 40, dtype=torch.uint8) + (150 * labels).view(-1, 1, 1, 1).to(torch.uint8)
        return DataLoader(TensorDataset(images, labels), batch_size=4)

    train_dataloader = val_dataloader = loader
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with two kinds of images, and a run of each kind of data module."""
    here, rng = tmp_path_factory.mktemp("after"), np.random.default_rng(0)
    for domain, base in (("photos", 30), ("sketches", 90)):
        for label, name in enumerate("ab"):
            (here / domain / name).mkdir(parents=True)
            for number in range(6):
                pixels = rng.integers(0, 40, (32, 32, 3)) + base + 100 * label
                Image.fromarray(pixels.astype(np.uint8)).save(here / domain / name / f"{number}.png")
    (here / "own_images.py").write_text(OWN)
    before, path = Path.cwd(), list(sys.path)
    os.chdir(here)
    try:
        end = ["--trainer.max_epochs", "1", "--data.batch_size", "4"]
        folder = ["--data.root", "photos", "--data.val_fraction", "0.34"]
        main(["fit", "--config", "linear_probe", *NETWORK, *folder, *end, "--run.name", "folder"])
        main(["adapt", *NETWORK, *folder, "--data.target", "sketches", *end, "--run.name", "adapt"])
        (run,) = Path("runs/folder").iterdir()
        teacher = ["--data.pictures", "[photos]", "--data.teacher", str(run), "--data.views", "1"]
        for name, weight in (("student", "1.0"), ("features", "0.0")):
            main(["distill", *NETWORK, *teacher, *end, "--model.logits_weight", weight, "--run.name", name])
        own = ["--data", "own_images.Own", "--run.name", "own", "--trainer.max_epochs", "1"]
        main(["fit", "--config", "linear_probe", *NETWORK[:4], "--model.head_init", "zero", *own])
        yield here
    finally:
        os.chdir(before)
        sys.path[:] = path
        sys.modules.pop("own_images", None)


COMMANDS = {
    "validate": ["validate", "--ckpt_path", "RUN"],
    "test": ["test", "--ckpt_path", "RUN"],
    "predict": ["predict", "RUN", "sketches", "--out", "OUT.csv", "--workers", "0"],
    "evaluate": ["evaluate", "RUN", "--out", "OUT", "--workers", "0", "--resamples", "0"],
    "evaluate folder": ["evaluate", "RUN", "sketches", "--out", "OUT", "--workers", "0", "--resamples", "0"],
    "calibrate": ["evaluate", "RUN", "sketches", "--calibrate", "--out", "OUT", "--workers", "0", "--resamples", "0"],
    "explain": ["explain", "RUN", "sketches/a/0.png", "--out", "OUT"],
    "explain among": ["explain", "RUN", "sketches/a/0.png", "--neighbours", "1", "--out", "OUT"],
    "export": ["export", "RUN", "--format", "torch_export", "--out", "OUT"],
    "report": ["report", "RUN", "--out", "OUT.html"],
}
WORKS = ""
NO_CLASSES = "was not trained, so it names no classes"
UNLABELLED = r"was distilled on images without labels\. Name a"
OWN_MODULE = r"came from the data module Own, not from a folder\. Name a"
NO_TEST = "has (no|a) test split|defines no test_dataloader"
TABLE = {
    #                   folder   adapt    student       features      own
    "validate":        (WORKS,   WORKS,   WORKS,        WORKS,        WORKS),
    "test":            (NO_TEST, NO_TEST, NO_TEST,      NO_TEST,      NO_TEST),
    "predict":         (WORKS,   WORKS,   WORKS,        NO_CLASSES,   WORKS),
    "evaluate":        (WORKS,   WORKS,   UNLABELLED,   NO_CLASSES,   OWN_MODULE),
    "evaluate folder": (WORKS,   WORKS,   WORKS,        NO_CLASSES,   WORKS),
    "calibrate":       (WORKS,   WORKS,   UNLABELLED,   NO_CLASSES,   OWN_MODULE),
    "explain":         (WORKS,   WORKS,   WORKS,        NO_CLASSES,   WORKS),
    "explain among":   (WORKS,   WORKS,   UNLABELLED,   NO_CLASSES,   OWN_MODULE),
    "export":          (WORKS,   WORKS,   WORKS,        NO_CLASSES,   WORKS),
    "report":          (WORKS,   WORKS,   WORKS,        WORKS,        WORKS),
}  # fmt: skip
MODULES = ("folder", "adapt", "student", "features", "own")
CELLS = [(command, kind, says) for command, row in TABLE.items() for kind, says in zip(MODULES, row, strict=True)]


@pytest.mark.parametrize(("command", "kind", "says"), CELLS, ids=[f"{command}-{kind}" for command, kind, _ in CELLS])
def test_it_works_or_says_why_not(place, capsys, monkeypatch, command, kind, says):
    monkeypatch.chdir(place)
    (run,) = (place / "runs" / kind).iterdir()
    out = f"{command.replace(' ', '_')}-{kind}"
    arguments = [part.replace("RUN", str(run)).replace("OUT", out) for part in COMMANDS[command]]
    if says is WORKS:
        main(arguments)
    else:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    said = capsys.readouterr()
    assert says is WORKS or re.search(says, said.err), said.err
    assert "Traceback" not in said.err
    if says is WORKS and command.startswith("evaluate"):
        with Path(out, "predictions.csv").open(newline="") as file:
            measured = {Path(row["file"]).parts[-3] for row in csv.DictReader(file)}
        assert measured == ({"sketches"} if command == "evaluate folder" else {"photos"})
    if command == "export" and says is WORKS:
        assert ("the built-in digits" in said.out) == (kind == "own")
