"""A disk that fills up: told before training, or in the middle of a checkpoint, which leaves the one before it as it was."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

import finetune
from finetune import CheckpointError, FinetuneModule, FolderDataModule
from finetune.allocation import allocate
from finetune.room import require_room
from finetune.runs import AtomicCheckpointIO
from finetune.saving import checkpoint_bytes
from finetune.soup import BestEpochs
from finetune.store import Store

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


STORES = """
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import finetune.store
from finetune import DataError
from finetune.decoded import keep_decoded
from finetune.store import Store

free = int(sys.argv[2])  # what is left alone of the disk; below zero nothing is noticed before space is allocated
finetune.store._FREE = free
finetune.store.kept_folder = lambda: Path("runs/kept")
Path("runs/kept").mkdir()
Path("runs/kept/not_ours").write_bytes(bytes(10_000))
asked = []
try:
    if sys.argv[1] == "decoded":
        for number in range(4):
            Image.new("RGB", (4000, 1000), (number, 0, 0)).save(f"elsewhere/{number}.png")
        keep_decoded([f"elsewhere/{number}.png" for number in range(4)] * 10, 300, 0)  # 40 x 1.08 MB
    else:
        def compute(numbers):
            asked.append(len(numbers))
            return np.ones((len(numbers), 100_000), np.float32)
        Store({"a": 1}, (100, 100_000)).make(iter, compute)  # 40 MB
except DataError as error:
    print("error:", error)
print("asked", asked)
print("left", sorted(path.name for path in Path("runs/kept").rglob("*") if path.is_file() and "lock" not in path.name))
"""
ON_SMALL_DISK = """
set -e
mount -t tmpfs -o size=24m tmpfs runs
"$@"
"""


@pytest.mark.skipif(not can_mount(), reason="no namespaces of the user's own here, so no small disk can be mounted")
@pytest.mark.parametrize("left_alone", [0, -(10**9)])
@pytest.mark.parametrize("store", ["decoded", "reuse"])
def test_a_store_that_outgrows_the_disk(tmp_path, store, left_alone):
    (tmp_path / "stores.py").write_text(STORES)
    for folder in ("runs", "elsewhere"):
        (tmp_path / folder).mkdir()
    program = [sys.executable, "stores.py", store, str(left_alone)]
    words = ["unshare", "-rm", "sh", "-c", ON_SMALL_DISK, "sh", *program]
    path = {"PYTHONPATH": str(Path(finetune.__file__).parent.parent)}
    environment = {**os.environ, **path, "TMPDIR": str(tmp_path / "elsewhere"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr  # not ended by a signal
    size = {"decoded": 40 * (4 + 3 * 300 * 1200), "reuse": 100 * 100_000 * 4}[store]
    message, asked, left = done.stdout.splitlines()
    assert f"needs {size / 1e6:.1f} MB in runs/kept, where 2" in message  # and what there is: 25.1 MB and a little less
    assert "reuse --clear" in message
    assert asked == "asked []"  # before anything is computed
    assert left == "left ['.resnet-finetune', 'not_ours']"


def test_where_space_cannot_be_reserved_zeros_are_written(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    monkeypatch.setattr("finetune.allocation._PIECE", 10_000)
    with (tmp_path / "a").open("xb") as file:
        allocate(file, 2_000_000, [(0, 25_000), (1_500_000, 12_345)])
    status = (tmp_path / "a").stat()
    assert status.st_size == 2_000_000
    assert 25_000 + 12_345 <= status.st_blocks * 512 < 100_000
    assert not any((tmp_path / "a").read_bytes())


def test_space_is_reserved_before_rows_are_computed(tmp_path):
    store = Store({"a": 1}, (100, 1000), root=tmp_path)
    taken = []

    def compute(numbers):
        taken.append((store.folder / "rows").stat().st_blocks * 512)
        return np.ones((len(numbers), 1000), np.float32)

    store.make(iter, compute)
    assert min(taken) >= store.bytes == 400_000


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
