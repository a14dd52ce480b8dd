"""Two processes against one: the same weights, every picture counted once, one folder, and a signal that all of them obey."""

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import pytest
import timm
import torch

import finetune
from finetune import ConfigError, FinetuneModule
from finetune.sample import digits_folder
from finetune.strategies import SEARCHING, choose_strategy, processes_of

PROGRAM = str(Path(finetune.__file__).parent.parent / "cli.py")
WATCH = """
import hashlib, json, os
from lightning.pytorch.callbacks import Callback

class Watch(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        digest = hashlib.sha256()
        for parameter in pl_module.parameters():
            digest.update(parameter.detach().numpy().tobytes())
        trains = sum(p.requires_grad for p in pl_module.parameters())
        with open(f"{os.environ['WATCH']}-{trainer.global_rank}", "a") as file:
            print(json.dumps([trainer.current_epoch, trains, digest.hexdigest()]), file=file)
"""
OPTIONS = ["--model.backbone", "test_resnet", "--model.freezing", "gradual:1", "--model.bn", "frozen", "--model.lr", "0.05"]
OPTIONS += ["--data.image_size", "32", "--data.workers", "0", "--trainer.accelerator", "cpu", "--run.gradients_every", "0"]
OPTIONS += ["--trainer.max_epochs", "6", "--trainer.callbacks+=watch.Watch", "--trainer.enable_progress_bar", "false"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with 160 training and 101 validation pictures, and weights to start from."""
    home = tmp_path_factory.mktemp("processes")
    digits = digits_folder()
    for split, number in (("train", 160), ("val", 101)):
        by_class = [sorted(folder.iterdir()) for folder in sorted((digits / split).iterdir())]
        for index in range(number):
            picture = by_class[index % 10][index // 10]
            target = home / "pictures" / split / picture.parent.name / picture.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(picture, target)
    (home / "watch.py").write_text(WATCH)
    (home / "sgd.yaml").write_text("model:\n  optimizer: sgd\n")  # without a configuration a recipe would be chosen
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet").state_dict(), home / "start.pth")
    return home


def start(home, name, *words, torchrun=False, **environment):
    program = [sys.executable, *(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if torchrun else [])]
    start = ["--config", "sgd.yaml", "--data.root", "pictures", "--model.weights", "start.pth", "--run.name", name]
    environment |= {**os.environ, "OMP_NUM_THREADS": "1", "WATCH": str(home / name), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [*program, PROGRAM, "fit", *OPTIONS, *start, *words],
        cwd=home,
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


def state(home, name):
    (path,) = home.glob(f"runs/{name}/*/checkpoints/last.ckpt")
    return torch.load(path, weights_only=True)["state_dict"]


def metrics(home, name):
    (path,) = home.glob(f"runs/{name}/*/metrics.csv")
    with path.open(newline="") as file:
        return [(row["val/acc"], float(row["val/loss"])) for row in csv.DictReader(file) if row.get("val/acc")]


def test_two_processes_equal_one(home):
    finish(start(home, "one", "--data.batch_size", "32"))
    finish(start(home, "two", "--data.batch_size", "16", torchrun=True))  # which says how many there are
    assert len(list(home.glob("runs/two/*"))) == 1  # the first process alone made a folder

    ranks = [[json.loads(line) for line in (home / f"two-{rank}").read_text().splitlines()] for rank in (0, 1)]
    assert ranks[0] == ranks[1]  # bit for bit after every phase
    assert len(ranks[0]) == 6
    assert sorted({trains for _, trains, _ in ranks[0]}) == [trains for _, trains, _ in ranks[0]]  # each phase trains more
    assert len({digest for *_, digest in ranks[0]}) == 6

    one, two = state(home, "one"), state(home, "two")
    furthest = max(float((one[name].double() - two[name].double()).abs().max()) for name in one)
    moved = max(
        float((one[f"backbone.{k}"] - v).abs().max()) for k, v in torch.load(home / "start.pth").items() if "fc" not in k
    )
    print(f"two processes against one: weights at most {furthest:.1e} apart, having moved by {moved:.1e}")
    assert furthest < 1e-5
    assert moved > 100 * furthest
    alone, together = metrics(home, "one"), metrics(home, "two")
    assert [accuracy for accuracy, _ in alone] == [accuracy for accuracy, _ in together]  # 101 pictures do not divide
    assert [loss for _, loss in together] == pytest.approx([loss for _, loss in alone], abs=1e-5)


def test_tasks_of_slurm_train_together(home):
    words = ["--trainer.max_epochs", "1", "--data.batch_size", "16", "--model.freezing", "full"]
    finish(start(home, "command", "--trainer.devices", "2", *words))
    shared = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
    shared |= {"SLURM_NNODES": "1", "SLURM_NODEID": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    tasks = [start(home, "tasks", *words, **shared, SLURM_PROCID=rank, SLURM_LOCALID=rank) for rank in "01"]
    said = [finish(task) for task in tasks]
    assert "srun has started 2 processes: trainer.devices 2, trainer.num_nodes 1" in said[0]
    (run,) = home.glob("runs/tasks/*")
    assert run.name.startswith("slurm-4711-")
    one, two = state(home, "command"), state(home, "tasks")
    assert all(torch.equal(one[name], two[name]) for name in one)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_signal_to_one_stops_both_with_a_checkpoint(home):
    process = start(home, "stopped", "--trainer.devices", "2", "--trainer.max_epochs", "500", "--data.batch_size", "8")
    for line in process.stdout:
        if line.startswith("epoch 2/"):
            time.sleep(0.2)
            os.kill(process.pid, signal.SIGTERM)
            break
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 143, said
    (run,) = home.glob("runs/stopped/*")
    assert f"resnet-finetune fit --ckpt_path runs/stopped/{run.name}" in said
    assert said.count("Stopped") == 1
    assert "Traceback" not in said
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] > 20


# -- which strategy ---------------------------------------------------------------------------------------------------------


def module(freezing, kind=FinetuneModule):
    return kind("test_resnet", num_classes=3, weights="none", freezing=freezing)


class Branching(FinetuneModule):
    @property
    def has_unused_parameters(self):
        return True


THAWING = ["gradual", "lp_ft", [{"train": ["head"], "epochs": 1}, {"train": "full"}]]
STEADY = ["full", "head", "last:2", "surgical:layer1", "norm", [{"train": "full"}]]


@pytest.mark.parametrize("policy", THAWING)
def test_policies_that_thaw_search(policy):
    assert choose_strategy("auto", module(policy), 2) == SEARCHING
    assert choose_strategy("auto", module(policy), 1) == "auto"
    assert choose_strategy("ddp", module(policy), 2) == "ddp"  # refused later, by name


@pytest.mark.parametrize("policy", STEADY)
def test_policies_that_stay_do_not(policy):
    assert choose_strategy("auto", module(policy), 2) == "auto"
    assert choose_strategy("auto", module(policy, Branching), 2) == SEARCHING
    assert choose_strategy("auto", L.LightningModule(), 2) == "auto"


@pytest.mark.parametrize("strategy", ["ddp", "auto"])
def test_a_wrong_strategy_in_python_is_refused_before_training(strategy):
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_epochs=8, logger=False, enable_checkpointing=False)
    model = module("gradual")
    model.trainer = trainer
    with pytest.raises(ConfigError, match=rf"freezing gradual .*Expected Trainer\(strategy='{SEARCHING}'\), found DDPStrategy"):
        model.setup("fit")
    model = module("full")
    model.trainer = trainer
    model.setup("fit")
    right = L.Trainer(accelerator="cpu", devices=2, strategy=SEARCHING, max_epochs=8, logger=False, enable_checkpointing=False)
    model = module("gradual")
    model.trainer = right
    model.setup("fit")


@pytest.mark.parametrize(("accelerator", "number"), [("cpu", 1), ("mps", 1), ("gpu", 8), ("auto", 8)])
def test_devices_of_another_accelerator_do_not_count(monkeypatch, accelerator, number):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert processes_of({"devices": "auto", "accelerator": accelerator, "num_nodes": 2}) == 2 * number
