"""What is behind a run that goes on from a checkpoint: how long its epochs were, and where in an epoch it stopped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any

import lightning as L
import msgspec
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from finetune.errors import CheckpointError
from finetune.formats import KEY
from finetune.pace import Lengths, Pace
from finetune.place import Place, batches_done
from finetune.schema import convert

if TYPE_CHECKING:
    from finetune.timetable import Timetable

_PACE = "pace"  # within what the toolkit adds to a checkpoint


_Count = Annotated[int, msgspec.Meta(ge=0)]
_Some = Annotated[int, msgspec.Meta(ge=1)]


@dataclass(frozen=True)
class _Said:
    """What stands in a checkpoint: `Behind` in plain values; epochs are fractions."""

    knots: list[tuple[_Count, _Some, _Count]]
    lengths: list[tuple[_Count, _Some]]
    batches: _Some


@dataclass(frozen=True)
class Behind:
    """What a checkpoint says of the part of a run that is behind; all of it is unknown in checkpoints of older versions.

    Attributes:
        knots: How epochs and steps belonged together, see `Pace`.
        lengths: How many steps epochs had, and would have had.
        batches: Training batches of an epoch.
    """

    knots: tuple[tuple[Fraction, int], ...] = ()
    lengths: Lengths | None = None
    batches: int | None = None

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any]) -> Behind:
        """Read it from a checkpoint.

        Raises:
            CheckpointError: If it is there and makes no sense.
        """
        said = (checkpoint.get(KEY) or {}).get(_PACE)
        if said is None:
            return cls()
        found = convert(said, _Said, "what the checkpoint says of the steps of its epochs")
        knots = tuple((Fraction(over, under), steps) for over, under, steps in found.knots)
        if sorted(knots) != list(knots) or not found.lengths or found.lengths[0][0]:
            raise CheckpointError(f"The checkpoint is damaged: the steps of its epochs are in no order ({said!r:.200}).")
        return cls(knots, tuple(found.lengths), found.batches)

    def settle(self, trainer: L.Trainer) -> None:
        """Let Lightning's loops go on where they should within an epoch; its callbacks hear of no start of that epoch.

        Args:
            trainer: The trainer, when its loops are restored and its training loader is ready.
        """
        epoch, done = batches_done(trainer)
        for callback in trainer.callbacks if done else []:  # type: ignore[attr-defined]
            if isinstance(callback, GradientAccumulationScheduler):
                trainer.accumulate_grad_batches = callback.get_accumulate_grad_batches(epoch)
        length = trainer.num_training_batches
        known = getattr(trainer, "datamodule", None)
        if not done or self.batches in (None, length) or length == float("inf") or getattr(known, "finds_its_place", False):
            return
        assert self.batches is not None
        now = min(int(length) - 1, round(Fraction(done * int(length), self.batches)))
        current: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        for name in ("ready", "started", "processed", "completed"):
            setattr(current, name, max(0, getattr(current, name) + now - done))

    def change(self, times: Timetable, place: Place) -> str | None:
        """Return a line about epochs that are longer or shorter from here on, or None if they are not."""
        before, now = self._length(place), times.steps_per_epoch
        if (
            not place.made
            or times.pace is None
            or before in (None, now)
            or (self.lengths is not None and self.lengths == times.pace.lengths)
        ):
            return None
        first, last = place.epoch + 1, times.epochs
        which = f"epochs {first} to {last} have" if last > first else f"epoch {first} has"
        end = f" The run ends after {times.schedule.total} steps, as it would have." if times.by_steps else ""
        return f"note: {which} {now} steps where there were {before}: learning rates and phases follow the epochs.{end}"

    def _length(self, place: Place) -> int | None:
        if self.lengths is not None:
            return Pace(self.lengths).length(place.epoch)
        return round(place.made / place.epoch) if place.epoch and not place.done else None


def pace_of(times: Timetable | None, trainer: Any, place: Place) -> dict[str, Any]:
    """Return what a checkpoint is to say of the part of the run that is behind, as plain values."""
    if times is None or times.pace is None or trainer.num_training_batches == float("inf"):  # another trainer, to measure with
        return {}
    knots = times.pace.until(place.epoch + Fraction(place.done) / times.steps_per_epoch)
    return {
        _PACE: {
            "knots": [[epochs.numerator, epochs.denominator, steps] for epochs, steps in knots],
            "lengths": [list(pair) for pair in times.pace.lengths],
            "batches": int(trainer.num_training_batches),
        }
    }
