"""A data module that keeps to the split of its run: in the run's folder it writes which images it trains on and holds out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.console import say
from finetune.escaping import shown
from finetune.positioned import PositionedDataModule
from finetune.run_split import RunSplit, facts_of, split_of
from finetune.runs import run_of
from finetune.split_changes import Change, Image, describe, first_table
from finetune.split_table import Role, SplitTable, write_table


class SplitDataModule(PositionedDataModule):
    """Base of data modules that hold out images of their own accord.

    Subclasses say by `split_root` and `split_images` what there is, ask `roles_of` where a run goes on, and call
    `write_split` from their training loader.

    Attributes:
        changes: How the images differ from those of the run that goes on.
    """

    _known: RunSplit | None = None  # of the run that goes on, or is measured
    _table: SplitTable | None = None
    _run: Path | None = None  # the folder in which the table lies
    _written = False
    changes: Sequence[Change] = ()

    @property
    def split_root(self) -> Path:
        """The folder that names of images start from."""
        raise NotImplementedError

    def split_images(self) -> list[Image]:
        """Return all images, and how they are used by this training."""
        raise NotImplementedError

    def forget_split(self) -> None:
        """Forget what was found of the split, as it is to be taken from a run."""
        raise NotImplementedError

    def continue_from(self, known: RunSplit) -> None:
        """Take the split from a run: what was trained on is not measured, and what was held out is not trained on.

        Args:
            known: What the run's checkpoint and folder know.
        """
        self._known, self._table, self._run, self.changes = known, None, run_of(known.checkpoint), ()
        self.forget_split()

    def roles_of(self, known: RunSplit, images: Sequence[Image], **options: Any) -> dict[str, Role] | None:
        """Return how images are used by a run that goes on; None if as a run that starts now would.

        Args:
            known: What is known of the run.
            images: What there is.
            options: See `RunSplit.reconcile`.
        """
        result = known.reconcile(self.split_root, images, **options)
        if result is None or known.table is None:
            return None
        self._table, self.changes = known.table.with_rows(result.rows), result.changes
        return result.roles

    def lost(self, split: str) -> bool:
        """Return whether the run that goes on had images in a split."""
        return self._known is not None and self._known.table is not None and split in {r.role for r in self._known.table.rows}

    def tell_changes(self) -> None:
        """Print how the images differ from those of the run, if they do."""
        if self.changes and (self.trainer is None or self.trainer.is_global_zero):
            say(
                f"warning: The images of {shown(str(self.split_root))} have changed since the run was started: "
                f"{describe(self.changes)}. What was trained on is not measured, and what was held out is not trained on."
            )

    def write_split(self) -> Path | None:
        """Write down how images are used, once in each training and by the first process; return the folder of the run."""
        trainer = self.trainer
        if trainer is None or trainer.state.fn != "fit" or self._written:
            return None
        self._written = True
        log_dir = trainer.log_dir  # asks all processes
        if not (log_dir and trainer.is_global_zero and (trainer.loggers or Path(log_dir).resolve() != Path.cwd())):
            return None
        self._run = Path(log_dir)
        if self._table is None:
            images = self.split_images()
            self._table = first_table(images)
            _warn_of_copies(images)
        write_table(self._run, self._table)
        return self._run

    @property
    def split_facts(self) -> dict[str, str]:
        """What a checkpoint notes of the split: the digest of its table, and the folder of the images; empty if unknown."""
        return {} if self._table is None else facts_of(self.split_root, self._table)

    def state_dict(self) -> dict[str, Any]:
        """Return also what the checkpoint notes of the split."""
        return {**super().state_dict(), "split": self.split_facts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the split of the checkpoint's run, for a trainer that was given the checkpoint."""
        path: Any = self.trainer.ckpt_path if self.trainer else None
        run = run_of(Path(path)) if path else None
        if run is not None and (self._run is None or run.resolve() != self._run.resolve()):
            self.continue_from(split_of(Path(path), state_dict.get("split"), epoch=int(state_dict["epoch"])))
            self.split_images()
            self.tell_changes()
        super().load_state_dict(state_dict)


def _warn_of_copies(images: Sequence[Image]) -> None:
    trained = {image.digest for image in images if image.split == "train" and image.digest}
    copies = [image.file for image in images if image.split in ("val", "test") and image.digest in trained]
    if copies:
        named = ", ".join(map(shown, copies[:3])) + (", …" if len(copies) > 3 else "")
        say(
            f"warning: {len(copies)} held-out images are copies of training images ({named}): metrics will be better than the "
            "model is. Remove the copies; resnet-finetune check lists them."
        )
