"""What the best checkpoint of a run says of each validation and test picture, kept as tables in the run's folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from finetune.outcomes import Floats, Ints, Outcome, write_outcome


class KeepOutcomes(Callback):
    """Write `predictions.val.csv` whenever validation is better than before, and `predictions.test.csv` after the test.

    It keeps the logits that these passes compute anyway. Several processes put theirs together. A module that is no classifier
    of ours (its steps return no logits), or a data module that repeats or drops pictures, leaves nothing here.

    Args:
        run: The run's folder.
        best: The callback that chooses the checkpoint.
    """

    def __init__(self, run: Path, best: ModelCheckpoint) -> None:
        self.run = run
        self.best = best
        self._parts: list[tuple[Ints, Ints, Floats]] = []
        self._latest: Outcome | None = None

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._parts = []

    on_validation_epoch_start = on_test_epoch_start = _begin

    def _keep(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if isinstance(outputs, Mapping) and {"logits", "labels"} <= set(outputs):
            logits = outputs["logits"].detach().double()
            begin = sum(len(labels) for _, labels, _ in self._parts)
            index = batch["index"].cpu().numpy() if isinstance(batch, Mapping) and "index" in batch else None
            index = np.arange(begin, begin + len(logits)) if index is None else index
            probabilities = logits.softmax(1).numpy(force=True)
            self._parts.append((index.astype(np.int64), outputs["labels"].numpy(force=True).astype(np.int64), probabilities))

    on_validation_batch_end = on_test_batch_end = _keep

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the parts of a validation together."""
        self._latest = None if trainer.sanity_checking else self._together(trainer, pl_module, "val")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the table if the checkpoint that is about to be saved is the best so far; that callback comes after this."""
        score = trainer.callback_metrics.get(self.best.monitor or "")
        before = self.best.best_model_score
        better = before is None or score is None or bool(score > before if self.best.mode == "max" else score < before)
        if self._latest is not None and better and trainer.is_global_zero:
            write_outcome(self._latest, self.run / "predictions.val.csv")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the table of the test."""
        outcome = self._together(trainer, pl_module, "test")
        if outcome is not None and trainer.is_global_zero:
            write_outcome(outcome, self.run / "predictions.test.csv")

    def _together(self, trainer: L.Trainer, module: Any, split: str) -> Outcome | None:
        parts, self._parts = self._parts, []
        if trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, parts)
            parts = [part for each in gathered for part in each]
        if not parts:
            return None
        index, labels, probabilities = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        order = np.argsort(index, kind="stable")
        if not np.array_equal(index[order], np.arange(len(index))):
            return None
        files = getattr(getattr(trainer, "datamodule", None), "files", None)
        named = [os.path.abspath(path) for path in files(split)] if callable(files) else []
        names = named if len(named) == len(index) else [str(number) for number in range(len(index))]
        classes = tuple(module.class_names or (str(number) for number in range(probabilities.shape[1])))
        return Outcome(names, labels[order], probabilities[order], classes)
