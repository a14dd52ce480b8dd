"""Callbacks that watch a run: a line per epoch, and early stopping that knows the phases."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, EarlyStopping

from finetune.console import tell
from finetune.errors import ConfigError
from finetune.freezing import phase_at
from finetune.timetable import Timetable
from finetune.validation import fresh_metrics, has_validation, schedule_of


class EpochLine(Callback):
    """Print one line per epoch with the metrics that matter."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say so if nothing will be measured."""
        if not has_validation(trainer):
            tell(pl_module, "note: without validation there is no best checkpoint; last.ckpt is kept")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the line."""
        metrics = fresh_metrics(trainer)
        names = ("train/loss", "val/loss", "val/acc", "val/acc_macro", "target/infomax", "oracle/target_acc")
        shown = [(name, metrics[name]) for name in names if name in metrics]
        values = "  ".join(f"{name} {float(value):.4f}" for name, value in shown)
        of = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
        tell(pl_module, f"epoch {trainer.current_epoch + 1}{of}  {values}")


class PhaseEarlyStopping(EarlyStopping):
    """Stop when the monitored metric no longer improves, but only in the last freezing phase.

    A plateau of the linear probe is the sign to go on with the next phase, not to stop. Patience counts the epochs in which the
    metric was measured. Arguments are those of Lightning's `EarlyStopping`.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Look at ends of epochs, where it is known whether the metric is fresh; elsewhere behind each validation."""
        super().setup(trainer, pl_module, stage)
        if schedule_of(trainer) is not None:
            self._check_on_train_epoch_end = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make sure that there is something to watch.

        Raises:
            ConfigError: If a metric of the validation is asked for, and there is none.
        """
        if str(self.monitor).startswith("val/") and not has_validation(trainer):
            if trainer.limit_val_batches == 0:
                reason, remedy = "trainer.limit_val_batches is 0", "Set it above 0"
            else:
                reason, remedy = "there are no validation pictures", "Give some (data.val_fraction, or a folder val)"
            raise ConfigError(
                f"run.patience waits for {self.monitor} to improve, but {reason}. {remedy}, or leave run.patience out."
            )

    def _run_early_stopping_check(self, trainer: L.Trainer) -> None:
        rates: Any = getattr(trainer.lightning_module, "timetable", None)
        if isinstance(rates, Timetable) and phase_at(rates.phases, trainer.current_epoch) != rates.phases[-1]:
            return
        if (schedule := schedule_of(trainer)) is not None and not schedule.may_read(trainer, self.monitor):
            return  # it was not measured in this epoch
        super()._run_early_stopping_check(trainer)
