"""When last.ckpt is written within an epoch, what a signal does in this process, and that nothing is lost between two files."""

import csv
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from finetune import FinetuneModule, FolderDataModule
from finetune.interrupts import Interrupts
from finetune.resuming import progress
from finetune.runs import RunLogger
from finetune.saving import LastCheckpoint

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 10}


class Before(Callback):
    """What a trainer's place is whenever a checkpoint is written; a signal at one of the batches."""

    def __init__(self, number=None, at=None):
        self.number, self.at, self.saved = number, at, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.at:
            os.kill(os.getpid(), self.number)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.saved.append((*progress(checkpoint), trainer.global_step))


def fit(folder, *callbacks, resume=None, epochs=2, minutes=None, **options):
    data = FolderDataModule("digits", batch_size=64, workers=0, image_size=32)
    model = FinetuneModule("test_resnet", num_classes=10, weights="none", lr=0.05)
    last = LastCheckpoint(folder / "checkpoints", minutes)
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=[last, *callbacks],
        logger=RunLogger(folder),
        limit_train_batches=6,
        limit_val_batches=1,
        **{**QUIET, **options},
    )
    trainer.fit(model, data, ckpt_path=resume)
    return trainer


def test_within_an_epoch_only_between_steps(tmp_path):
    before = Before()
    fit(tmp_path / "a" / "1", before, minutes=0, epochs=1)
    assert before.saved == [(0, 1, 1), (0, 2, 2), (0, 3, 3), (0, 4, 4), (0, 5, 5), (1, 0, 6)]
    before = Before()
    fit(tmp_path / "a" / "2", before, minutes=0, epochs=1, accumulate_grad_batches=2)
    assert before.saved == [(0, 2, 1), (0, 4, 2), (1, 0, 3)]
    before = Before()
    fit(tmp_path / "a" / "3", before, minutes=0, epochs=1, val_check_interval=0.5)
    assert before.saved == [(0, 1, 1), (0, 2, 2), (0, 4, 4), (0, 5, 5), (1, 0, 6)]  # a validation follows the third
    before = Before()
    fit(tmp_path / "a" / "4", before)
    assert before.saved == [(1, 0, 6), (2, 0, 12)]


@pytest.mark.parametrize(
    ("number", "error", "at", "saved"),
    [
        (signal.SIGTERM, SIGTERMException, (1, 2), (1, 3, 9)),
        (signal.SIGINT, SystemExit, (1, 2), (1, 3, 9)),
        (signal.SIGTERM, SIGTERMException, (0, 5), (1, 0, 6)),  # the epoch, its validation and its metrics come first
    ],
)
def test_a_signal_stops_behind_the_step(tmp_path, number, error, at, saved):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    before = Before(number, at)
    try:
        with pytest.raises(error):
            fit(tmp_path / "a" / "1", before)
    finally:
        for n, handler in zip((signal.SIGINT, signal.SIGTERM), handlers, strict=True):
            signal.signal(n, handler)
    assert before.saved[-1] == saved
    assert progress(torch.load(tmp_path / "a" / "1" / "checkpoints" / "last.ckpt", weights_only=True)) == saved[:2]
    assert len([row for row in rows(tmp_path / "a" / "1") if row.get("train/loss")]) == 1


def test_signals_are_given_back():
    mine = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    heard = Interrupts()
    heard.listen()
    with pytest.raises(KeyboardInterrupt):  # nothing is to be kept yet
        os.kill(os.getpid(), signal.SIGINT)
    heard.asked, heard.training = None, True
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard.asked == signal.SIGTERM
    with pytest.raises(SystemExit) as stop:  # the second does not wait
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.value.code == 143
    heard.listen()
    heard.forget()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == mine


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_a_row_of_metrics_that_a_kill_left_out_is_written(tmp_path):
    """The checkpoint at the end of an epoch is there before the row of its training metrics is."""
    folder = tmp_path / "a" / "1"
    fit(folder)
    whole = [row for row in rows(folder) if row.get("train/loss")]
    lines = (folder / "metrics.csv").read_text().splitlines(keepends=True)
    column = lines[0].strip().split(",").index("train/loss")
    left = [line for line in lines if line.strip().split(",")[column] != whole[1]["train/loss"]]
    assert len(left) == len(lines) - 1
    (folder / "metrics.csv").write_text("".join(left))
    fit(folder, resume=folder / "checkpoints" / "last.ckpt", epochs=3)
    assert [row for row in rows(folder) if row.get("train/loss")][:2] == whole
    assert len([row for row in rows(folder) if row.get("train/loss")]) == 3  # where it is there, it is not written again
    fit(folder, resume=folder / "checkpoints" / "last.ckpt", epochs=4)
    assert len([row for row in rows(folder) if row.get("train/loss")]) == 4
    assert Path(folder / "checkpoints").is_dir()


def test_a_signal_in_the_last_batch_is_obeyed_when_all_is_saved(tmp_path):
    with pytest.raises(SIGTERMException):
        fit(tmp_path / "a" / "1", Before(signal.SIGTERM, (1, 5)))
    last = torch.load(tmp_path / "a" / "1" / "checkpoints" / "last.ckpt", weights_only=True)
    assert progress(last) == (2, 0)


def test_a_checkpoint_cannot_name_files_elsewhere_and_a_callback_elsewhere_keeps_its_place(tmp_path):
    best = ModelCheckpoint(tmp_path / "backup", "best", monitor="val/acc")
    run = tmp_path / "a" / "1"
    fit(run, best, epochs=1)
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    state = next(state for key, state in checkpoint["callbacks"].items() if key.startswith("ModelCheckpoint"))
    state["best_k_models"] = {str(tmp_path / "backup" / ".." / "precious"): torch.tensor(0.0)}
    state["kth_best_model_path"] = str(tmp_path / "precious")
    state["best_model_path"] = str(tmp_path / "backup" / "..")
    trainer = SimpleNamespace(checkpoint_callbacks=[best])
    LastCheckpoint(run / "checkpoints").on_load_checkpoint(trainer, None, checkpoint)
    inside = str(tmp_path / "backup")
    assert state["dirpath"] == inside, "so that its best ones are not forgotten"
    assert list(state["best_k_models"]) == [f"{inside}/precious"]
    assert state["kth_best_model_path"] == f"{inside}/precious"
    assert state["best_model_path"] == ""


def test_a_forked_process_that_trains_listens(tmp_path):
    signals = Interrupts()
    child = os.fork()
    if not child:
        signals.listen([signal.SIGTERM])
        signals.training = True
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0 if signals.asked == signal.SIGTERM else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
