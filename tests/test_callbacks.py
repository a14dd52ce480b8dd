"""What callbacks print and when they stop a run, through a real trainer with metrics that follow a script."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch.utils.data import DataLoader

from finetune.callbacks import EpochLine, PhaseEarlyStopping
from finetune.errors import ConfigError
from finetune.freezing import plan
from finetune.schedules import Schedule
from finetune.timetable import Timetable

STAGES = ("stem", "head")


class Scripted(L.LightningModule):
    """A model whose losses and accuracies are given; epoch by epoch, and the losses batch by batch too."""

    def __init__(self, accuracies, losses=(0.0, 0.0), policy=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.accuracies, self.losses = accuracies, losses
        if policy:
            phases = plan(policy, STAGES, len(accuracies))
            self.timetable = Timetable(phases, Schedule("flat", total=99), 1, 1, STAGES)

    def training_step(self, batch, batch_idx):
        loss = self.weight.sum() + self.losses[batch_idx] + self.current_epoch
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=1)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/acc", self.accuracies[self.current_epoch], batch_size=1)
        self.log("val/other", 1.0, batch_size=1)

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], 0.0)


def fit(tmp_path, model, *callbacks, validate=True, **options):
    options = {"max_epochs": len(model.accuracies), "accelerator": "cpu", **options}
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(default_root_dir=tmp_path, callbacks=list(callbacks), num_sanity_val_steps=0, **quiet, **options)
    loader = DataLoader([0.0, 1.0])
    trainer.fit(model, loader, loader if validate else None)
    return trainer.current_epoch


def test_a_line_per_epoch_with_the_means_of_the_epoch(tmp_path, capsys):
    fit(tmp_path, Scripted([0.25, 0.5], losses=(0.5, 1.0)), EpochLine())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert lines == ["epoch 1/2  train/loss 0.7500  val/acc 0.2500", "epoch 2/2  train/loss 1.7500  val/acc 0.5000"]


def test_a_line_without_validation_and_without_a_number_of_epochs(tmp_path, capsys):
    fit(tmp_path, Scripted([0.0]), EpochLine(), validate=False, max_epochs=-1, max_steps=2)
    assert "epoch 1  train/loss 0.0000\n" in capsys.readouterr().out


PLATEAU = [0.5, 0.4, 0.3, 0.2, 0.6, 0.5, 0.5, 0.5, 0.9]


@pytest.mark.parametrize(
    ("policy", "epochs"),
    [
        ("full", 3),  # 0.5 is best: worse in the second and third epoch
        ("lp_ft:4", 7),  # the first four do not count; then 0.6 is best
        ("lp_ft:8", 9),  # the last phase is too short for two bad epochs
        ([{"train": "head", "epochs": 1}, {"train": "full", "epochs": 5}, {"train": "head"}], 9),
    ],
    ids=str,
)
def test_only_the_last_phase_is_stopped(tmp_path, policy, epochs):
    stopper = PhaseEarlyStopping("val/acc", mode="max", patience=2)
    assert fit(tmp_path, Scripted(PLATEAU, policy=policy), stopper) == epochs


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_without_phases_it_is_that_of_lightning(tmp_path, patience):
    theirs = fit(tmp_path, Scripted(PLATEAU), EarlyStopping("val/acc", mode="max", patience=patience))
    assert fit(tmp_path, Scripted(PLATEAU), PhaseEarlyStopping("val/acc", mode="max", patience=patience)) == theirs


def test_patience_without_validation_is_refused_before_training(tmp_path, capsys):
    with pytest.raises(ConfigError, match="no validation pictures"):
        fit(tmp_path, Scripted([0.5, 0.5]), PhaseEarlyStopping("val/acc", mode="max"), validate=False)
    fit(tmp_path, Scripted([0.5]), EpochLine(), validate=False)
    assert "there is no best checkpoint" in capsys.readouterr().out
