"""A run killed with SIGKILL in its second phase and resumed ends with the weights of one that was not, bit for bit."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

OPTIONS = [
    *["--config", "small", "--model.backbone", "test_resnet", "--model.weights", "none", "--data.workers", "2"],
    *["--model.freezing", "lp_ft:0.34", "--model.backbone_args.drop_rate", "0.2", "--model.bn", "auto"],
    *["--data.augment", "strong", "--data.batch_size", "64", "--trainer.max_epochs", "6"],
]
COMMAND = [sys.executable, "-c", "from finetune.main import main; main()", "fit"]


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


def state(folder):
    (path,) = folder.glob("runs/small/*/checkpoints/last.ckpt")
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("epoch", [4])
def test_killed_and_resumed_equals_not_killed(tmp_path, epoch):
    with start(tmp_path / "whole", *OPTIONS) as whole:
        said = whole.stdout.read()
    assert whole.returncode == 0, said

    with start(tmp_path / "killed", *OPTIONS) as killed:
        for line in killed.stdout:
            if line.startswith(f"epoch {epoch}/"):  # the second of the second phase's epochs is done, the next is under way
                time.sleep(0.3)
                os.killpg(killed.pid, signal.SIGKILL)
                break
    assert killed.returncode == -signal.SIGKILL

    with start(tmp_path / "killed", "--ckpt_path", "last") as resumed:
        said = resumed.stdout.read()
    assert resumed.returncode == 0, said
    assert "epoch 6/6" in said
    assert "epoch 3/6" not in said

    a, b = state(tmp_path / "whole"), state(tmp_path / "killed")
    assert a["epoch"] == b["epoch"] == 5
    assert a["global_step"] == b["global_step"]
    assert all(torch.equal(value, b["state_dict"][name]) for name, value in a["state_dict"].items())
    rates = [[group["lr"] for group in s["optimizer_states"][0]["param_groups"]] for s in (a, b)]
    assert rates[0] == rates[1]


def test_an_interrupted_run_says_how_to_go_on(tmp_path):
    with start(tmp_path, *OPTIONS, "--trainer.max_epochs", "200") as run:  # more than it will ever come to
        for line in run.stdout:
            if line.startswith("epoch 1/"):
                time.sleep(0.3)
                os.kill(run.pid, signal.SIGINT)
                break
        said = run.stdout.read()
    assert run.returncode != 0
    (folder,) = tmp_path.glob("runs/small/*")
    assert f"resnet-finetune fit --ckpt_path runs/small/{folder.name}" in said
    assert "Traceback" not in said
