"""Going on in the middle of an epoch with batches of another size: which images are left, and in how many batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any

import lightning as L

from finetune.formats import KEY


@dataclass(frozen=True)
class Rest:
    """What is left of an epoch.

    Attributes:
        batches: How many batches of the present size count as done.
        shift: How many images further than these batches the rest begins; it may be negative.
        again: How many images are shown twice, as a batch needs more than are left.
    """

    batches: int
    shift: int = 0
    again: int = 0


def rest_of_epoch(seen: int, images: int, batch: int, length: int, share: Fraction | None = None) -> Rest:
    """Divide what is left of an epoch into batches.

    Args:
        seen: Images of the epoch's order that were shown.
        images: Images of a whole epoch.
        batch: Images of a batch, on all processes together.
        length: Batches of a whole epoch; fewer than there could be where they are limited.
        share: The share of the epoch that is done, where batches are limited.

    Returns:
        No image comes twice, and what is left over is less than a batch.

    >>> rest_of_epoch(40, images=128, batch=16, length=8)  # 88 images are left: 5 batches, and 8 images wait
    Rest(batches=3, shift=-8, again=0)
    >>> rest_of_epoch(120, images=128, batch=16, length=8)  # 8 are left, less than a batch
    Rest(batches=7, shift=0, again=8)
    """
    left = (images - seen) // batch
    if length < images // batch and share is not None:
        left = min(left, ceil((1 - share) * length))
    left = max(1, min(left, length))
    again = max(0, seen + left * batch - images) if images >= batch else 0
    return Rest(length - left, seen - again - (length - left) * batch, again)


@dataclass(frozen=True)
class Stop:
    """Where within an epoch a checkpoint was written, as far as it says so.

    Attributes:
        batch: Images of a batch and process.
        processes: Number of processes.
        length: Batches of an epoch.
    """

    batch: int | None = None
    processes: int | None = None
    length: int | None = None


def stop_of(trainer: L.Trainer) -> tuple[Stop, dict[str, int] | None]:
    """Return what the checkpoint that a trainer is loading says, and its counter of batches (ready, started, …), or None."""
    checkpoint = getattr(trainer._checkpoint_connector, "_loaded_checkpoint", None)
    said = [
        _inside(checkpoint, "datamodule_hyper_parameters", "batch_size"),
        _inside(checkpoint, KEY, "run", "processes"),
        _inside(checkpoint, KEY, "pace", "batches"),
    ]
    counter = _inside(checkpoint, "loops", "fit_loop", "epoch_loop.batch_progress", "current")
    counts = isinstance(counter, dict) and all(type(number) is int for number in counter.values())
    return Stop(*(number if type(number) is int and number > 0 else None for number in said)), counter if counts else None


def _inside(value: Any, *names: str) -> Any:
    """Return what stands in a mapping of mappings, or None."""
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def length_of(trainer: L.Trainer, batches: int) -> int:
    """Return how many training batches an epoch has by a trainer's limit, out of so many."""
    limit: Any = trainer.limit_train_batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)
