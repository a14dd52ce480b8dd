"""How epochs and optimizer steps of a run belong together, where epochs have different numbers of steps.

That is so where a run was resumed with another batch size or other images, and where a schedule changes how many batches are
accumulated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler

Lengths = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Pace:
    """What was done so far, and how long epochs are from here on.

    All numbers are exact, so that a run whose epochs are equal has the very rates that counting its steps would give.

    Attributes:
        lengths: Steps of an epoch as pairs (from this epoch on, steps), the first of them from epoch 0.
        knots: What is behind: pairs (epochs, steps), from (0, 0) to the last moment at which the lengths above were not in
            force yet. Between two of them epochs were equal.
    """

    lengths: Lengths
    knots: tuple[tuple[Fraction, int], ...] = ((Fraction(0), 0),)

    def length(self, epoch: int) -> int:
        """Return the number of steps of an epoch, as it is from here on.

        >>> [Pace(((0, 8), (2, 32))).length(epoch) for epoch in range(4)]
        [8, 8, 32, 32]
        """
        return next(steps for start, steps in reversed(self.lengths) if start <= epoch)

    def epochs_after(self, steps: int | Fraction) -> Fraction:
        """Return how many epochs are done when so many steps of the run were made.

        >>> float(Pace(((0, 8), (2, 32))).epochs_after(24))
        2.25
        """
        ends = self._corners()
        for (epochs, made), (later, after) in pairwise(ends):
            if made <= steps < after:
                return epochs + (later - epochs) * (steps - made) / (after - made)
        epochs, made = ends[-1]
        return epochs + Fraction(steps - made) / self.length(int(epochs))

    def steps_after(self, epochs: Fraction | float) -> Fraction:
        """Return how many steps of the run were made when so many epochs are done.

        >>> int(Pace(((0, 8), (2, 32))).steps_after(2.25))
        24
        """
        ends, epochs = self._corners(), Fraction(epochs)
        for (begin, made), (later, after) in pairwise(ends):
            if begin <= epochs < later:
                return made + (after - made) * (epochs - begin) / (later - begin)
        begin, made = ends[-1]
        return made + (epochs - begin) * self.length(int(begin))

    def until(self, epochs: Fraction) -> tuple[tuple[Fraction, int], ...]:
        """Return the knots up to a moment at which others will be in force: also where the lengths changed before it."""
        return tuple((begin, int(made)) for begin, made in self._corners() if begin < epochs or not begin)

    def _corners(self) -> list[tuple[Fraction, Fraction]]:
        """Return all moments at which the length of an epoch changes, behind and ahead."""
        found = [(epochs, Fraction(made)) for epochs, made in self.knots]
        for start, _ in self.lengths:
            epochs, made = found[-1]
            if start > epochs:
                found.append((Fraction(start), made + (start - epochs) * self.length(int(epochs))))
        return found


def lengths_of(trainer: L.Trainer) -> Lengths | None:
    """Return the optimizer steps of the epochs of a run as pairs (from this epoch on, steps), or None if nobody knows.

    Args:
        trainer: The trainer, whose training loader is ready.
    """
    batches = trainer.num_training_batches
    if batches == float("inf"):
        return None
    callbacks: Sequence[L.Callback] = getattr(trainer, "callbacks", [])
    schedule = next((each for each in callbacks if isinstance(each, GradientAccumulationScheduler)), None)
    accumulated = {0: trainer.accumulate_grad_batches} if schedule is None else schedule.scheduling
    return tuple((epoch, -(-int(batches) // number)) for epoch, number in sorted(accumulated.items()))
