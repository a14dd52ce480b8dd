"""The split of a run as its checkpoint and its folder know it: one owner for all that trains on or measures its images."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.checkpoints import KEY
from finetune.errors import DataError
from finetune.runs import run_of
from finetune.split_changes import Image, Reconciled, first_table, is_another, reconcile
from finetune.split_table import TABLE, SplitTable, read_table


@dataclass(frozen=True)
class RunSplit:
    """What is known of the images of a run that goes on, or is measured.

    Attributes:
        checkpoint: The checkpoint.
        table: The run's table; None if there is none.
        noted: The digest of the table that the checkpoint noted; empty if it is of an older version.
        root: The folder of the run's images when the checkpoint was written; empty if that is not known.
        epoch: Epochs that are done.
    """

    checkpoint: Path
    table: SplitTable | None
    noted: str = ""
    root: str = ""
    epoch: int = 0

    def reconcile(
        self, root: Path, images: Sequence[Image], bounded: bool = False, unusable: Sequence[str] = ()
    ) -> Reconciled | None:
        """Compare images with the table; None if there is no table, and nothing speaks against the draw of `images`.

        Args:
            root: The folder that the images lie in.
            images: What is there.
            bounded: See `split_changes.reconcile`.
            unusable: See `split_changes.reconcile`.

        Raises:
            DataError: If the table is not that of the checkpoint, or is missing and the images have changed.
        """
        if self.table is None:
            if self.noted and first_table(images).digest != self.noted:
                raise DataError(
                    f"The images of {root} are not those that {self.checkpoint} was trained with, and its run's {TABLE} is not "
                    f"there: expected it in {run_of(self.checkpoint) or 'the folder of the run'}. Without it nobody knows "
                    "which images were trained on: put it back, or measure on another folder (evaluate RUN FOLDER)."
                )
            return None
        if self.noted and not self.table.knows(self.noted):
            raise DataError(
                f"{TABLE} of {run_of(self.checkpoint)} is not the one that {self.checkpoint.name} was trained with: it was "
                "edited or replaced. It says which images were trained on: restore it, or start a new run."
            )
        another = self.is_elsewhere(root) and is_another(self.table, images)
        return reconcile(self.table, images, self.epoch, bounded, another, unusable)

    @property
    def says_nothing(self) -> bool:
        """Whether nothing is known: a run of an older version whose split was given, or whose table is lost."""
        return self.table is None and not self.noted

    def is_elsewhere(self, root: Path) -> bool:
        """Return whether a folder has another path than that of the run's images, as a copy or another folder has."""
        return bool(self.root) and os.path.realpath(root) != os.path.realpath(self.root)


def split_of(checkpoint: Path, facts: Mapping[str, Any] | None = None, root: str = "", epoch: int = 0) -> RunSplit:
    """Return what is known of the split of a checkpoint's run.

    Args:
        checkpoint: The checkpoint.
        facts: What it noted, see `facts_of`.
        root: The folder of its images, where it did not note that.
        epoch: Epochs that are done.

    Raises:
        DataError: If the table cannot be read.
    """
    run, facts = run_of(checkpoint), facts or {}
    table = None if run is None else read_table(run)
    return RunSplit(checkpoint, table, str(facts.get("digest") or ""), str(facts.get("root") or root), epoch)


def split_in(checkpoint: Path, content: Mapping[str, Any]) -> RunSplit:
    """Return what is known of the split of a checkpoint whose content was read, see `split_of`."""
    facts = (content.get(KEY) or {}).get("split")
    root = (content.get("datamodule_hyper_parameters") or {}).get("root")
    known = facts if isinstance(facts, Mapping) else None
    return split_of(checkpoint, known, root if isinstance(root, str) else "", int(content.get("epoch", -1)) + 1)


def facts_of(root: Path, table: SplitTable) -> dict[str, str]:
    """Return what a checkpoint notes of its split, as plain values."""
    return {"digest": table.digest, "root": str(root.absolute())}


def trained_on(checkpoint: Path, digests: Sequence[str]) -> int:
    """Return how many images, given by the hashes of their content, the run of a checkpoint was trained on."""
    table = split_of(checkpoint).table
    seen = set() if table is None else {row.digest for row in table.rows if row.role == "train" and row.digest}
    return sum(digest in seen for digest in digests)
