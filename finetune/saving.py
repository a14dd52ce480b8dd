"""Keeping `last.ckpt`: at the end of every epoch, every few minutes, and when a run is asked to stop.

Within an epoch a checkpoint is written only where a resumed run can go on exactly: after a step of the optimizer that neither
ends the epoch nor is followed by a validation.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, WeightAveraging
from lightning.pytorch.utilities.exceptions import SIGTERMException

from finetune.averaging import WiseFT
from finetune.errors import CheckpointError
from finetune.interrupts import STOPS, Interrupts
from finetune.room import require_room, tensor_bytes
from finetune.runs import RunLogger

LAST = "last.ckpt"


class LastCheckpoint(Checkpoint):
    """Write the last checkpoint of a run, and stop between two steps when a signal asks for it.

    Args:
        folder: The folder of the run's checkpoints.
        every_minutes: How long after a checkpoint the next is written within an epoch; only at ends of epochs if null.
        beside: How many other checkpoints the folder will hold.

    Attributes:
        interrupts: The signals that came.
    """

    def __init__(self, folder: Path, every_minutes: float | None = None, beside: int = 1) -> None:
        self.path = folder.absolute() / LAST
        self.every = None if every_minutes is None else 60 * every_minutes
        self.beside = beside
        self.interrupts = Interrupts()
        self._saved_at, self._step = time.monotonic(), 0
        self._row: dict[str, float] = {}

    # ------------------------------------------------------------------------------------------------- hooks of Lightning

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Listen before processes that read pictures are started, which inherit it."""
        if stage == "fit":
            self.path = Path(trainer.strategy.broadcast(str(self.path)))  # of the first process, which chose the run's folder
            self.interrupts.listen(self._signals(trainer))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make sure that there is room, on all processes alike."""
        fault = self._lack_of_room(trainer) if trainer.is_global_zero else None
        fault = trainer.strategy.broadcast(fault)
        if fault:
            raise CheckpointError(fault)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen again: Lightning took over SIGTERM in the meantime."""
        self.interrupts.listen(self._signals(trainer))
        self.interrupts.training = True
        self._saved_at, self._step = time.monotonic(), trainer.global_step
        for logger in trainer.loggers if self._row and trainer.is_global_zero else []:
            if isinstance(logger, RunLogger):
                logger.complete(self._row)
        self._row = {}

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Obey a signal that came towards the end of the last epoch, whose checkpoint and metrics are written."""
        if asked := self._agreed(trainer)[0]:
            self._obey(trainer, asked)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Save if it is time to, or if the run is to stop."""
        stepped, self._step = trainer.global_step > self._step, trainer.global_step
        asked, due = self._agreed(trainer)
        if (asked or due) and stepped and not trainer.is_last_batch and not _validates_now(trainer):
            self._save(trainer)
            if asked:
                self._obey(trainer, asked)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save at the end of an epoch, with the row of metrics that is written next: a kill may come between the two."""
        metrics = trainer._logger_connector.metrics["log"]
        self._row = {name: float(value) for name, value in metrics.items()} | {"epoch": trainer.current_epoch}
        self._row["step"] = trainer.fit_loop.epoch_loop._batches_that_stepped - 1
        self._save(trainer)
        self._row = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the row of metrics that belongs to the end of an epoch."""
        return {"row": dict(self._row)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the row."""
        row = state_dict.get("row")
        numbers = isinstance(row, Mapping) and all(type(value) in (int, float) for value in row.values())
        self._row = {str(name): value for name, value in row.items()} if isinstance(row, Mapping) and numbers else {}

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save if a signal came that also ended the processes which read pictures, so that the next step never began."""
        if self.interrupts.asked and isinstance(exception, Exception) and trainer.world_size == 1 and _between_steps(trainer):
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Obey a signal that came towards the end of the run."""
        asked = self._agreed(trainer)[0]
        if asked in STOPS:
            self._obey(trainer, asked)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the signals back."""
        self.interrupts.forget()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let the checkpoints of a run whose folder was moved be where they are now."""
        now = self.path.parent
        own = {str(callback.dirpath) for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)}
        for state in checkpoint.get("callbacks", {}).values():
            before = state.get("dirpath") if isinstance(state, Mapping) else None
            if not isinstance(before, str):
                continue
            inside = Path(before).parent.name == now.name  # a folder within that of the checkpoints
            _move(state, before if before in own else str(now / Path(before).name if inside else now))

    # ------------------------------------------------------------------------------------------------------------ private

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self._saved_at = time.monotonic()

    def _lack_of_room(self, trainer: L.Trainer) -> str | None:
        there = len(list(self.path.parent.rglob("*.ckpt")))
        try:  # all that it will hold, and one that is being written while its predecessor is still there
            require_room(self.path.parent, checkpoint_bytes(trainer), max(1, 2 + self.beside - there))
        except CheckpointError as error:
            return str(error)
        return None

    def _agreed(self, trainer: L.Trainer) -> tuple[int, bool]:
        """Return the signal that came to any of the processes, or 0, and whether it is time for a checkpoint."""
        asked = self.interrupts.asked or 0
        due = int(self.every is not None and time.monotonic() - self._saved_at >= self.every)
        if trainer.world_size > 1:
            mine = torch.tensor([asked, due * trainer.is_global_zero], device=trainer.strategy.root_device)
            asked, due = (int(value) for value in trainer.strategy.reduce(mine, reduce_op="max"))
        return asked, bool(due)

    def _obey(self, trainer: L.Trainer, asked: int) -> None:
        """Do what a signal asks for: hand the job back to SLURM, or stop."""
        self.interrupts.asked = None if asked not in STOPS else asked
        if asked == signal.SIGINT:
            raise KeyboardInterrupt
        if asked == signal.SIGTERM:
            raise SIGTERMException
        trainer._signal_connector._slurm_sigusr_handler_fn(asked, None)  # type: ignore[arg-type]

    @staticmethod
    def _signals(trainer: L.Trainer) -> list[int]:
        """Return the signals to listen to: where Lightning requeues jobs, the one for it, as SIGTERM comes along with it."""
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            return [signal.SIGINT, environment.requeue_signal or signal.SIGUSR1]
        return list(STOPS)


def _validates_now(trainer: L.Trainer) -> bool:
    """Say whether a validation follows this batch."""
    loop = trainer.fit_loop
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))  # type: ignore[arg-type]


def _between_steps(trainer: L.Trainer) -> bool:
    loop = trainer.fit_loop.epoch_loop
    done = loop.batch_progress.current
    window = max(1, trainer.accumulate_grad_batches)
    return trainer.training and 0 < done.ready == done.completed and done.completed % window == 0 and not trainer.is_last_batch


def _move(state: Any, now: str) -> None:
    """Let all files that a callback keeps lie in one folder, whatever a checkpoint says: it deletes those that are worse."""

    def moved(path: str) -> str:
        name = Path(path).name
        return str(Path(now, name)) if name not in ("", "..") else ""

    state["dirpath"] = now
    for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
        if name in state:
            state[name] = moved(state[name])
    if "best_k_models" in state:
        state["best_k_models"] = {moved(path): score for path, score in state["best_k_models"].items()}


def checkpoint_bytes(trainer: L.Trainer) -> int:
    """Estimate the size of a checkpoint: the weights, and what the optimizers will keep of each parameter.

    Args:
        trainer: The trainer, whose optimizers are ready.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    averages = sum(isinstance(callback, WeightAveraging) + isinstance(callback, WiseFT) for callback in callbacks)
    weights = tensor_bytes(trainer.lightning_module.state_dict())
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    kept: int = sum(_per_parameter(group) * p.nbytes for group in groups for p in group["params"])
    return weights * (1 + averages) + kept


def _per_parameter(group: Mapping[str, Any]) -> int:
    """Return how many numbers an optimizer keeps of each one that it trains."""
    if "betas" in group:  # Adam and its kin
        return 2
    return 1 if group.get("momentum", 1) else 0
