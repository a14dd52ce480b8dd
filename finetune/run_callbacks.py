"""The callbacks of a run: its record, its checkpoints, and what its options ask for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from finetune.augmented import AugmentedPictures
from finetune.averaging import average_of
from finetune.callbacks import EpochLine, PhaseEarlyStopping
from finetune.defaults import RunOptions
from finetune.gradient_flow import GradientFlow
from finetune.keep_outcomes import KeepOutcomes
from finetune.nonfinite import NonFiniteLoss
from finetune.record import RunRecord
from finetune.runs import CHECKPOINTS
from finetune.saving import LastCheckpoint
from finetune.soup import BestEpochs
from finetune.tracking import Tracking
from finetune.validation import MeasuredCheckpoint, ValidationSchedule


class RunCallbacks:
    """The callbacks of a run, and those of them that are asked for something later.

    Args:
        options: The options of the run.
        folder: Its folder.
        command: The words as the user typed them.
        keep: Whether checkpoints are written.

    Attributes:
        every: All of them, in the order in which they are called.
        best: Keeps the best epoch, or None.
        epochs: Keeps several good epochs, or None.
        last: Keeps where the run stands, or None.
        tracking: Follows the run for experiment trackers.
    """

    def __init__(self, options: RunOptions, folder: Path, command: Sequence[str], keep: bool) -> None:
        record = RunRecord(folder, command)
        self.tracking = Tracking(record)
        self.best: ModelCheckpoint | None = None
        self.epochs: BestEpochs | None = None
        self.last: LastCheckpoint | None = None
        self.every: list[L.Callback] = [ValidationSchedule(), EpochLine(), record, AugmentedPictures(folder), self.tracking]
        mode = options.mode or ("min" if "loss" in options.monitor else "max")
        if keep:
            self._keep(options, folder, mode)
        self.every.append(NonFiniteLoss(options.on_nonfinite))
        if (average := average_of(options)) is not None:
            self.every.append(average)
        if options.patience is not None:
            self.every.append(PhaseEarlyStopping(options.monitor, mode=mode, patience=options.patience))
        if options.gradients_every:
            self.every.append(GradientFlow(folder, options.gradients_every))

    def _keep(self, options: RunOptions, folder: Path, mode: str) -> None:
        where: dict[str, Any] = {"dirpath": folder / CHECKPOINTS, "save_on_train_epoch_end": True}
        where["enable_version_counter"] = False
        self.best = MeasuredCheckpoint(filename="best", monitor=options.monitor, mode=mode, **where)
        self.every += [KeepOutcomes(folder, self.best), self.best]
        if options.soup is not None:
            self.epochs = BestEpochs(folder / CHECKPOINTS, options.soup, options.monitor, mode)
            self.every.append(self.epochs)
        self.last = LastCheckpoint(folder / CHECKPOINTS, options.save_every_minutes, beside=1 + (options.soup or 0))
        self.every.append(self.last)  # it keeps what the others remember
