"""The record of a run, against what the test knows of the run, and after an end of every kind."""

import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import lightning as L
import pytest
import torch
from tiny import TINY

from finetune import FinetuneModule, FolderDataModule
from finetune.environment import git_state, library_versions
from finetune.folders import scan
from finetune.main import main
from finetune.record import RunRecord, fingerprint, read_record
from finetune.sample import digits_folder

SHORT = [*TINY, "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"]
COMMAND = [sys.executable, "-c", "from finetune.main import main; main()", "fit"]


@pytest.fixture(autouse=True)
def _working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])


def only_run(tmp_path, name="run"):
    (run,) = (tmp_path / "runs" / name).iterdir()
    return run


def test_what_a_run_was_and_what_came_out(tmp_path):
    words = ["fit", *SHORT, "--trainer.max_epochs", "3", "--model.freezing", "lp_ft:1", "--model.lr_decay", "0.5"]
    main(words)
    run = only_run(tmp_path)
    record = read_record(run)
    assert record == json.loads((run / "record.json").read_text())
    assert not list(run.glob("*.part"))
    assert (record["format"], record["state"]) == (1, "finished")
    assert record["command"] == ["resnet-finetune", *words]
    assert record["resumed"] == []
    assert record["started"] <= record["updated"]
    assert record["seconds"] > 0
    assert record["versions"]["torch"] == importlib.metadata.version("torch")
    assert record["git"] is None  # a temporary folder lies in no repository
    assert "CPU" in record["hardware"]

    data = record["data"]
    assert data["classes"] == [str(digit) for digit in range(10)]
    for split in ("train", "test"):
        folders = [digits_folder() / split / name for name in data["classes"]]
        assert data["counts"][split] == [len(list(folder.iterdir())) for folder in folders]
    assert record["weights"]["source"] == "none"
    assert record["weights"]["summary"] == "none, the whole network starts from random values"

    stages = {row["stage"]: row for row in record["stages"]}
    assert list(stages)[-1] == "head"
    assert stages["head"]["lr"] == 0.01
    assert stages["layer3"]["lr"] == pytest.approx(0.01 * 0.5**2)
    model = FinetuneModule("test_resnet", num_classes=10, weights="none")
    assert sum(row["parameters"] for row in record["stages"]) == sum(p.numel() for p in model.parameters())
    assert stages["head"]["trains_from_epoch"] == 0
    assert stages["stem"]["trains_from_epoch"] == 1
    assert [(p["start"], p["end"]) for p in record["phases"]] == [(0, 1), (1, 3)]
    assert record["phases"][0]["train"] == ["head"]

    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert (record["monitor"], record["mode"]) == ("val/acc", "max")
    assert record["best"]["checkpoint"] == "checkpoints/best.ckpt"
    assert record["best"]["epoch"] == best["epoch"]
    state = next(value for key, value in best["callbacks"].items() if "'val/acc'" in key)
    assert record["best"]["value"] == pytest.approx(float(state["best_model_score"]))
    assert 0 <= record["test"]["test/acc"] <= 1


def test_a_resumed_run_goes_on_with_its_record(tmp_path):
    main(["fit", *SHORT, "--trainer.max_epochs", "1"])
    run = only_run(tmp_path)
    first = read_record(run)
    main(["fit", "--ckpt_path", "last", "--trainer.max_epochs", "2"])
    second = read_record(run)
    assert second["command"] == first["command"]
    assert [entry["command"][1:3] for entry in second["resumed"]] == [["fit", "--ckpt_path"]]
    assert second["started"] == first["started"]
    assert second["seconds"] >= first["seconds"]
    assert second["best"]["epoch"] == torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["epoch"]

    (run / "record.json").unlink()  # a run from before there were records
    main(["fit", "--ckpt_path", str(run), "--trainer.max_epochs", "3"])
    assert read_record(run)["best"]["epoch"] == torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["epoch"]

    before = (run / "record.json").read_bytes()
    with pytest.raises(SystemExit):
        main(["fit", "--ckpt_path", "last", "--model.lr", "0.5"])
    assert (run / "record.json").read_bytes() == before


def start(folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    options = [*TINY, "--trainer.max_epochs", "200"]
    return subprocess.Popen(
        [*COMMAND, *options], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.parametrize(
    ("number", "state"), [(signal.SIGINT, "stopped"), (signal.SIGTERM, "stopped"), (signal.SIGKILL, "running")]
)
def test_what_ends_a_run_is_its_state(tmp_path, number, state):
    with start(tmp_path) as process:
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("epoch 1/"):
                time.sleep(0.2)
                process.send_signal(number)
                break
        said.append(process.stdout.read())
    record = read_record(only_run(tmp_path))
    assert record["state"] == state, said
    assert record["best"]["epoch"] >= 0
    assert "error" not in record


THEIRS = """
import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset


class Data(L.LightningDataModule):
    num_classes = 2

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.rand(8, 3), torch.arange(8) % 2), batch_size=4)


class Module(L.LightningModule):
    def __init__(self, fails: bool = False):
        super().__init__()
        self.layer, self.fails = torch.nn.Linear(3, 2), fails

    def training_step(self, batch, batch_idx):
        if self.fails and self.current_epoch == 1:
            raise RuntimeError("the cat sat on the keyboard")
        loss = torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
"""


def test_classes_of_the_user(tmp_path):
    (tmp_path / "their_record.py").write_text(textwrap.dedent(THEIRS))
    own = [
        "--model",
        "their_record.Module",
        "--data",
        "their_record.Data",
        "--trainer.max_epochs",
        "2",
        "--run.monitor",
        "loss",
    ]
    main(["fit", *own])
    record = read_record(only_run(tmp_path))
    assert record["state"] == "finished"
    assert record["data"] == {"root": None, "classes": [], "counts": {}, "fingerprint": None}
    assert (record["weights"], record["stages"], record["phases"]) == (None, [], [])
    assert (record["monitor"], record["mode"]) == ("loss", "min")
    assert record["best"]["value"] > 0

    with pytest.raises(RuntimeError, match="the cat"):
        main(["fit", *own, "--model.fails", "true", "--run.name", "failing"])
    record = read_record(only_run(tmp_path, "failing"))
    assert (record["state"], record["error"]) == ("failed", "RuntimeError: the cat sat on the keyboard")
    assert record["best"]["epoch"] == 0


def test_from_python(tmp_path):
    data = FolderDataModule("digits", batch_size=64, workers=0)
    model = FinetuneModule("test_resnet", num_classes=10, weights="none")
    options = {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 1, "enable_checkpointing": False}
    trainer = L.Trainer(**options, callbacks=[RunRecord(tmp_path)], logger=False, enable_progress_bar=False)
    trainer.fit(model, data)
    record = read_record(tmp_path)
    assert (record["state"], record["command"]) == ("finished", [])
    assert (record["monitor"], record["best"]) == (None, None)
    assert len(record["stages"]) == 6


def test_from_python_the_folder_is_made(tmp_path):
    data = FolderDataModule("digits", batch_size=64, workers=0)
    model = FinetuneModule("test_resnet", num_classes=10, weights="none")
    options = {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 0, "enable_checkpointing": False}
    record = RunRecord(tmp_path / "new" / "my_run")
    trainer = L.Trainer(**options, callbacks=[record], logger=False, enable_progress_bar=False)
    trainer.fit(model, data)
    trained = read_record(tmp_path / "new" / "my_run")["seconds"]
    trainer.test(model, data.eval_loader("val"), verbose=False)
    after = read_record(tmp_path / "new" / "my_run")
    assert (after["seconds"], "test/acc" in after["test"]) == (trained, True)  # what is measured afterwards is no training


def test_a_folder_without_a_record_is_empty_handed(tmp_path):
    assert read_record(tmp_path) == {}


def test_a_fingerprint_is_of_the_files_wherever_they_lie_and_however_they_are_split(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "one" / name).mkdir(parents=True)
        for number in range(5):
            (tmp_path / "one" / name / f"{number}.png").write_bytes(b"x" * (10 + number))
    shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copyfile)
    first = fingerprint(scan(tmp_path / "one"))
    assert fingerprint(scan(tmp_path / "two", val_fraction=0.4, split_seed=3)) == first
    (tmp_path / "two" / "a" / "0.png").write_bytes(b"x" * 11)
    changed = fingerprint(scan(tmp_path / "two"))
    (tmp_path / "two" / "a" / "0.png").write_bytes(b"x" * 10)
    assert fingerprint(scan(tmp_path / "two")) == first
    (tmp_path / "two" / "b" / "4.png").rename(tmp_path / "two" / "b" / "5.png")
    assert len({first, changed, fingerprint(scan(tmp_path / "two"))}) == 3


def test_the_commit_is_what_git_says(tmp_path):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    assert git_state(tmp_path) is None
    git("init")
    assert git_state(tmp_path) is None  # nothing is committed yet
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "one")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "new").write_text("unknown to git")
    assert not git_state(tmp_path)["dirty"]
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path)["dirty"]
    assert set(library_versions()) >= {"python", "torch", "lightning", "timm", "resnet-finetune"}
