"""Distillation: both networks see the same, the loss is the one worked out by hand, and what the teacher says is kept."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.special import log_softmax

from finetune import ConfigError, DistillModule, FinetuneModule
from finetune.averaging import PhaseEMA
from finetune.main import main
from finetune.sample import digits_folder
from finetune.weight_files import sha256_of

COMMAND = [sys.executable, "-c", "from finetune.main import main; main()"]


@pytest.fixture(autouse=True)
def _working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RESNET_FINETUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture(scope="session")
def digits():
    return digits_folder()


def teacher_file(folder, seed=1):
    torch.manual_seed(seed)
    path = folder / f"teacher{seed}.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=1000).state_dict(), path)
    return path


def pictures(folder, number=12, size=(40, 40)):
    folder.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    for index in range(number):
        Image.fromarray(generator.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{index:02}.png")
    return folder


# -- the loss -----------------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_numpy_in_double_precision():
    options = {"features_weight": 0.7, "mse": 0.3, "logits_weight": 0.4, "temperature": 3.0}
    module = DistillModule(backbone="test_resnet", num_classes=5, weights="none", **options).double()
    width = module.head.in_features
    module._project_to(6)
    module.projector.double()
    generator = torch.Generator().manual_seed(0)
    found, wanted = (torch.randn(4, c, 2, 2, generator=generator, dtype=torch.float64) for c in (width, 6))
    mean, std = (torch.rand(6, generator=generator, dtype=torch.float64) + 0.5 for _ in range(2))
    module.register_buffer("feature_mean", mean, persistent=False)
    module.register_buffer("feature_std", std, persistent=False)
    teacher_head = torch.nn.Linear(6, 5).double()
    module._classify = [teacher_head]

    def linear(layer, x):
        return x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()

    a = linear(module.projector, np.moveaxis(found.numpy(), 1, -1))
    b = (np.moveaxis(wanted.numpy(), 1, -1) - mean.numpy()) / std.numpy()
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    features = (1 - cosine).mean() + 0.3 * ((a - b) ** 2).mean()
    student = log_softmax(linear(module.head, found.numpy().mean((2, 3))) / 3.0, 1)
    teacher = log_softmax(linear(teacher_head, wanted.numpy().mean((2, 3))) / 3.0, 1)
    divergence = (np.exp(teacher) * (teacher - student)).sum(1).mean()
    expected = 0.7 * features + 0.4 * 3.0**2 * divergence
    assert module.distance(found, wanted).item() == pytest.approx(expected, abs=1e-12)


def test_a_student_has_no_average_of_its_weights():
    student = DistillModule(backbone="test_resnet", num_classes=2, weights="none")
    with pytest.raises(ConfigError, match=r"Leave out --run\.ema"):
        PhaseEMA(0.9).setup(L.Trainer(max_epochs=1, logger=False, enable_checkpointing=False), student, "fit")


def test_nothing_to_learn_is_a_mistake():
    with pytest.raises(ConfigError, match="there is nothing to learn"):
        DistillModule(backbone="test_resnet", num_classes=2, weights="none", features_weight=0)


# -- whole runs ---------------------------------------------------------------------------------------------------------------


def tiny(teacher, *more):
    words = ["--model.backbone", "test_resnet", "--data.teacher_size", "32", "--data.image_size", "32", "--data.views", "2"]
    words += ["--data.batch_size", "32", "--trainer.max_epochs", "6", "--data.val_fraction", "0.1"]
    return ["distill", *words, *teacher, *more]


def start(folder, *words):
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return subprocess.Popen([*COMMAND, *words], cwd=folder, env=environment, **options)


def test_killed_and_resumed_equals_not_killed(tmp_path, digits):
    teacher = ["--data.teacher", "test_resnet", "--data.teacher_weights", str(teacher_file(tmp_path))]
    words = tiny(teacher, "--data.pictures", str(digits / "val"), "--data.workers", "1")
    with start(tmp_path / "whole", *words) as whole:
        said = whole.stdout.read()
    assert whole.returncode == 0, said
    assert "resnet-finetune predict" not in said, "a head that was not trained predicts nothing"

    with start(tmp_path / "killed", *words) as killed:
        for line in killed.stdout:
            if line.startswith("epoch 3/"):
                time.sleep(0.2)
                os.killpg(killed.pid, signal.SIGKILL)
                break
    assert killed.returncode == -signal.SIGKILL
    with start(tmp_path / "killed", "distill", "--ckpt_path", "last") as resumed:
        said = resumed.stdout.read()
    assert resumed.returncode == 0, said
    assert "epoch 6/6" in said
    assert "epoch 2/6" not in said

    (a,), (b,) = ([*(tmp_path / name).glob("runs/distill/*")] for name in ("whole", "killed"))
    states = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (a, b)]
    assert states[0]["global_step"] == states[1]["global_step"]
    assert any(name.startswith("projector.") for name in states[0]["state_dict"])
    assert all(torch.equal(value, states[1]["state_dict"][name]) for name, value in states[0]["state_dict"].items())
    assert (a / "student.safetensors").read_bytes() == (b / "student.safetensors").read_bytes()


def test_the_exported_student_is_weights_like_any_other(tmp_path, digits):
    teacher = ["--data.teacher", "test_resnet", "--data.teacher_weights", str(teacher_file(tmp_path))]
    more = ["--data.pictures", str(digits / "val"), "--data.workers", "0", "--trainer.max_epochs", "2"]
    main(tiny(teacher, *more, "--model.export_dtype", "float16"))
    (run,) = tmp_path.glob("runs/distill/*")
    card = json.loads((run / "student.json").read_text())
    assert card["sha256"] == sha256_of(run / "student.safetensors")
    assert card["bytes"] == (run / "student.safetensors").stat().st_size
    assert card["teacher"] == {"name": "test_resnet", "source": "file", "sha256": sha256_of(tmp_path / "teacher1.safetensors")}
    with (run / "metrics.csv").open() as file:
        losses = [float(row["val/loss"]) for row in csv.DictReader(file) if row.get("val/loss")]
    assert card["metrics"]["val/loss"] == pytest.approx(min(losses), abs=1e-4)
    assert card["settings"]["epochs"] == 1 + losses.index(min(losses))

    student = FinetuneModule("test_resnet", num_classes=3, weights=run / "student.safetensors")
    assert (student.weights_report.missing, student.weights_report.head) == ((), "new")
    assert student.input_spec.size == 32
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    for name, tensor in student.backbone.state_dict().items():
        stored = best[f"backbone.{name}"]
        assert torch.equal(tensor, stored.half().float() if stored.is_floating_point() else stored), name
    with pytest.raises(SystemExit):
        main(["predict", str(run), str(digits / "val")])


def test_a_student_of_a_run_of_ours_predicts_its_classes(tmp_path, digits, capsys):
    few = ["--data.workers", "0", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3"]
    main(["fit", "--model.backbone", "test_resnet", "--model.weights", "none", *few, "--run.name", "teacher"])
    (teacher,) = tmp_path.glob("runs/teacher/*")
    main(tiny(["--data.teacher", str(teacher)], "--data.pictures", str(digits / "val"), *few, "--model.logits_weight", "1"))
    (run,) = tmp_path.glob("runs/distill/*")
    card = json.loads((run / "student.json").read_text())
    assert card["class_names"] == [str(digit) for digit in range(10)]
    assert card["teacher"]["sha256"] == sha256_of(teacher / "checkpoints" / "best.ckpt")
    assert "resnet-finetune predict" in capsys.readouterr().out
    shutil.copytree(digits / "test" / "7", tmp_path / "sevens")
    main(["predict", str(run), "sevens", "--out", "p.csv", "--workers", "0"])
    with Path("p.csv").open() as file:
        labels = {row["label"] for row in csv.DictReader(file)}
    assert labels
    assert labels <= set(card["class_names"])
    student = FinetuneModule("test_resnet", num_classes=10, weights=run / "student.safetensors")
    assert student.weights_report.head == "from the weights"
