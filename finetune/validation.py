"""When a run validates, and which metrics are of the weights as they are now.

Lightning's `callback_metrics` keep the values of the last validation, however long ago it was. With
`check_val_every_n_epoch` or `val_check_interval` they are of other weights than those that are about to be saved. Whoever reads
them at the end of an epoch asks `fresh_metrics`.
"""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from finetune.console import tell


class ValidationSchedule(Callback):
    """Validate at the end of a run, and of an epoch that was validated within; remember what the last validation measured.

    Checkpoints are chosen at ends of epochs. So the weights at the end of a run are always measured, whatever
    `check_val_every_n_epoch` and `max_steps` say, and an epoch that `val_check_interval` validates within is measured once more
    behind its last step, unless that was a validation anyway.
    """

    def __init__(self) -> None:
        self._epoch, self._step = -1, -1  # of the last validation
        self._names: set[str] = set()
        self._before: dict[str, Tensor] = {}
        self._asked: tuple[Any, Any] | None = None

    def fresh(self, trainer: L.Trainer) -> dict[str, Tensor]:
        """Return the metrics without those of a validation of other weights.

        Args:
            trainer: The trainer.
        """
        stale = self._names if self._step != trainer.global_step else set()
        return {
            name: value
            for name, value in trainer.callback_metrics.items()
            if name not in stale and not (name.startswith("val/") and self._step != trainer.global_step)
        }

    def may_read(self, trainer: L.Trainer, name: str | None) -> bool:
        """Say whether a metric is fresh; also if it is none of this run, once there was a validation to tell.

        Args:
            trainer: The trainer.
            name: The metric.
        """
        if name in trainer.callback_metrics:
            return name in self.fresh(trainer)
        return self._step == trainer.global_step or not has_validation(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print when validation runs, if that is not after every epoch."""
        if has_validation(trainer) and getattr(trainer, "overfit_batches", False):
            tell(pl_module, "note: trainer.overfit_batches lets training and validation see the same few images")
        elif has_validation(trainer) and (isinstance(trainer.limit_val_batches, int) or trainer.limit_val_batches < 1):
            tell(
                pl_module,
                "note: trainer.limit_val_batches leaves images out: val/ metrics are of a part, the same in every epoch",
            )
        every, epochs = trainer.check_val_every_n_epoch or 1, trainer.max_epochs or -1
        if every > 1 and epochs > 0 and epochs % every and has_validation(trainer):
            tell(pl_module, f"note: validation runs every {every} epochs, and after the last one")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Let a validation follow the last step of a run, and of an epoch that was validated within."""
        ends_epoch = trainer.is_last_batch
        ends_run = 0 <= trainer.max_steps <= trainer.global_step
        ends_run |= ends_epoch and trainer.current_epoch + 1 == trainer.max_epochs
        within = ends_epoch and self._epoch == trainer.current_epoch and self._step != trainer.global_step
        if (ends_run or within) and trainer.enable_validation and self._asked is None:
            self._asked = trainer.check_val_every_n_epoch, trainer.val_check_batch
            trainer.check_val_every_n_epoch = trainer.val_check_batch = 1
            setattr(trainer, "_last_val_time", float("-inf"))  # noqa: B010  # where the schedule goes by time

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember what was measured before, to see what this validation measures."""
        self._before = {} if trainer.sanity_checking else dict(trainer.callback_metrics)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember which weights were measured, and by which metrics."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        found = trainer.callback_metrics
        self._names |= {name for name, value in found.items() if value is not self._before.get(name)}
        self._epoch, self._step, self._before = trainer.current_epoch, trainer.global_step, {}
        self._restore(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go back to the user's schedule."""
        self._restore(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the place of the last validation, which a resume within an epoch needs."""
        return {"epoch": self._epoch, "step": self._step, "names": sorted(self._names)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it over."""
        self._epoch, self._step = state_dict["epoch"], state_dict["step"]
        self._names = set(state_dict["names"])

    def _restore(self, trainer: L.Trainer) -> None:
        if self._asked is not None:
            trainer.check_val_every_n_epoch, trainer.val_check_batch = self._asked
            self._asked = None


def schedule_of(trainer: L.Trainer) -> ValidationSchedule | None:
    """Return the `ValidationSchedule` of a trainer, if it has one."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, ValidationSchedule)), None)


def fresh_metrics(trainer: L.Trainer) -> dict[str, Tensor]:
    """Return the metrics that are of the weights as they are now, as far as a `ValidationSchedule` of the trainer knows."""
    schedule = schedule_of(trainer)
    return dict(trainer.callback_metrics) if schedule is None else schedule.fresh(trainer)


def has_validation(trainer: L.Trainer) -> bool:
    """Say whether a training validates at all; known once it has started."""
    if not trainer.enable_validation:
        return False
    if not trainer.num_val_batches:  # the first epoch is not validated, so Lightning has not asked for the data yet
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.setup_data()
        trainer.training = True
    return bool(sum(trainer.num_val_batches))


class MeasuredCheckpoint(ModelCheckpoint):
    """Keep checkpoints of epochs whose weights were measured; arguments are those of Lightning's `ModelCheckpoint`."""

    @property
    def state_key(self) -> str:
        """The key of its state in checkpoints: the one that runs had before this class was."""
        key: str = super().state_key
        return key.replace(type(self).__qualname__, "ModelCheckpoint", 1) if type(self) is MeasuredCheckpoint else key

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save, unless the metric is that of an older validation."""
        schedule = schedule_of(trainer)
        if self.monitor is None or schedule is None or schedule.may_read(trainer, self.monitor):
            super().on_train_epoch_end(trainer, pl_module)
