"""The command end to end, in this process, on built-in data or on a user's own classes."""

import csv
import json
import os
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny import TINY

from finetune.averaging import kind_of_average
from finetune.checkpoints import read
from finetune.main import main
from finetune.outcomes import read_outcome
from finetune.sample import digits_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*no pretrained weights.*")


@pytest.fixture(autouse=True)
def _working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])


def only_run(tmp_path, name="run"):
    (run,) = (tmp_path / "runs" / name).iterdir()
    return run


def metrics(run):
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def values(run, name):
    return [float(row[name]) for row in metrics(run) if row.get(name)]


def weights(run, kind="last"):
    return torch.load(run / "checkpoints" / f"{kind}.ckpt", weights_only=True)["state_dict"]


def test_a_run_from_folder_to_prediction(tmp_path, capsys):
    main(["fit", *TINY, "--trainer.max_epochs", "2", "--model.freezing", "lp_ft", "--run.name", "first"])
    run = only_run(tmp_path, "first")
    said = capsys.readouterr().out
    assert "1259" in said  # pictures of the training split
    assert "epoch 1 " in said
    assert "phase 2 of 2 begins" in said
    assert f"resnet-finetune predict runs/first/{run.name}" in said
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    rows = metrics(run)
    assert {"train/loss", "train/acc", "val/loss", "val/acc", "val/acc_top5", "val/acc_macro", "val/f1", "test/acc"} <= set(
        rows[0]
    )
    assert {f"lr/{stage}" for stage in ("stem", "layer1", "layer2", "layer3", "layer4", "head")} <= set(rows[0])
    assert len(values(run, "val/acc")) == 2
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["freezing"] == "lp_ft"

    # `test` finds everything in the run's folder, and predictions agree with it: the checkpoint knows size and class names
    main(["test", "--ckpt_path", str(run)])
    accuracy = values(run, "test/acc")[0]
    assert f"{accuracy:.4f}" in capsys.readouterr().out
    main(["predict", str(run), str(digits_folder() / "test"), "--out", "p.csv", "--workers", "0"])
    with (tmp_path / "p.csv").open() as file:
        right = [Path(row["file"]).parent.name == row["label"] for row in csv.DictReader(file)]
    assert len(right) == 269
    assert sum(right) / len(right) == pytest.approx(accuracy)


def test_two_runs_do_not_collide(tmp_path):
    for _ in range(2):
        main(["fit", *TINY, "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1"])
    assert len(list((tmp_path / "runs" / "run").iterdir())) == 2


def test_resume_continues_in_its_folder_with_its_history(tmp_path, capsys):
    options = [*TINY, "--model.freezing", "gradual:1", "--trainer.limit_train_batches", "3", "--data.augment", "medium"]
    main(["fit", *options, "--trainer.max_epochs", "6", "--run.name", "whole"])
    whole = only_run(tmp_path, "whole")
    assert len(values(whole, "val/acc")) == 6

    with pytest.raises(SystemExit):
        main(["fit", "--ckpt_path", "last", "--model.lr", "0.5"])
    said = capsys.readouterr().err
    assert "lr: 0.01 in the checkpoint, 0.5 now" in said

    before = {path.name: path.read_bytes() for path in whole.glob("*.*")}
    digits = yaml.safe_load((whole / "config.yaml").read_text())["data"]["init_args"]["root"]
    (tmp_path / "other").mkdir()
    for name in ("a", "b"):
        (tmp_path / "other" / name).mkdir()
        for number in range(4):
            Image.new("RGB", (8, 8)).save(tmp_path / "other" / name / f"{number}.png")
    with pytest.raises(SystemExit):
        main(["fit", "--ckpt_path", "last", "--data.root", "other"])
    assert "trained on 10 classes" in capsys.readouterr().err
    assert digits == "digits"
    assert {path.name: path.read_bytes() for path in whole.glob("*.*")} == before  # a refusal leaves no trace

    main(["fit", "--ckpt_path", "last", "--trainer.max_epochs", "7"])
    assert "6 epochs are done" in capsys.readouterr().out
    assert [run.name for run in (tmp_path / "runs").iterdir()] == ["whole"]
    assert len(list((tmp_path / "runs" / "whole").iterdir())) == 1
    assert len(values(whole, "val/acc")) == 7
    assert torch.load(whole / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 6
    main(["fit", "--ckpt_path", "last"])  # of a prolonged run
    assert "Nothing is left to train" in capsys.readouterr().out
    resumed = yaml.safe_load((whole / "config.resumed.yaml").read_text())
    assert resumed["trainer"]["max_epochs"] == 7
    assert resumed["model"] == yaml.safe_load((whole / "config.yaml").read_text())["model"]


def test_users_own_module_and_data_module(tmp_path, capsys):
    (tmp_path / "my_project.py").write_text(
        textwrap.dedent(
            """
            import lightning as L
            import torch
            from torch import nn
            from torch.utils.data import DataLoader, TensorDataset
            from finetune import FinetuneModule

            class MyModule(FinetuneModule):
                def __init__(self, width: int = 64, **options):
                    super().__init__(**options)
                    self.bottleneck = nn.Linear(self.head.in_features, width)
                    self.head = nn.Linear(width, self.hparams["num_classes"])

                def features(self, images):
                    return self.bottleneck(super().features(images)).relu()

            class MyData(L.LightningDataModule):
                num_classes = 2

                def loader(self, seed):
                    generator = torch.Generator().manual_seed(seed)
                    labels = torch.arange(48) % 2
                    images = torch.rand(48, 3, 32, 32, generator=generator) / 2 + labels.view(-1, 1, 1, 1) / 2
                    return DataLoader(TensorDataset(images, labels), batch_size=16)

                def train_dataloader(self):
                    return self.loader(0)

                def val_dataloader(self):
                    return self.loader(1)

            class Countless(MyData):
                num_classes = None
            """
        )
    )
    own = ["--model", "my_project.MyModule", "--data", "my_project.MyData", "--model.width", "8"]
    main(
        [
            "fit",
            *own,
            "--model.backbone",
            "test_resnet",
            "--model.weights",
            "none",
            "--model.lr",
            "0.1",
            "--trainer.max_epochs",
            "4",
        ]
    )
    run = only_run(tmp_path)
    assert values(run, "val/acc")[-1] > 0.9
    assert weights(run)["bottleneck.weight"].shape == (8, 96)
    capsys.readouterr()

    main(["validate", "--ckpt_path", str(run)])
    assert "val/acc" in capsys.readouterr().out

    with pytest.raises(SystemExit):
        main(["fit", "--data", "my_project.Countless", "--model.backbone", "test_resnet", "--model.weights", "none"])
    assert "Countless does not say how many classes" in capsys.readouterr().err

    with pytest.raises(SystemExit):
        main(["fit", "--model", "my_project.MyModul"])
    assert "Did you mean 'MyModule'?" in capsys.readouterr().err


THEIRS = """
import lightning as L


class Theirs(L.LightningDataModule):
    num_classes = 2

    def __init__(self, batch_size: int = 7, augment: str = "mine", val_fraction: float = 0.5):
        super().__init__()
        raise SystemExit(f"made with {batch_size} {augment} {val_fraction}")
"""


@pytest.mark.parametrize(
    ("words", "made"),
    [
        (["--data", "theirs_data.Theirs"], "7 mine 0.5"),
        (["--config", "theirs.yaml"], "7 mine 0.25"),
        (["--data.batch_size", "9", "--data", "theirs_data.Theirs"], "9 mine 0.5"),
        (["--data", "theirs_data.Theirs", "--data.batch_size", "9"], "9 mine 0.5"),
    ],
)
def test_another_class_has_its_own_defaults(tmp_path, monkeypatch, words, made):
    monkeypatch.delitem(sys.modules, "theirs_data", raising=False)  # of another working folder
    (tmp_path / "theirs_data.py").write_text(THEIRS)
    (tmp_path / "theirs.yaml").write_text("data:\n  class_path: theirs_data.Theirs\n  init_args:\n    val_fraction: 0.25\n")
    with pytest.raises(SystemExit, match=f"^made with {made}$"):
        main(["fit", *words, *TINY[:6]])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["fit", "--model.lrr", "3"], "Did you mean 'model.lr'?"),
        (["fit", "--modl.lr", "3"], "Did you mean '--model.lr'?"),
        (["fit", "--trainer.max_epoch", "3"], "Did you mean '--trainer.max_epochs'?"),
        (["fit", "--data.batchsize", "3"], "Did you mean 'data.batch_size'?"),
        (["fit", "--run.patienc", "3"], "Did you mean '--run.patience'?"),
        (["fit", "--config", "wrong_key.yaml"], "Did you mean 'model.lr'?"),
        (["fit", "--config", "smal"], "Did you mean 'small'?"),
        (["fit", "--config", "recipes/smal.yaml"], "Did you mean 'small'?"),
        (["fit", "--config", "wrong_kee.yaml"], "Did you mean 'wrong_key.yaml'?"),
        (["fit", "--model", "finetune.FinetunModule"], "Did you mean 'FinetuneModule'?"),
        (["fit", "--model", "finetun.FinetuneModule"], "Did you mean 'finetune'?"),
        (["fit", "--model.backbone", "resnt50", "--model.weights", "none"], "Did you mean 'resnet50'?"),
        (["fit", *TINY, "--model.freezing", "gradul"], "Did you mean 'gradual'?"),
        (["fit", *TINY, "--model.optimizer", "adamww"], "Did you mean 'adamw'?"),
        (["fit", *TINY, "--model.lr_scale.layr1", "0.1"], "Did you mean 'layer1'?"),
        (["fit", "--model.schedule", "cosin"], "Did you mean 'cosine'?"),
        (["fit", "--data.augment", "lite"], "Did you mean 'light'?"),
        (["fit", "--data.root", "photoz"], "Did you mean 'photos'?"),
        (["fit", *TINY[:4], "--model.weights", "weigths.pth"], "Did you mean 'weights.pth'?"),
        (["fit", "--ckpt_path", "last"], "no run with a checkpoint"),
        (["test"], "What shall be measured?"),
        (["fit", *TINY, "--trainer.strategy", "dpp"], "The trainer cannot be made"),
        (
            ["fit", *TINY, "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1", "--run.monitor", "val/f2"],
            "val/f2",
        ),
        (["fit", "--model.schedule", "step", "--model.step_milestones", "[5,8]", *TINY], "between 0 and 1"),
        (["fit", "--model.lr", "fast"], "expected float; found 'fast'"),
        (["ft"], "Did you mean 'fit'?"),
        (["predict", "nothing.ckpt", "photos"], "no checkpoint nothing.ckpt"),
        (["predict", "--topp", "3"], "Did you mean '--topk'"),
        (["recipes", "--cpy", "small", "x"], "Did you mean '--copy'?"),
        (["recipes", "--copy", "smal", "x.yaml"], "Did you mean 'small'?"),
        (["stages", "resnt18"], "Did you mean 'resnet18'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_named_without_a_traceback(tmp_path, capsys, words, says):
    (tmp_path / "photos").mkdir()
    (tmp_path / "weights.pth").write_bytes(b"")
    (tmp_path / "wrong_key.yaml").write_text("modl:\n  lr: 0.1\n")
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert says in said
    assert "Traceback" not in said


def test_patience_counts_in_the_last_phase_only(tmp_path):
    # a rate of almost nothing and no moving statistics: no metric ever improves, yet the second phase must come
    options = [
        "--model.lr",
        "1e-12",
        "--model.bn",
        "frozen",
        "--model.freezing",
        "lp_ft:4",
        "--run.patience",
        "1",
        "--trainer.max_epochs",
        "9",
    ]
    main(["fit", *TINY, *options, "--trainer.limit_train_batches", "1"])
    run = only_run(tmp_path)
    assert len(values(run, "val/acc")) == 6  # 4 of the probe, then the first of the last phase and one without improvement


def test_the_users_own_logger_is_kept_beside_ours(tmp_path):
    logger = ["--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", "theirs"]
    main(["fit", *TINY, *logger, "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1"])
    assert values(only_run(tmp_path), "val/acc")
    assert list((tmp_path / "theirs").rglob("metrics.csv"))


def test_without_weights_the_built_in_data_start_from_random_ones_loudly(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    options = [
        "--model.backbone",
        "test_resnet",
        "--data.workers",
        "0",
        "--trainer.max_epochs",
        "1",
        "--trainer.limit_train_batches",
        "1",
    ]
    main(["fit", "--config", "linear_probe", *options])
    assert "RANDOM weights" in capsys.readouterr().out
    (tmp_path / "photos" / "a").mkdir(parents=True)
    (tmp_path / "photos" / "b").mkdir()
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / name)
    with pytest.raises(SystemExit):
        main(["fit", "--config", "linear_probe", *options, "--data.root", "photos"])
    assert "--model.weights none to start from random values" in capsys.readouterr().err.replace("set ", "")


def test_a_recipes_mixture_is_for_pretrained_weights(tmp_path, capsys):
    options = ["fit", "--config", "small", *TINY[2:4], "--data.workers", "0", "--data.image_size", "32"]
    options += ["--trainer.limit_train_batches", "2", "--trainer.max_epochs"]

    def average():
        return yaml.safe_load((only_run(tmp_path, "small") / "config.yaml").read_text())["run"]["wise_ft"]

    main([*options, "1", "--model.weights", "none", "--data.batch_size", "64"])
    first = only_run(tmp_path, "small")
    assert average() is None, "random weights are nothing to stay near"
    main([*options, "2", "--model.weights", "none", "--data.batch_size", "64", "--ckpt_path", str(first)])  # the recipe says it
    assert len(values(first, "val/acc")) == 2

    (tmp_path / "runs").rename(tmp_path / "before")
    weights = str(next((tmp_path / "before").rglob("best.ckpt")))
    main([*options, "1", "--model.weights", weights])
    second = only_run(tmp_path, "small")
    assert kind_of_average(read(second / "checkpoints" / "last.ckpt")) == "wise_ft"
    main([*options, "2", "--model.weights", weights, "--ckpt_path", "last"])
    assert len(values(second, "val/acc")) == 2
    with pytest.raises(SystemExit):
        main([*options, "3", "--model.weights", weights, "--ckpt_path", "last", "--run.wise_ft", "null"])
    assert "written with run.wise_ft, and now the run is without an average" in capsys.readouterr().err

    (tmp_path / "runs").rename(tmp_path / "again")
    main([*options, "1", "--model.weights", weights, "--run.ema", "0.9"])  # takes the place of the recipe's average
    assert kind_of_average(read(only_run(tmp_path, "small") / "checkpoints" / "last.ckpt")) == "ema"


@pytest.mark.parametrize(("rate", "worse"), [("1e-12", False), ("100", True)])
def test_a_training_that_ends_below_the_head_alone_says_so(tmp_path, capsys, rate, worse):
    options = ["--model.head_init", "ridge", "--model.lr", rate, "--data.image_size", "32", "--data.shots", "20"]
    main(["fit", *TINY, *options, "--trainer.max_epochs", "1", "--model.freezing", "head"])
    said = capsys.readouterr().out
    share = float(said.partition("% of the validation pictures")[0].rpartition(" ")[2]) / 100
    best = float(said.partition("best   val/acc ")[2].split()[0])
    assert best < share - 0.01 if worse else best == pytest.approx(share, abs=1e-3)
    assert ("the recipe linear_probe suits these pictures" in said) == worse
    assert (f"--model.lr {rate} lost that. Leave the rate to the recipe" in said) == worse


def test_an_average_of_epochs_that_is_better_is_the_runs_checkpoint(tmp_path, capsys):
    """Rates that are too high leave epochs around a minimum, and their mean closer to it."""
    options = ["--data.image_size", "32", "--data.shots", "20", "--model.lr", "1", "--model.schedule", "flat"]
    options += ["--run.monitor", "val/loss", "--run.soup", "3", "--model.freezing", "head", "--model.weight_decay", "0"]
    main(["fit", *TINY, *options, "--trainer.max_epochs", "4"])
    said = capsys.readouterr().out
    run = only_run(tmp_path, "run")
    value = float(said.partition("soup   val/loss ")[2].split(",")[0])
    assert "better: it is " in said
    assert sorted(path.name for path in (run / "checkpoints").glob("*.ckpt")) == ["best.ckpt", "last.ckpt"]
    assert len(list((run / "checkpoints" / "epochs").iterdir())) == 3
    record = json.loads((run / "record.json").read_text())
    assert record["best"]["value"] == pytest.approx(value, abs=1e-4)
    assert record["best"]["average_of"] == 3
    tested = values(run, "test/loss")[0]
    for verb, name in (("validate", "val/loss"), ("test", "test/loss")):
        main([verb, "--ckpt_path", str(run)])
        again = float(capsys.readouterr().out.partition(name)[2].split()[0])
        assert again == pytest.approx(value if name == "val/loss" else tested, abs=1e-3)
    outcome = read_outcome(run / "predictions.val.csv")
    assert -np.log(outcome.probabilities[np.arange(len(outcome)), outcome.labels]).mean() == pytest.approx(value, abs=1e-3)


def test_last_is_that_of_the_named_run_and_weights_alone_are_not_resumed(tmp_path, capsys):
    short = [*TINY, "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1", "--trainer.max_epochs"]
    main(["fit", *short, "1", "--run.name", "first"])
    main(["fit", *short, "1", "--run.name", "second"])
    main(["fit", *short, "2", "--run.name", "first", "--ckpt_path", "last"])
    assert (len(values(only_run(tmp_path, "first"), "val/acc")), len(values(only_run(tmp_path, "second"), "val/acc"))) == (2, 1)
    checkpoint = torch.load(only_run(tmp_path, "first") / "checkpoints" / "last.ckpt", weights_only=True)
    del checkpoint["optimizer_states"], checkpoint["loops"]
    torch.save(checkpoint, tmp_path / "weights.ckpt")
    with pytest.raises(SystemExit):
        main(["fit", "--config", "small", *short, "2", "--ckpt_path", "weights.ckpt"])
    assert "no state of a training (loops, optimizer_states)" in capsys.readouterr().err


def test_a_resume_that_is_refused_cuts_no_metrics(tmp_path, capsys):
    data = digits_folder()
    for name in "01":
        (tmp_path / "some" / name).mkdir(parents=True)
        for path in sorted((data / "train" / name).iterdir())[:8]:
            (tmp_path / "some" / name / path.name).write_bytes(path.read_bytes())
    main(["fit", *TINY, "--data.root", "some", "--data.image_size", "32", "--trainer.max_epochs", "2"])
    run = only_run(tmp_path, "run")
    early = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    early["global_step"] = 1
    torch.save(early, run / "checkpoints" / "early.ckpt")
    before = (run / "metrics.csv").read_text()
    next((tmp_path / "some" / "0").iterdir()).write_bytes(b"no picture")
    with pytest.raises(SystemExit):
        main(["fit", "--ckpt_path", str(run / "checkpoints" / "early.ckpt"), "--trainer.max_epochs", "3"])
    assert "cannot be read" in capsys.readouterr().err
    assert (run / "metrics.csv").read_text() == before


def test_help_explains_the_options_of_model_and_data(capsys):
    main(["fit", "--help"])
    said = capsys.readouterr().out
    for option in ("--model.freezing", "--model.lr_decay", "--data.root", "--run.patience", "--trainer.max_epochs"):
        assert option in said
    assert "Factor of the learning rate per stage from the head towards the stem" in " ".join(said.split())


def test_last_is_the_last_epoch_also_when_the_best_was_the_first(tmp_path):
    # nothing is learned, so that no epoch is better than the first: regression of a last.ckpt that followed the best
    options = ["--model.lr", "1e-12", "--model.bn", "frozen", "--trainer.max_epochs", "4", "--trainer.limit_train_batches", "1"]
    main(["fit", *TINY, *options, "--run.monitor", "val/loss"])
    kept = {
        kind: torch.load(only_run(tmp_path) / "checkpoints" / f"{kind}.ckpt", weights_only=True) for kind in ("best", "last")
    }
    losses = values(only_run(tmp_path), "val/loss")
    assert kept["last"]["epoch"] == 3
    assert kept["best"]["epoch"] == losses.index(min(losses))


def test_code_in_a_checkpoint_is_not_run_by_any_verb(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harmed"),)

    torch.save({"state_dict": {}, "x": Evil()}, tmp_path / "evil.ckpt")
    for verb in ("fit", "validate", "test"):
        for more in ([], ["--weights_only", "false"]):
            with pytest.raises(SystemExit):
                main([verb, "--config", "small", *TINY, "--ckpt_path", "evil.ckpt", *more])
            assert capsys.readouterr().err.startswith("error: ")
    assert not (tmp_path / "harmed").exists()


PLAIN = """
import lightning as L
import torch


class Plain(L.LightningModule):
    def __init__(self, num_classes: int):
        super().__init__()
        self.layer = torch.nn.Linear(3, num_classes)

    def _step(self, batch, name):
        logits = self.layer(batch["image"].float().mean((2, 3)) / 255)
        loss = torch.nn.functional.cross_entropy(logits, batch["label"])
        self.log(name, loss, batch_size=len(logits))
        return loss

    def training_step(self, batch, index):
        return self._step(batch, "train/loss")

    def validation_step(self, batch, index):
        self._step(batch, "val/loss")

    def test_step(self, batch, index):
        self._step(batch, "test/loss")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
"""


def test_a_plain_lightning_module_trains_resumes_and_is_measured(tmp_path, capsys):
    (tmp_path / "plain_module.py").write_text(textwrap.dedent(PLAIN))
    common = ["--model", "plain_module.Plain", "--data.workers", "0"]
    main(["fit", *common, "--trainer.max_epochs", "1", "--run.monitor", "val/loss"])
    run = only_run(tmp_path)
    assert "resnet-finetune predict" not in capsys.readouterr().out
    main(["fit", *common, "--trainer.max_epochs", "2", "--run.monitor", "val/loss", "--ckpt_path", "last"])
    assert len(values(run, "val/loss")) == 2
    main(["test", *common, "--ckpt_path", str(run)])
    assert "test/loss" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["test", "--model", "finetune.FinetuneModule", *TINY, "--ckpt_path", str(run)])
    assert "was not written by a FinetuneModule" in capsys.readouterr().err
