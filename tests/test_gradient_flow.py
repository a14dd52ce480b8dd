"""Gradient flow through a real Trainer: against plain PyTorch, over a resume, and with what goes wrong in practice."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from PIL import Image
from tiny import TINY
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import finetune
from finetune import ConfigError, DataError, FinetuneModule, FolderDataModule, GradientFlow
from finetune.gradient_flow import COLUMNS
from finetune.main import main
from finetune.record import RunRecord
from finetune.report import content
from finetune.run_files import RunFiles

STAGES = ["stem", "layer1", "layer2", "layer3", "layer4", "head"]


class Pictures(Dataset):
    """Pictures whose class is the brightest channel."""

    def __init__(self, number, kind="uint8", bad=()):
        generator = torch.Generator().manual_seed(number)
        self.labels = torch.arange(number) % 3
        self.images = torch.randint(0, 120, (number, 3, 32, 32), generator=generator, dtype=torch.uint8)
        self.images[torch.arange(number), self.labels] += 90
        if kind != "uint8":
            self.images = self.images.float() / 255
            self.images[list(bad), 0, 0, 0] = float("nan")
        self.kind = kind

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        if self.kind == "pair":
            return self.images[index], self.labels[index]
        named = {"file": f"photos/{index:03}.tif"} if self.kind == "named" else {}
        return {"image": self.images[index], "label": self.labels[index], "index": index, **named}


def loader(number=16, batch=8, **kwargs):
    return DataLoader(Pictures(number, **kwargs), batch_size=batch)


def module(**options):
    torch.manual_seed(0)
    plain = {"backbone": "test_resnet", "num_classes": 3, "weights": "none", "schedule": "flat", "weight_decay": 0.0, "lr": 0.1}
    return FinetuneModule(**{**plain, **options})


def trainer(folder, flow, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    own = {"max_epochs": 1, "accelerator": "cpu", "callbacks": [flow], "num_sanity_val_steps": 0}
    return L.Trainer(default_root_dir=folder, **{**quiet, **own, **options})


def table(folder):
    with (folder / "gradients.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def values(folder, column):
    found = {}
    for row in table(folder):
        found.setdefault(row["stage"], []).append(float(row[column]) if row[column] else None)
    return found


# -- against plain PyTorch ----------------------------------------------------------------------------------------------------


def norm(tensors):
    return sum(float(tensor.double().square().sum()) for tensor in tensors) ** 0.5


def by_hand(model, make_optimizer, batches, accumulate, clip):
    """A plain loop; per step and stage the norm of the gradient, of the update, of the weights, and the way from the start."""
    model.train()
    members = {stage: [model.get_parameter(name) for name in names] for stage, names in model.stage_parameters().items()}
    optimizer = make_optimizer(model.parameters())
    start = {stage: [p.detach().clone() for p in own] for stage, own in members.items()}
    steps = []
    for first in range(0, len(batches), accumulate):
        optimizer.zero_grad()
        for batch in batches[first : first + accumulate]:
            images = (batch["image"].float() / 255 - model.mean) / model.std
            (F.cross_entropy(model.head(model.backbone(images).flatten(1)), batch["label"]) / accumulate).backward()
        row = {stage: {"grad_norm": norm([p.grad for p in own])} for stage, own in members.items()}
        for stage, own in members.items():
            row[stage]["dead_share"] = float(torch.cat([p.grad.flatten() == 0 for p in own]).double().mean())
        before = {stage: [p.detach().clone() for p in own] for stage, own in members.items()}
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        for stage, own in members.items():
            row[stage]["weight_norm"] = norm(before[stage])
            row[stage]["rgn"] = row[stage]["grad_norm"] / row[stage]["weight_norm"]
            update = norm([p.detach() - b for p, b in zip(own, before[stage], strict=True)])
            row[stage]["update_ratio"] = update / row[stage]["weight_norm"]
            row[stage]["distance"] = norm([b - s for b, s in zip(before[stage], start[stage], strict=True)])
        steps.append(row)
    return steps


SGD = {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9}
ADAMW = {"optimizer": "adamw", "lr": 1e-3}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("options", [SGD, ADAMW], ids=["sgd", "adamw"])
def test_every_number_is_that_of_a_plain_loop(tmp_path, options, accumulate, clip):
    model, other = module(**options), module(**options)
    trained = trainer(tmp_path, GradientFlow(tmp_path, every=1), accumulate_grad_batches=accumulate, gradient_clip_val=clip)
    trained.fit(model, loader(8 * 3 * accumulate))
    optimizers = {
        "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True),
        "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0),
    }
    batches = list(loader(8 * 3 * accumulate))
    expected = by_hand(other, optimizers[options["optimizer"]], batches, accumulate, clip)
    assert len(table(tmp_path)) == 3 * len(STAGES)
    for name in expected[0]["stem"]:
        measured = values(tmp_path, name)
        for stage in STAGES:
            assert measured[stage] == pytest.approx([step[stage][name] for step in expected], rel=1e-4, abs=1e-7), (name, stage)


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_of_mixed_precision_are_those_without_scaling(tmp_path, fused):
    for name, plugins in {
        "plain": None,
        "mixed": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", 2.0**12))],
    }.items():
        model = module(optimizer_args={"fused": fused})
        trainer(tmp_path, GradientFlow(tmp_path / name), plugins=plugins, max_steps=1).fit(model, loader())
    for column in ("grad_norm", "update_ratio"):
        plain, mixed = values(tmp_path / "plain", column), values(tmp_path / "mixed", column)
        assert all(mixed[stage] == pytest.approx(plain[stage], rel=0.05) for stage in STAGES), column


# -- which steps, which stages ------------------------------------------------------------------------------------------------


def test_steps_are_few_and_frozen_stages_are_empty(tmp_path):
    model = module(freezing="lp_ft:2", bn="auto")
    trainer(tmp_path, GradientFlow(tmp_path, every=10), max_epochs=4).fit(model, loader(8 * 12))  # 12 steps an epoch
    rows = table(tmp_path)
    steps = list(dict.fromkeys(int(row["step"]) for row in rows))
    assert steps == [0, 1, 4, 10, 20, 24, 25, 28, 30, 40]  # the second phase begins at step 24
    assert [row["stage"] for row in rows] == STAGES * len(steps)
    assert {row["epoch"] for row in rows if int(row["step"]) < 12} == {"0"}
    for row in rows:
        empty = [name for name in COLUMNS[3:] if row[name] == ""]
        assert empty == (list(COLUMNS[3:]) if int(row["step"]) < 24 and row["stage"] != "head" else [])
    assert float(next(row for row in rows if row["step"] == "24")["distance"]) == 0.0


def test_nothing_is_different_with_it(tmp_path):
    weights = []
    for callbacks in ([], [GradientFlow(tmp_path, every=1)]):
        model = module(backbone_args={"drop_rate": 0.5}, optimizer="adamw", lr=1e-3)
        trainer(tmp_path, None, callbacks=callbacks).fit(model, loader(32))
        weights.append(model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_module_of_somebody_else_is_left_alone(tmp_path):
    class Theirs(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3 * 32 * 32, 3)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.layer(batch["image"].flatten(1) / 255), batch["label"])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    trainer(tmp_path, GradientFlow(tmp_path)).fit(Theirs(), loader())
    assert list(tmp_path.glob("*")) == []


def test_other_loggers_get_the_same_values(tmp_path):
    logger = CSVLogger(tmp_path, "theirs", "1")
    trainer(tmp_path, GradientFlow(tmp_path), logger=logger).fit(module(), loader())
    with (tmp_path / "theirs" / "1" / "metrics.csv").open() as file:
        theirs = [row for row in csv.DictReader(file) if row["gradients/stem/norm"]]
    assert [float(row["gradients/stem/norm"]) for row in theirs] == pytest.approx(
        values(tmp_path, "grad_norm")["stem"], rel=1e-6
    )
    assert [row["step"] for row in theirs] == ["0", "1"]
    assert {f"gradients/head/{name}" for name in ("update_ratio", "distance", "dead_share", "nonfinite", "rgn")} <= set(
        theirs[0]
    )


def test_a_rate_that_is_none():
    with pytest.raises(ConfigError, match="1 or more, found 0"):
        GradientFlow(every=0)


# -- resume -------------------------------------------------------------------------------------------------------------------


def run(folder, resume=None):
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    flow = GradientFlow(folder, every=3)
    one = trainer(folder, flow, max_epochs=4, enable_checkpointing=True, callbacks=[flow, keep])
    one.fit(module(freezing="lp_ft:2"), loader(32), ckpt_path=resume and folder / resume, weights_only=True)


def test_a_resumed_run_writes_the_file_of_one_that_was_not(tmp_path):
    run(tmp_path)
    whole = (tmp_path / "gradients.csv").read_bytes()
    with (tmp_path / "gradients.csv").open("a", newline="") as file:
        file.write("16,4,stem,0.1")  # a line that a kill cut off
    run(tmp_path, resume="epoch=0.ckpt")
    assert (tmp_path / "gradients.csv").read_bytes() == whole
    assert values(tmp_path, "distance")["head"][-1] > 0


def test_a_start_that_is_lost_is_said_to_be_unknown(tmp_path, capsys):
    run(tmp_path)
    (tmp_path / "start.safetensors").unlink()
    capsys.readouterr()
    run(tmp_path, resume="epoch=0.ckpt")
    assert "no distances from now on" in capsys.readouterr().out
    for row in table(tmp_path):
        assert (row["distance"] == "") == (int(row["step"]) >= 4 or row["stage"] != "head")
        assert (row["grad_norm"] == "") == (int(row["step"]) < 8 and row["stage"] != "head")


# -- what goes wrong ----------------------------------------------------------------------------------------------------------


def warned(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]


def test_a_healthy_run_is_silent(tmp_path, capsys):
    for freezing in ("full", "norm", "lp_ft:1"):
        torch.manual_seed(0)
        trainer(tmp_path, GradientFlow(tmp_path, every=5), max_epochs=3).fit(module(freezing=freezing), loader(64))
    assert [line for line in warned(capsys) if "random weights" not in line] == []


class FrozenStem(nn.Module):
    """A network that comes with a frozen stem."""

    def __init__(self, num_classes=3, how="all"):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(8, num_classes)
        self.how = how
        if how == "all":
            self.stem.requires_grad_(False)

    def forward(self, x):
        x = self.stem(x)
        if self.how == "detached":
            x = x.detach()
        if self.how == "faded":  # the same values, and hardly a gradient
            x = 1e-9 * x + (x - 1e-9 * x).detach()
        return self.fc(self.body(x))


OWN_NETWORK = f"{FrozenStem.__module__}.{FrozenStem.__qualname__}"


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("all", "'stem' should train now, but requires_grad is False for all of its parameters"),
        ("detached", "'stem' should train now, but no gradient reaches it"),
        ("faded", "gradients vanish: at step 4 their norm is"),
        ("fine", None),
    ],
)
def test_a_stem_that_was_frozen_by_mistake(tmp_path, capsys, how, says):
    model = module(backbone=OWN_NETWORK, backbone_args={"how": how})
    trainer(tmp_path, GradientFlow(tmp_path), max_epochs=3).fit(model, loader())
    lines = warned(capsys)
    assert len(lines) == (says is not None)
    assert all(says in line and "stem" in line and "body" not in line for line in lines)
    shown = values(tmp_path, "grad_norm")["stem"]
    assert all(value is None for value in shown) == (how == "all")


def test_a_part_of_a_stage_that_somebody_froze_later(tmp_path, capsys):
    class Meddler(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.backbone.conv1.requires_grad_(False)

    trainer(tmp_path, None, callbacks=[Meddler(), GradientFlow(tmp_path)]).fit(module(), loader())
    (line,) = warned(capsys)
    assert "'stem' should train now" in line
    assert "(backbone.conv1" in line


def test_a_stage_that_the_optimizer_does_not_have(tmp_path, capsys):
    class Forgetful(FinetuneModule):
        def param_groups(self):
            return [group for group in super().param_groups() if group["stage"] != "stem"]

    torch.manual_seed(0)
    model = Forgetful("test_resnet", num_classes=3, weights="none")
    trainer(tmp_path, GradientFlow(tmp_path), max_epochs=2).fit(model, loader())
    (line,) = warned(capsys)
    assert "'stem' should train now, but the optimizer lacks all of its parameters" in line
    assert set(values(tmp_path, "update_ratio")["stem"]) == {0.0}


@pytest.mark.usefixtures("bundled")
def test_a_rate_that_is_too_large_is_named_and_kept_for_the_report(tmp_path, capsys):
    record = RunRecord(tmp_path)
    options = {"weights": "bundled", "optimizer": "adamw", "lr": 5.0, "lr_scale": 0.04}
    trainer(tmp_path, None, callbacks=[record, GradientFlow(tmp_path)], max_epochs=2).fit(module(**options), loader())
    told = warned(capsys)
    assert any("(learning rate 0.2)" in line and "start again with --model.lr " in line for line in told)
    assert any("the training loss of epoch" in line and "among 3 classes has 1.1" in line for line in told)
    kept = json.loads((tmp_path / "record.json").read_text())["warnings"]
    assert [f"warning: {text}" for text in kept] == [line for line in told if "random weights" not in line]
    assert content(RunFiles(tmp_path))["warnings"] == kept


def test_a_loss_of_ones_own_is_not_compared_with_guessing(tmp_path, capsys):
    class Scaled(FinetuneModule):
        def loss(self, logits, labels):
            return 100 * super().loss(logits, labels)

    torch.manual_seed(0)
    model = Scaled("test_resnet", num_classes=3, weights="none", lr=1e-6)
    assert not model.has_cross_entropy
    trainer(tmp_path, GradientFlow(tmp_path)).fit(model, loader())
    assert not any("guessing" in line for line in warned(capsys))


def test_an_exploding_learning_rate(tmp_path, capsys):
    trainer(tmp_path, GradientFlow(tmp_path), max_epochs=4).fit(module(lr=1e5), loader())
    lines = warned(capsys)
    assert "the weights explode: step 0 changed" in lines[0]
    assert all(stage in lines[0] for stage in ("stem by", "head by"))
    assert "--model.lr" in lines[0]


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("named", "photos/009.tif, photos/014.tif in training batch 1 of epoch 1"),
        ("pair", "number 1, 6, counted from 0, in training batch 1 of epoch 1"),
    ],
)
def test_a_picture_with_nan_stops_the_run_and_is_named(tmp_path, capsys, kind, says):
    flow = GradientFlow(tmp_path, every=100)
    with pytest.raises(DataError, match=r"NaN in 2 of 8 in a batch: number 1, 6 \(counted from 0\)"):
        trainer(tmp_path, flow, max_epochs=1).fit(module(), loader(24, kind=kind, bad=[9, 14]))
    (line,) = warned(capsys)
    assert line.startswith("warning: pictures hold NaN or infinite values: ")
    assert says in line


def test_a_picture_with_nan_in_the_validation_data(tmp_path, capsys):
    with pytest.raises(DataError, match="NaN in 1 of 8"):
        trainer(tmp_path, GradientFlow(tmp_path)).fit(module(), loader(), loader(16, kind="named", bad=[13]))
    (line,) = warned(capsys)
    assert "photos/013.tif in validation batch 1 of epoch 1" in line


def test_nan_that_no_check_stops_names_picture_and_stages(tmp_path, capsys):
    class Unchecked(FinetuneModule):
        def normalise(self, images):
            return images - 0.5

    torch.manual_seed(0)
    model = Unchecked("test_resnet", num_classes=3, weights="none")
    trainer(tmp_path, GradientFlow(tmp_path), max_epochs=2).fit(model, loader(16, kind="named", bad=[3]))
    first, second = warned(capsys)
    assert "photos/003.tif" in first
    assert "at step 0 gradients are NaN or infinite: stem (" in second
    assert int(table(tmp_path)[0]["nonfinite"]) > 0


def test_a_file_with_nan_is_named_by_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(6):
            pixels = generator.random((16, 16), dtype=np.float32)
            if (name, number) == ("b", 4):
                pixels[3, 3] = np.nan
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.tif")
    options = ["--model.backbone", "test_resnet", "--model.weights", "none", "--data.val_fraction", "0"]
    with pytest.raises(SystemExit):
        main(["fit", *options, "--data.root", "photos", "--data.batch_size", "4", "--trainer.max_epochs", "1"])
    assert "b/4.tif (damaged)" in capsys.readouterr().err


# -- the command --------------------------------------------------------------------------------------------------------------


def test_the_command_measures_unless_told_not_to(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "5", "--trainer.limit_val_batches", "1"]
    main(["fit", *TINY, *short])
    (run,) = (tmp_path / "runs" / "run").iterdir()
    assert [row["stage"] for row in table(run)] == STAGES * 3
    assert "gradients" not in (run / "metrics.csv").read_text()
    assert "gradients.csv" in capsys.readouterr().out
    main(["fit", *TINY, *short, "--run.gradients_every", "0", "--run.name", "off"])
    (run,) = (tmp_path / "runs" / "off").iterdir()
    assert not list(run.glob("gradients.csv")) + list(run.glob("start.safetensors"))
    with pytest.raises(SystemExit):
        main(["fit", *TINY, *short, "--run.gradients_every", "-1"])
    assert "run.gradients_every to be 0 (off) or more, found -1" in capsys.readouterr().err


def test_pictures_of_a_folder_are_named_by_their_files(tmp_path):
    from finetune.gradient_flow import names_of, not_finite

    data = FolderDataModule("digits", batch_size=4, workers=0)
    batch = {"image": torch.zeros(4, 3, 8, 8), "index": torch.tensor([5, 2, 7, 0])}
    batch["image"][1, 2, 3, 4] = float("inf")
    assert not_finite(batch) == [1]
    assert names_of(batch, [1], data, "train") == str(data.files("train")[2])
    assert names_of(batch, [0], data, "val") == str(data.files("val")[5])
    assert not_finite({"image": batch["image"].to(torch.uint8)}) == not_finite((torch.tensor(1), 2)) == not_finite(None) == []


def test_of_two_processes_one_measures(tmp_path):
    script = Path(finetune.__file__).parent.parent / "cli.py"
    options = [*TINY, "--trainer.devices", "2", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "1"]
    command = [
        sys.executable,
        str(script),
        "fit",
        *["--model", "finetune.FinetuneModule"],
        *options,
        "--trainer.limit_train_batches",
        "5",
        "--trainer.limit_val_batches",
        "1",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs" / "run").iterdir()
    assert [(row["step"], row["stage"]) for row in table(run)] == [(step, stage) for step in "014" for stage in STAGES]
