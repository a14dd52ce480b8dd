"""Callbacks that watch a run: a line per epoch, and early stopping that knows the phases."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, EarlyStopping

from finetune.console import tell
from finetune.errors import ConfigError
from finetune.freezing import phase_at
from finetune.timetable import Timetable


def has_validation(trainer: L.Trainer) -> bool:
    """Say whether a training validates; known once it has started."""
    return bool(trainer.enable_validation and sum(trainer.num_val_batches))


class EpochLine(Callback):
    """Print one line per epoch with the metrics that matter."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say so if nothing will be measured."""
        if not has_validation(trainer):
            tell(pl_module, "note: without validation there is no best checkpoint; last.ckpt is kept")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the line."""
        shown = [
            (name, trainer.callback_metrics[name])
            for name in ("train/loss", "val/loss", "val/acc", "val/acc_macro", "target/infomax", "oracle/target_acc")
            if name in trainer.callback_metrics
        ]
        values = "  ".join(f"{name} {float(value):.4f}" for name, value in shown)
        of = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
        tell(pl_module, f"epoch {trainer.current_epoch + 1}{of}  {values}")


class PhaseEarlyStopping(EarlyStopping):
    """Stop when the monitored metric no longer improves, but only in the last freezing phase.

    A plateau of the linear probe is the sign to go on with the next phase, not to stop. Arguments are those of Lightning's
    `EarlyStopping`.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make sure that there is something to watch.

        Raises:
            ConfigError: If a metric of the validation is asked for, and there is none.
        """
        if str(self.monitor).startswith("val/") and not has_validation(trainer):
            raise ConfigError(
                f"run.patience waits for {self.monitor} to improve, but there are no validation pictures. Give some "
                "(data.val_fraction, or a folder val), or leave run.patience out."
            )

    def _run_early_stopping_check(self, trainer: L.Trainer) -> None:
        rates: Any = getattr(trainer.lightning_module, "timetable", None)
        if isinstance(rates, Timetable) and phase_at(rates.phases, trainer.current_epoch) != rates.phases[-1]:
            return
        super()._run_early_stopping_check(trainer)
