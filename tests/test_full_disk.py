"""A disk that fills up: told before training, or in the middle of a checkpoint, which leaves the one before it as it was."""

import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

import finetune
from finetune import CheckpointError, FinetuneModule, FolderDataModule
from finetune.room import require_room
from finetune.runs import AtomicCheckpointIO
from finetune.saving import checkpoint_bytes
from finetune.soup import BestEpochs

PROGRAM = str(Path(finetune.__file__).parent.parent / "cli.py")
FILL = """
import os
from lightning.pytorch.callbacks import Callback

class Fill(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 2:
            disk = os.statvfs("runs")
            with open("runs/filler", "wb") as file:
                file.write(bytes(disk.f_bavail * disk.f_frsize - 1_000_000))  # room for a table, not for a checkpoint
"""
INSIDE = """
set -e
mount -t tmpfs -o size=24m tmpfs runs
test "$(stat -f -c %T runs)" = tmpfs
"$@" && exit 99 || echo "left with $?"
python=$1
"$python" -c '
import glob, torch
(path,) = glob.glob("runs/full/*/checkpoints/last.ckpt")
print("last epoch", torch.load(path, weights_only=True)["epoch"], glob.glob("runs/full/*/checkpoints/.*.part"))'
"""


def can_mount():
    try:
        words = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=1m tmpfs /mnt"]
        return subprocess.run(words, capture_output=True, timeout=20, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


@pytest.mark.skipif(not can_mount(), reason="no namespaces of the user's own here, so no small disk can be mounted")
def test_a_disk_that_fills_up_during_a_run(tmp_path):
    (tmp_path / "fill.py").write_text(FILL)
    for folder in ("runs", "elsewhere"):
        (tmp_path / folder).mkdir()
    fit = [sys.executable, PROGRAM, "fit", "--model.backbone", "test_resnet", "--model.weights", "none", "--run.name", "full"]
    fit += ["--data.image_size", "32", "--data.workers", "0", "--trainer.max_epochs", "9", "--trainer.limit_train_batches", "3"]
    fit += ["--trainer.accelerator", "cpu", "--trainer.callbacks+=fill.Fill", "--trainer.enable_progress_bar", "false"]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "elsewhere"), "OMP_NUM_THREADS": "1"}  # another file system
    words = ["unshare", "-rm", "sh", "-c", INSIDE, "sh", *fit]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "epoch 2/9" in done.stdout
    assert "epoch 4/9" not in done.stdout
    assert "left with 2" in done.stdout
    assert "last epoch 1 []" in done.stdout  # the checkpoint before, which loads, and nothing half written
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "There is no room left for a checkpoint in " in message
    assert "runs/full/" in message
    assert "MB" in message  # what it needs, and what there is
    assert "resnet-finetune fit --ckpt_path runs/full/" in message
    assert "Traceback" not in done.stderr
    print(message)


def test_too_little_room_is_told_before_training(tmp_path):
    require_room(tmp_path / "new", 1000, 3)
    assert list((tmp_path / "new").iterdir()) == []  # the trial left nothing
    with pytest.raises(CheckpointError, match=r"no room for .*expected 3000\.0 TB \(3 of 1000\.0 TB\), found .*--run\.folder"):
        require_room(tmp_path, 10**15, 3)


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot be written to .*file.checkpoints: .*--run\.folder"):
        require_room(tmp_path / "file" / "checkpoints", 1, 1)


@pytest.mark.parametrize("previous", [True, False])
def test_what_a_failed_checkpoint_says(tmp_path, previous):
    resource = pytest.importorskip("resource")
    path = tmp_path / "runs" / "a" / "1" / "checkpoints" / "last.ckpt"
    if previous:
        AtomicCheckpointIO().save_checkpoint({"epoch": 1}, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"checkpoints: it needs 4\.0 MB, .* are free\.") as caught:
            AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert ("fit --ckpt_path" in str(caught.value)) == previous
    assert path.exists() == previous
    assert not path.with_name("last.ckpt.part").exists()


def test_an_average_that_has_no_room_is_done_without(tmp_path, capsys):
    resource = pytest.importorskip("resource")
    trainer = L.Trainer(max_epochs=0, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(FinetuneModule("test_resnet", num_classes=3, weights="none"))
    best = BestEpochs(tmp_path, 2, "val/acc", "max")
    for value in (0.5, 0.75):
        trainer.save_checkpoint(tmp_path / f"{value}.ckpt")
        best.best_k_models[str(tmp_path / f"{value}.ckpt")] = torch.tensor(value)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        assert best.average(trainer) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "warning: There is no average of the best epochs. There is no room left for a checkpoint" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.5.ckpt", "0.75.ckpt"]


@pytest.mark.parametrize(("optimizer", "ema"), [("sgd", False), ("adamw", False), ("sgd", True)])
def test_the_size_that_is_expected_is_what_comes(tmp_path, optimizer, ema):
    """Measured against the file that is written."""
    model = FinetuneModule("test_resnet", num_classes=10, weights="none", optimizer=optimizer, lr=1e-3)
    callbacks = [EMAWeightAveraging(decay=0.9)] if ema else []
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=1, callbacks=callbacks, **options)
    trainer.fit(model, FolderDataModule("digits", image_size=32, workers=0))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert checkpoint_bytes(trainer) == pytest.approx((tmp_path / "a.ckpt").stat().st_size, rel=0.1)
