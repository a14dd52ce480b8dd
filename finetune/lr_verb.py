"""The verb `lr-find`: the options of `fit`, and instead of a training the learning-rate range test."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import lightning as L

from finetune import progress, training
from finetune.arguments import without
from finetune.console import say
from finetune.errors import ConfigError
from finetune.lr_find import FEWEST, STEPS, LearningRateSweep, write_curve
from finetune.module import FinetuneModule
from finetune.runs import new_run
from finetune.strategies import choose_strategy, processes_of
from finetune.training_cli import FinetuneCLI


class LearningRateCLI(FinetuneCLI):
    """Build what `fit` would build, but for everything that keeps a run, and sweep the learning rate."""

    def before_instantiate_classes(self) -> None:
        """Refuse what makes no sweep, and sweep once where `fit` would train several times."""
        config = self.config[self.subcommand]
        if config.get("ckpt_path"):
            raise ConfigError("lr-find starts a run, it goes on with none. For trained weights: --model.weights CHECKPOINT.")
        if config.trainer.fast_dev_run or 0 < (config.trainer.max_steps or -1) < FEWEST:
            raise ConfigError(
                f"lr-find needs at least {FEWEST} steps: set trainer.max_steps to {STEPS}, and leave out fast_dev_run."
            )
        config.run.seeds = 1
        data = config.data.get("init_args") or {}
        if data.get("folds") and data.get("fold") is None:
            data["fold"] = 1
        if "reuse" in data:
            data["reuse"] = "off"  # a sweep passes over few pictures, once
        super().before_instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Build a trainer that keeps nothing; `--trainer.max_steps` is the number of steps of the sweep."""
        if not isinstance(self.model, FinetuneModule):
            raise ConfigError(f"lr-find sweeps the stages of a FinetuneModule, found {type(self.model).__name__}.")
        config = {**self._get(self.config_init, "trainer"), **kwargs}
        steps = config["max_steps"] if config["max_steps"] > 0 else STEPS
        self.run_folder, self.save_config_callback = None, None
        wanted = progress.wanted() if config["enable_progress_bar"] is None else config["enable_progress_bar"]
        self.sweep = LearningRateSweep(steps, bar=wanted)
        config |= {"max_steps": -1, "logger": False, "enable_checkpointing": False, "limit_val_batches": 0}
        config["enable_progress_bar"] = False  # its epochs mean nothing here
        config["strategy"] = choose_strategy(config["strategy"], self.model, processes_of(config))
        return self._instantiate_trainer(config, [self.sweep])

    def fit(self, **kwargs: Any) -> None:
        """Sweep, write the curve and say what was found."""
        self.trainer.fit(**kwargs)
        if not self.trainer.is_global_zero:
            return
        curve = self.sweep.curve
        found = curve.suggestion()
        options = self._get(self.config_init, "run")
        folder = new_run(Path(options.folder), "lr_find")
        paths = write_curve(curve, found, folder)
        words = ["fit", *without(self.command[2:], "--trainer.max_steps"), "--model.lr", f"{found:.2g}"]
        say(f"\nlr     {found:.2g} is suggested for the head; it was {self.model.hparams['lr']:.2g}")
        say(f"curve  {', '.join(str(path) for path in paths)}")
        say(f"next   resnet-finetune {shlex.join(words)}")


def run(words: list[str]) -> None:
    """Run the verb with its options."""
    training.run(["fit", *words], called="lr-find", cli=LearningRateCLI)
