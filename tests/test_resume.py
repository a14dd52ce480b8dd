"""A run that is killed or stopped anywhere and resumed ends with the weights and metrics of one that was not, bit for bit."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import finetune

OPTIONS = [
    *["--config", "small", "--model.backbone", "test_resnet", "--model.weights", "none", "--data.workers", "2"],
    *["--model.freezing", "lp_ft:0.34", "--model.backbone_args.drop_rate", "0.2", "--model.bn", "auto", "--model.mixup", "0.2"],
    *["--data.augment", "strong", "--data.batch_size", "32", "--data.image_size", "32", "--trainer.max_epochs", "4"],
    *["--run.ema", "0.9", "--run.save_every_minutes", "0.002", "--trainer.accelerator", "cpu"],
]
COMMAND = [sys.executable, str(Path(finetune.__file__).parent.parent / "cli.py"), "fit"]
PARTS = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers")
STEPS = 39  # of an epoch
ENDS = {"KILL": -signal.SIGKILL, "TERM": 143}


def start(folder, *words):
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [*COMMAND, *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process):
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0, said
    return said


def end(process, folder, epoch, how):
    """Let a signal end all processes of a run within the epoch behind this one, when that has a checkpoint."""
    for line in process.stdout:
        if line.startswith(f"epoch {epoch}/"):
            break
    while state(folder)["global_step"] <= STEPS * epoch:
        time.sleep(0.01)
    os.killpg(process.pid, getattr(signal, f"SIG{how}"))
    return process.communicate(timeout=120)[0]


def state(folder):
    (path,) = folder.glob("runs/small/*/checkpoints/last.ckpt")
    return torch.load(path, weights_only=True)


def metrics(folder, kind):
    (path,) = folder.glob("runs/small/*/metrics.csv")
    with path.open(newline="") as file:
        rows = [{name: value for name, value in row.items() if name.startswith(kind) and value} for row in csv.DictReader(file)]
    return [row for row in rows if row]


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(start(folder, *OPTIONS))
    return folder


@pytest.mark.parametrize(("how", "epoch"), [("KILL", 2), ("TERM", 1)])
def test_ended_and_resumed_equals_not_ended(tmp_path, whole, how, epoch):
    stopped = start(tmp_path, *OPTIONS)
    said = end(stopped, tmp_path, epoch, how)
    assert stopped.returncode == ENDS[how], said
    (run,) = tmp_path.glob("runs/small/*")
    kept = state(tmp_path)
    done = kept["global_step"] - STEPS * epoch
    assert 0 < done < STEPS  # it was written within an epoch
    if how == "TERM":
        assert f"resnet-finetune fit --ckpt_path runs/small/{run.name}" in said
        assert "Traceback" not in said

    said = finish(start(tmp_path, "--ckpt_path", "last"))
    assert f"{epoch} epoch{'s' * (epoch > 1)} and {done} batch" in said
    assert "epoch 4/4" in said
    assert f"epoch {epoch}/4" not in said
    a, b = state(whole), state(tmp_path)
    assert (a["epoch"], a["global_step"]) == (b["epoch"], b["global_step"]) == (3, 4 * STEPS)
    for part in PARTS:
        assert same(a[part], b[part]), part
    assert len(metrics(whole, "val/")) == 4
    assert metrics(whole, "val/") == metrics(tmp_path, "val/")
    assert metrics(whole, "train/")[epoch + 1 :] == metrics(tmp_path, "train/")[epoch + 1 :]


def test_ctrl_c_says_how_to_go_on(tmp_path):
    run = start(tmp_path, *OPTIONS, "--trainer.max_epochs", "200")  # more than it will ever come to
    said = end(run, tmp_path, 1, "INT")
    assert run.returncode == 130, said
    (folder,) = tmp_path.glob("runs/small/*")
    assert "Stopping after this step" in said
    assert f"resnet-finetune fit --ckpt_path runs/small/{folder.name}" in said
    assert "Traceback" not in said
    assert state(tmp_path)["global_step"] > STEPS
