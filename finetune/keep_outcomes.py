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
from finetune.validation import fresh_metrics


class KeepOutcomes(Callback):
    """Write `predictions.val.csv` whenever validation is better than before, and `predictions.test.csv` after the test.

    A step that returns a `split` beside logits and labels has a table of that name, as the target of domain adaptation does.
    It keeps the logits that these passes compute anyway. Several processes put theirs together. A module that is no classifier
    of ours (its steps return no logits), or a data module that repeats or drops pictures, leaves nothing here.

    Args:
        run: The run's folder.
        best: The callback that chooses the checkpoint.
    """

    def __init__(self, run: Path, best: ModelCheckpoint) -> None:
        self.run = run
        self.best = best
        self._parts: dict[str, list[tuple[Ints, Ints, Floats]]] = {}
        self._latest: dict[str, Outcome] = {}

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._parts = {}

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
            parts = self._parts.setdefault(outputs.get("split", ""), [])
            begin = sum(len(labels) for _, labels, _ in parts)
            inside = outputs if "index" in outputs else batch
            index = inside["index"].cpu().numpy() if isinstance(inside, Mapping) and "index" in inside else None
            index = np.arange(begin, begin + len(logits)) if index is None else index
            probabilities = logits.softmax(1).numpy(force=True)
            parts.append((index.astype(np.int64), outputs["labels"].numpy(force=True).astype(np.int64), probabilities))

    on_validation_batch_end = on_test_batch_end = _keep

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the parts of a validation together."""
        self._latest = {} if trainer.sanity_checking else self._together(trainer, pl_module, "val")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the table if the checkpoint that is about to be saved is the best so far; that callback comes after this."""
        score = fresh_metrics(trainer).get(self.best.monitor or "")
        if score is None and (self.best.monitor in trainer.callback_metrics):
            return  # it is of an older validation
        before = self.best.best_model_score
        better = before is None or score is None or bool(score > before if self.best.mode == "max" else score < before)
        if better:
            self._write(trainer, self._latest)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the table of the test."""
        self._write(trainer, self._together(trainer, pl_module, "test"))

    def write_latest(self, trainer: L.Trainer) -> None:
        """Write the table of the validation that was last: its checkpoint is the best one now."""
        self._write(trainer, self._latest)

    def _write(self, trainer: L.Trainer, outcomes: Mapping[str, Outcome]) -> None:
        for split, outcome in outcomes.items():
            if trainer.is_global_zero:
                write_outcome(outcome, self.run / f"predictions.{split}.csv")

    def _together(self, trainer: L.Trainer, module: Any, split: str) -> dict[str, Outcome]:
        """Return the outcome of a split, and of those that steps named."""
        everywhere, self._parts = [self._parts], {}
        if trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, everywhere[0])
            everywhere = gathered
        found: dict[str, Outcome] = {}
        for name in dict.fromkeys(name for parts in everywhere for name in parts):
            rows = [part for parts in everywhere for part in parts.get(name, [])]
            outcome = _outcome(rows, trainer, module, name or split, chosen=bool(name))
            found |= {} if outcome is None else {name or split: outcome}
        return found


def _outcome(
    parts: list[tuple[Ints, Ints, Floats]], trainer: L.Trainer, module: Any, split: str, chosen: bool
) -> Outcome | None:
    """Return what was said of the pictures of a split, in order; None if some are repeated, or missing without a reason.

    A reason is a limit of the trainer, or that a step named the split itself and chose which of its images count. Then only
    those are named that were measured.
    """
    index, labels, probabilities = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.argsort(index, kind="stable")
    data: Any = getattr(trainer, "datamodule", None)
    files = getattr(data, "measured_files", None) or getattr(data, "files", None)
    named = [os.path.abspath(path) for path in files(split)] if callable(files) else []
    index = index[order]
    whole = np.array_equal(index, np.arange(len(index)))
    part = (chosen and len(index) > 0 and index[-1] < len(named)) or _is_part(trainer, index, len(named))
    if not whole and (len(np.unique(index)) < len(index) or not part):
        return None
    names = [named[number] for number in index] if len(index) and index[-1] < len(named) else [str(number) for number in index]
    classes = tuple(module.class_names or (str(number) for number in range(probabilities.shape[1])))
    return Outcome(names, labels[order], probabilities[order], classes)


def _is_part(trainer: L.Trainer, index: Ints, number: int) -> bool:
    """Say whether some of the pictures were measured because the trainer limits the batches."""
    limit = trainer.limit_test_batches if trainer.state.fn == "test" or trainer.testing else trainer.limit_val_batches
    return (isinstance(limit, int) or limit < 1) and bool((index < number).all())
