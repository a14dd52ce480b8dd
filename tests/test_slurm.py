"""A job of SLURM that is requeued: the signal keeps a checkpoint and hands the job back, and the same words go on with it."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import torch

import finetune
from finetune.slurm import job_folder, requeued_checkpoint

PROGRAM = str(Path(finetune.__file__).parent.parent / "cli.py")
FIT = [sys.executable, PROGRAM, "fit", "--model.backbone", "test_resnet", "--model.weights", "none", "--data.image_size", "32"]
FIT += ["--data.workers", "0", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "3", "--config", "job.yaml"]
FIT += ["--trainer.enable_progress_bar", "false"]
JOB = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
JOB |= {"SLURM_NODEID": "0", "SLURM_NODELIST": "localhost"}
SCONTROL = '#!/bin/sh\necho "$@" > {told}\nkill -9 $PPID\n'  # what takes the job away comes soon after


def start(folder, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **variables}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    folder.mkdir(exist_ok=True)
    (folder / "job.yaml").write_text("data:\n  batch_size: 32\n")
    return subprocess.Popen(FIT, cwd=folder, env=environment, **options)


def weights(folder):
    (path,) = folder.glob("runs/job/*/checkpoints/last.ckpt")
    return torch.load(path, weights_only=True)["state_dict"]


def test_a_requeued_job_goes_on(tmp_path):
    told, scontrol = tmp_path / "told", tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(SCONTROL.format(told=told))
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IEXEC)
    job = {**JOB, "PATH": f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}"}

    whole = start(tmp_path / "whole")
    first = start(tmp_path / "job", **job)
    for line in first.stdout:
        if line.startswith("epoch 1/"):
            time.sleep(0.2)
            first.send_signal(signal.SIGTERM)  # SLURM's warning comes with both; this one alone does nothing
            first.send_signal(signal.SIGUSR1)
            break
    said = first.communicate(timeout=120)[0]
    assert first.returncode == -signal.SIGKILL, said
    assert told.read_text() == "requeue 4711\n"
    (run,) = tmp_path.glob("job/runs/job/*")
    assert run.name.startswith("slurm-4711-")
    kept = torch.load(run / "hpc_ckpt_1.ckpt", weights_only=True)
    assert 39 < kept["global_step"] < 78

    again = start(tmp_path / "job", **job, SLURM_RESTART_COUNT="1")
    said = again.communicate(timeout=120)[0]
    assert again.returncode == 0, said
    assert f"hpc_ckpt_1.ckpt: 1 epoch and {kept['global_step'] - 39} batch" in said
    assert "epoch 1/3" not in said
    said = whole.communicate(timeout=120)[0]
    assert whole.returncode == 0, said
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "job")
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_the_folder_of_a_job(tmp_path, monkeypatch):
    words = ["resnet-finetune", "fit", "--config", "small"]
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    assert job_folder(tmp_path, words) is None
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    folder = job_folder(tmp_path, words)
    assert folder.parent == tmp_path
    assert folder == job_folder(tmp_path, words)  # on every task alike
    assert folder != job_folder(tmp_path, [*words, "--model.lr", "1"])  # a script may train twice
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5000")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert job_folder(tmp_path, words).name.startswith("slurm-5000_3-")
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    assert job_folder(tmp_path, words) is None


def test_only_a_requeued_job_goes_on_by_itself(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    for age, name in enumerate(["checkpoints/last.ckpt", "hpc_ckpt_1.ckpt", "checkpoints/best.ckpt"]):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1e9 + age, 1e9 + age))
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    assert requeued_checkpoint(tmp_path) is None
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert requeued_checkpoint(tmp_path) == tmp_path / "hpc_ckpt_1.ckpt"
    assert requeued_checkpoint(tmp_path / "new") is None
    assert requeued_checkpoint(None) is None


def test_a_start_that_left_no_checkpoint_does_not_hide_the_next(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    first, second = tmp_path / "slurm-1-abcd", tmp_path / "slurm-1-abcd-2"
    first.mkdir()
    (second / "checkpoints").mkdir(parents=True)
    (second / "checkpoints" / "last.ckpt").touch()
    assert requeued_checkpoint(first) == second / "checkpoints" / "last.ckpt"
