"""The progress bar on a real terminal, and the silence where nobody looks."""

import os
import re
import struct
import subprocess
import sys
import threading
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from tqdm import tqdm

from finetune.progress import Bar

pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))  # not on Windows

COMMAND = [sys.executable, "-c", "from finetune.main import main; main()", "fit"]
OPTIONS = [
    *["--model", "finetune.FinetuneModule"],
    *["--model.backbone", "test_resnet", "--model.weights", "none", "--model.freezing", "lp_ft:1", "--data.workers", "0"],
    *["--data.batch_size", "16", "--data.image_size", "64", "--trainer.max_epochs", "2", "--trainer.limit_train_batches", "12"],
]
BAR = re.compile(r"epoch [12]/2: +\d+%\|")


def environment(**more):
    kept = {name: value for name, value in os.environ.items() if name not in ("CI", "TERM")}
    return {**kept, "TERM": "xterm", "OMP_NUM_THREADS": "1", **more}


def run(folder, errors, **more):
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [*COMMAND, *OPTIONS], cwd=folder, env=environment(**more), stdout=subprocess.PIPE, stderr=errors, text=True
    )


def on_a_terminal(folder, **more):
    """Run with stderr on a terminal and stdout in a pipe, as with `| tee log`; return what came out of both."""
    terminal, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))  # without a width there is no bar
    shown = []

    def read():
        while True:
            try:
                piece = os.read(terminal, 4096)
            except OSError:  # how Linux says that the other end is closed
                return
            if not piece:
                return
            shown.append(piece)

    with run(folder, theirs, **more) as process:
        os.close(theirs)
        reader = threading.Thread(target=read)
        reader.start()
        lines = process.stdout.read()
    reader.join()
    os.close(terminal)
    assert process.returncode == 0, b"".join(shown).decode()
    return lines, b"".join(shown).decode()


def test_a_terminal_shows_a_bar_and_the_pipe_gets_lines(tmp_path):
    lines, shown = on_a_terminal(tmp_path)
    assert BAR.search(shown)
    assert re.search(r"loss \d\.\d+, lr 0\.\d+", shown)
    assert re.search(r"val/acc 0\.\d+", shown)
    assert "validation:" in shown
    assert "test:" in shown
    assert "%|" not in lines
    assert "\r" not in lines
    parts = [
        "phase 2 of 2 begins",
        "epoch 2/2  train/loss",
        "best   val/acc",
        "time   ",
        "test/acc",
        "open   runs/run/",
        "files  runs/run/",
        "next   ",
    ]
    assert [part for part in parts if part not in lines] == []
    assert sorted(parts, key=lines.index) == parts
    assert re.search(r"best   val/acc 0\.\d{4} in epoch [12] \(runs/run/", lines)


@pytest.mark.parametrize("where", ["pipe", "build"])
def test_nobody_looks(tmp_path, where):
    if where == "build":  # some of them have a terminal
        lines, shown = on_a_terminal(tmp_path, CI="true")
    else:
        with run(tmp_path, subprocess.PIPE) as process:
            lines, shown = process.communicate()
    assert not BAR.search(lines + shown)
    assert "\r" not in lines
    assert "\r" not in shown.replace("\r\n", "")
    assert "%|" not in shown
    assert "epoch 2/2  train/loss" in lines


class Counting(L.LightningModule):
    """A module of somebody else, whose step returns the bare loss."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        self.log("mine", 0.25, prog_bar=True)
        return self.weight.sum() + 0.125

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], 0.0)


def fit(folder, **options):
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        callbacks=[Bar(), keep],
        enable_model_summary=False,
        default_root_dir=folder,
    )
    loader = DataLoader(range(6))
    trainer.fit(Counting(), loader, loader, weights_only=True, **options)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_bar_for_any_module_also_from_the_middle_of_an_epoch(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("finetune.progress.tqdm", partial(tqdm, mininterval=0, ncols=150))  # every step is drawn
    fit(tmp_path)
    whole = capsys.readouterr()
    assert whole.out == ""
    assert "epoch 1/2:  50%|" in whole.err
    assert "loss 0.125, lr 0, mine 0.25" in whole.err
    assert "validation: 100%|" in whole.err
    fit(tmp_path, ckpt_path=tmp_path / "step=4.ckpt")
    rest = capsys.readouterr().err
    assert "epoch 1/2:  83%|" in rest  # the fifth batch of six
    assert "epoch 1/2:  50%|" not in rest
    assert "epoch 2/2: 100%|" in rest
