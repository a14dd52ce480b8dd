"""From the folders of a target domain to its pictures, held to the classes of the source.

A target folder may be arranged in three ways:

    target/<class>/**/<picture>                     labels are known; a class may be missing
    target/{train,val,test}/<class>/**/<picture>    and which pictures are for what
    target/<picture>                                nothing is known but the pictures

Known labels are never trained with, but for the few that are asked for: they only tell how well the target is recognised.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tabulate import tabulate

from finetune.errors import DataError, did_you_mean
from finetune.folders import SPLITS, Picture, Split, read_classes, split_folders
from finetune.images import IMAGE_SUFFIXES
from finetune.randomness import seed_of
from finetune.sample import BUILT_IN
from finetune.walk import existing, order, subfolders, walk

ORACLE = "oracle/target_acc"
"""The accuracy on the target, which needs its labels; no checkpoint is chosen by it unless somebody asks for that."""
UNKNOWN = -1
"""The label of a picture whose class is not known."""


@dataclass(frozen=True)
class TargetFolder:
    """What `scan_target` found.

    Attributes:
        root: The folder that paths start from.
        classes: Names of the classes, those of the source.
        splits: The pictures of each split in the order of their paths; all are for training if there are no splits.
        left_out: Images that cannot be read and are left out, with what is wrong with them.
    """

    root: Path
    classes: tuple[str, ...]
    splits: Mapping[Split, Sequence[Picture]]
    left_out: Mapping[str, str] = field(default_factory=dict)

    def without(self, bad: Mapping[str, str]) -> TargetFolder:
        """Return the target without some images.

        Args:
            bad: Their paths, with what is wrong with them.

        Raises:
            DataError: If none is left to train with.
        """
        left = {split: [p for p in pictures if p.file not in bad] for split, pictures in self.splits.items()}
        if not left["train"]:
            raise DataError(f"None of the images of the target {self.root} can be read, so there is nothing to adapt to.")
        return replace(self, splits=left, left_out=dict(bad))

    def labelled(self, split: Split) -> bool:
        """Return whether there are pictures in a split, all of a known class."""
        return bool(self.splits[split]) and all(picture.label != UNKNOWN for picture in self.splits[split])

    def shots(self, number: int) -> list[int]:
        """Draw so many training pictures of each class, the same whenever they are asked for: positions in their list.

        Raises:
            DataError: If the labels are not known.
        """
        pictures = self.splits["train"]
        if number and not self.labelled("train"):
            raise DataError(
                f"data.target_shots {number} needs {number} labelled pictures of each class in the target, but {self.root} "
                "does not say the classes of its pictures. Arrange them as <class>/<picture>, or leave data.target_shots out."
            )
        drawn: list[int] = []
        for label in range(len(self.classes)):
            own = [place for place, picture in enumerate(pictures) if picture.label == label]
            drawn += sorted(own, key=lambda place: seed_of("shots", order(pictures[place].file)))[:number]
        return sorted(drawn)

    def summary(self) -> str:
        """Return a table of the pictures by split and, where they are known, classes."""
        rows = []
        for split in SPLITS:
            if self.splits[split]:
                counts = Counter(picture.label for picture in self.splits[split])
                known = [number for label, number in counts.items() if label != UNKNOWN]
                classes = f"{len(known)} of {len(self.classes)} ({min(known)} to {max(known)} each)" if known else "not known"
                rows.append([split, len(self.splits[split]), classes])
        return f"target {self.root}\n{tabulate(rows, ['split', 'pictures', 'classes'])}"


def scan_target(
    roots: Sequence[str | os.PathLike[str]], classes: tuple[str, ...], source: Path, labels: bool = True
) -> TargetFolder:
    """Find the pictures of a target domain.

    Args:
        roots: Its folders, or names of built-in data; several are taken together.
        classes: The classes of the source.
        source: The folder of the source.
        labels: Whether folders in it are classes; otherwise they are searched to the bottom, and labels are not known.

    Raises:
        DataError: If a folder is missing, is that of the source, holds no picture, or a class that the source does not know.
    """
    folders = [BUILT_IN[str(root)]() if str(root) in BUILT_IN else existing(Path(root).expanduser()) for root in roots]
    if not folders:
        raise DataError("Expected a target: name its folder with --data.target FOLDER.")
    for folder in folders:
        if folder.resolve() == source.resolve():
            raise DataError(f"Source and target are the same folder, {folder}. Name another with --data.target FOLDER.")
    base = folders[0] if len(folders) == 1 else Path(os.path.commonpath([folder.absolute() for folder in folders]))
    splits: dict[Split, list[Picture]] = {split: [] for split in SPLITS}
    for folder in folders:
        found = _pictures(folder, classes, labels)
        if not found["train"]:
            raise DataError(
                f"The target {folder} holds no picture to train with: expected files ending in "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}, in folders by class or directly in it."
            )
        for split, pictures in found.items():
            splits[split] += [Picture(_below(base, folder, picture.file), picture.label) for picture in pictures]
    return TargetFolder(base, classes, splits)


def _below(base: Path, folder: Path, file: str) -> str:
    return file if folder == base else os.path.relpath(folder.absolute() / file, base).replace(os.sep, "/")


def _pictures(folder: Path, classes: tuple[str, ...], labels: bool) -> dict[Split, list[Picture]]:
    """Return the pictures of each split of a folder, with paths below it."""
    found: dict[Split, list[Picture]] = {split: [] for split in SPLITS}
    skipped: Counter[str] = Counter()
    names, _ = subfolders(str(folder), skipped)
    if not labels or not any(True for name in names for _ in walk(str(folder / name), Counter())):
        inside = sorted(walk(str(folder), skipped), key=order)
        found["train"] = [Picture(file, UNKNOWN) for file in inside]
        return found
    for split, name in split_folders(folder, skipped).items():
        for each, files in sorted(read_classes(folder, name, skipped).items()):
            label = _label(each, classes, folder) if files else UNKNOWN
            found[split] += [Picture(file, label) for file in files]
    return found


def _label(name: str, classes: tuple[str, ...], folder: Path) -> int:
    if order(name) not in classes:
        raise DataError(
            f"The target {folder} holds '{name}', which is no class of the source.{did_you_mean(name, classes)} The source has "
            f"{', '.join(classes[:10])}{', …' if len(classes) > 10 else ''}. Rename or remove the folder; if folders of the "
            "target are no classes, set data.target_labels to false."
        )
    return classes.index(order(name))
