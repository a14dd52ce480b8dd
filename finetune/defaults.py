"""What the command chooses where the user says nothing: how runs are kept, and how the trainer runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from finetune.errors import ConfigError
from finetune.hardware import best_precision


@dataclass
class RunOptions:
    """Where a run is kept and followed, and which checkpoint of it is the best.

    Args:
        name: Name of the run's folder; the recipe's name if null.
        folder: Where runs are kept: FOLDER/NAME/TIME/.
        monitor: The metric that chooses best.ckpt.
        mode: Whether more or less of the metric is better; less for a loss, more for all else, if null.
        patience: Stop after this many epochs of the last phase without a better metric; never if null.
        ema: Decay of a moving average of the weights, such as 0.999, which validation and checkpoints then see; none if null.
            It begins with the first phase that trains more than the head.
        wise_ft: How far to go from the weights at the start to the trained ones, such as 0.5; all the way if null. Validation
            and checkpoints see the weights between (WiSE-FT).
        soup: Average the weights of so many best epochs behind the run: it becomes best.ckpt where it is better, and stays
            soup.ckpt where it is not. None if null.
        seeds: Train so many times with seeds that follow each other, and print all results with their mean and spread.
        track: Where else to follow the run, with commas between: wandb, tensorboard; csv (metrics.csv) is always on. In short
            --track.
        project: Project in W&B; the environment's WANDB_PROJECT, or resnet-finetune, if null.
        entity: User or team in W&B; the account's default if null.
        group: Group of the run in W&B.
        tags: Tags of the run in W&B, such as [frozen, first].
        offline: Keep the W&B run on this machine, to be sent later with `wandb sync`.
        artifact: Keep the best checkpoint in W&B, too.
        save_every_minutes: Write last.ckpt also within an epoch, so many minutes after the one before; only at its end if null.
        on_nonfinite: What to do about a training loss that is not finite: stop, or skip the step.
        gradients_every: Measure gradients and weights stage by stage every so many steps (gradients.csv); 0 turns it off.
    """

    name: str | None = None
    folder: str = "runs"
    monitor: str = "val/acc"
    mode: Literal["max", "min"] | None = None
    patience: int | None = None
    ema: float | None = None
    wise_ft: float | None = None
    soup: int | None = None
    seeds: int = 1
    track: str | list[str] = "csv"
    project: str | None = None
    entity: str | None = None
    group: str | None = None
    tags: list[str] | None = None
    offline: bool = False
    artifact: bool = False
    save_every_minutes: float | None = 15.0
    on_nonfinite: Literal["stop", "skip"] = "stop"
    gradients_every: int = 50

    def __post_init__(self) -> None:
        if self.gradients_every < 0:
            raise ConfigError(f"Expected run.gradients_every to be 0 (off) or more, found {self.gradients_every}.")
        if self.save_every_minutes is not None and self.save_every_minutes < 0:
            raise ConfigError(f"Expected run.save_every_minutes to be 0 or more, or null, found {self.save_every_minutes}.")
        if self.soup is not None and self.soup < 2:
            raise ConfigError(f"Expected run.soup to be at least 2 epochs, found {self.soup}.")
        if self.ema is not None and self.wise_ft is not None:
            raise ConfigError("run.ema and run.wise_ft are two averages of the weights: set one of them to null.")
        if self.seeds < 1:
            raise ConfigError(f"Expected run.seeds to be at least 1, found {self.seeds}.")


def trainer_defaults() -> dict[str, Any]:
    """Return the arguments of the trainer that differ from Lightning's own defaults."""
    return {
        "max_epochs": 10,
        "precision": best_precision(),
        "enable_model_summary": False,  # the table of stages says more
        "log_every_n_steps": 10,
        "num_sanity_val_steps": 0,
    }
