"""Where training stands: the epoch, how much of it is done, and the optimizer steps so far."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import lightning as L


@dataclass(frozen=True)
class Place:
    """A moment between two optimizer steps.

    Attributes:
        epoch: The present epoch, counted from 0.
        done: How much of it is done, in optimizer steps of the length that steps have now. It is a fraction where the epoch
            began with batches of another size.
        made: Optimizer steps of the run so far, whatever their size.
    """

    epoch: int = 0
    done: int | Fraction = 0
    made: int = 0


def batches_done(trainer: L.Trainer) -> tuple[int, int]:
    """Return the epoch and how many of its batches are done, also within a batch and right after a restart."""
    loop: Any = trainer.fit_loop
    epoch, batch = loop.epoch_progress.current, loop.epoch_loop.batch_progress
    if epoch.started <= epoch.processed:
        return int(epoch.processed), 0
    if batch.is_last_batch and batch.current.processed >= batch.current.ready:
        return int(epoch.processed) + 1, 0
    return int(epoch.processed), int(batch.current.processed)


def place_of(trainer: L.Trainer, resumed: tuple[int, int] = (0, 0)) -> Place:
    """Return where training stands; steps are not counted by epochs if the loader has no length.

    While batches are accumulated it is the place at which their first one began.

    Args:
        trainer: The trainer.
        resumed: The epoch and the batch with which training went on from a checkpoint: accumulation began anew there.
    """
    made = int(trainer.global_step)
    if trainer.num_training_batches == float("inf"):
        return Place(0, made, made)
    epoch, batches = batches_done(trainer)
    accumulated = trainer.accumulate_grad_batches
    began = max(batches - batches % accumulated, resumed[1] if epoch == resumed[0] else 0)
    data: Any = getattr(trainer, "datamodule", None)
    shift = data.shift_in_batches(epoch) if hasattr(data, "shift_in_batches") else 0
    done = (began + Fraction(shift)) / accumulated
    return Place(epoch, int(done) if done.denominator == 1 else done, made)
