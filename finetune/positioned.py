"""A data module that knows where training stands, so that a resumed epoch goes on with the pictures that are left."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from finetune.randomness import global_seed


class PositionedDataModule(L.LightningDataModule):
    """Base of data modules whose order is a function of (seed, epoch).

    Subclasses say by `order_key` what the order of an epoch depends on.
    """

    _restored: tuple[int, int] | None = None

    @property
    def order_key(self) -> int:
        """A number that is equal where the order of an epoch is."""
        return global_seed()

    def ranks(self) -> tuple[int, int]:
        """Return the number of processes and the number of this one."""
        return (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)

    def position(self) -> tuple[int, int]:
        """Return the epoch and how many of its batches are done, also before the loops have tidied up after a restart."""
        assert self.trainer is not None
        loop: Any = self.trainer.fit_loop
        epoch, batch = loop.epoch_progress.current, loop.epoch_loop.batch_progress
        if not epoch.ready and self._restored:
            return self._restored
        if epoch.started <= epoch.processed:
            return epoch.processed, 0
        if batch.is_last_batch:
            return epoch.processed + 1, 0
        return epoch.processed, batch.current.processed

    def state_dict(self) -> dict[str, Any]:
        """Return where training stands, for the checkpoint."""
        epoch, batches = self.position() if self.trainer else (0, 0)
        return {"epoch": epoch, "batches": batches, "order": self.order_key}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over where training stands, for loaders that start before Lightning has restored its loops."""
        self._restored = state_dict["epoch"], state_dict["batches"]
        fits = self.trainer is not None and self.trainer.state.fn == "fit"
        if fits and state_dict["batches"] and state_dict["order"] != self.order_key:
            rank_zero_warn(
                "The training pictures, the batch size or the seed are not those of the checkpoint, which was written within "
                "an epoch: in the rest of this epoch some pictures are seen twice or not at all."
            )
