"""A data module that knows where training stands, so that a resumed epoch goes on with the pictures that are left."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any

import lightning as L
import msgspec
from lightning.pytorch.utilities import rank_zero_warn

from finetune.midway import Stop, length_of, rest_of_epoch, stop_of
from finetune.place import batches_done
from finetune.randomness import global_seed
from finetune.schema import convert


@dataclass(frozen=True)
class _Position:
    """What stands in a checkpoint: the epoch, its batches that are done, a key of its order, and `shifted_images`."""

    epoch: Annotated[int, msgspec.Meta(ge=0)]
    batches: Annotated[int, msgspec.Meta(ge=0)]
    order: int
    shift: int = 0


class PositionedDataModule(L.LightningDataModule):
    """Base of data modules whose order is a function of (seed, epoch).

    Subclasses say by `order_key` what the order of an epoch depends on.
    """

    batch_size: int
    _restored: tuple[int, int] | None = None
    _shifted = (0, 0)  # an epoch, and how many images further than its batches say it is

    @property
    def order_key(self) -> int:
        """A number that is equal where the order of an epoch is."""
        return global_seed()

    def order_of(self, batch_size: int) -> int:
        """Return what `order_key` would be with another batch size; subclasses say so where the order itself is the same."""
        return self.order_key

    @property
    def images_of_epoch(self) -> int | None:
        """How many images an epoch shows, each of them once, whatever the batch size; None if that is not so."""
        return None

    @property
    def finds_its_place(self) -> bool:
        """Whether an epoch that was begun with other batches goes on with the images that are left."""
        return self.images_of_epoch is not None

    def shifted_images(self, epoch: int) -> int:
        """Return how many images an epoch is further than its batches say: not 0 where it began with others."""
        return self._shifted[1] if self._shifted[0] == epoch else 0

    def shift_in_batches(self, epoch: int) -> Fraction:
        """Return the same as a share of a batch."""
        images = self.shifted_images(epoch)
        return Fraction(images, self.batch_size * self.ranks()[0]) if images else Fraction(0)

    def ranks(self) -> tuple[int, int]:
        """Return the number of processes and the number of this one."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def position(self) -> tuple[int, int]:
        """Return the epoch and how many of its batches are done, also before the loops have tidied up after a restart."""
        assert self.trainer is not None
        if not self.trainer.fit_loop.epoch_progress.current.ready and self._restored:
            return self._restored
        return batches_done(self.trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return where training stands, for the checkpoint."""
        epoch, batches = self.position() if self.trainer else (0, 0)
        shift = self.shifted_images(epoch)
        return {"epoch": epoch, "batches": batches, "order": self.order_key} | ({"shift": shift} if shift else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over where training stands, for loaders that start before Lightning has restored its loops."""
        said = convert(state_dict, _Position, "what the checkpoint says of the place in its epoch")
        self._restored, self._shifted = (said.epoch, said.batches), (said.epoch, said.shift)
        if self.trainer is None or self.trainer.state.fn != "fit" or not said.batches:
            return
        stop, counter = stop_of(self.trainer)
        order = self.order_of(stop.batch or self.batch_size) if self.finds_its_place else self.order_key
        if said.order != order:
            rank_zero_warn(
                "The training pictures, the batch size or the seed are not those of the checkpoint, which was written within "
                "an epoch: in the rest of this epoch some pictures are seen twice or not at all."
            )
        if self.images_of_epoch is not None:
            self._divide_rest(stop, counter, said.order == order)

    def _divide_rest(self, stop: Stop, counter: dict[str, int] | None, same_order: bool) -> None:
        """Go on within an epoch behind the images that were shown, if batches are others now than in the checkpoint."""
        assert self.trainer is not None
        assert self._restored is not None
        (epoch, done), world = self._restored, self.ranks()[0]
        images = max(1, (self.images_of_epoch or 0) // world) * world
        batch = self.batch_size * world
        before = (stop.batch or self.batch_size) * (stop.processes or world)
        length = length_of(self.trainer, max(1, images // batch))
        if same_order and before == batch and stop.length in (None, length):
            return
        seen = done * before + self._shifted[1]
        share = min(Fraction(1), Fraction(seen, (stop.length or max(done + 1, images // before)) * before))
        rest = rest_of_epoch(min(seen if same_order else round(share * images), images - 1), images, batch, length, share)
        self._restored, self._shifted = (epoch, rest.batches), (epoch, rest.shift)
        for name, number in (counter or {}).items():  # which Lightning restores its loops from
            counter[name] = max(0, number + rest.batches - done)  # type: ignore[index]
        if rest.again:
            rank_zero_warn(
                f"{rest.again} images are shown twice in this epoch: fewer are left of it than the batch of {batch} needs."
            )
