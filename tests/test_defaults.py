"""What the command chooses, against Lightning's own signature and against the configuration that a run writes."""

import dataclasses
import inspect
import sys

import lightning as L
import yaml

from finetune.defaults import RunOptions, trainer_defaults
from finetune.main import main


def test_each_is_an_argument_of_the_trainer_with_another_default():
    theirs = inspect.signature(L.Trainer.__init__).parameters
    assert all(theirs[name].default != value for name, value in trainer_defaults().items())


def test_a_run_without_options_is_configured_by_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    small = ["--model.backbone", "test_resnet", "--model.weights", "none", "--data.workers", "0"]
    main(
        [
            "fit",
            "--model",
            "finetune.FinetuneModule",
            *small,
            "--trainer.limit_train_batches",
            "1",
            "--trainer.limit_val_batches",
            "1",
            "--trainer.max_epochs",
            "1",
        ]
    )
    (run,) = tmp_path.glob("runs/run/*")
    config = yaml.safe_load((run / "config.yaml").read_text())
    expected = trainer_defaults() | {"max_epochs": 1}
    assert {name: config["trainer"][name] for name in expected} == expected
    assert config["run"] == dataclasses.asdict(RunOptions())
