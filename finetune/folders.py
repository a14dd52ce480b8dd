"""From a folder of pictures to classes and splits, the same on every machine.

Two layouts are understood; pictures may lie anywhere below the folder of their class:

    root/{train,val,test}/<class>/**/<picture>      also training, valid, validation, testing, in upper or lower case
    root/<class>/**/<picture>                       split here

Classes are the folders of the training split in the order of their names, and the other splits are held to them: a class that a
split lacks leaves its number unused. A split made here is a function of (seed, path of the picture), so adding pictures
hardly moves the others.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple, TypeAlias

from tabulate import tabulate

from finetune.errors import DataError, did_you_mean
from finetune.escaping import shown
from finetune.images import IMAGE_SUFFIXES
from finetune.randomness import seed_of
from finetune.walk import UNREAD, existing, identity, order, subfolders, walk

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

NAMES: Mapping[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""What the folders of splits may be called, in lower case."""

_ARRANGE = "Arrange the pictures as {0}/<class>/<picture>, or as {0}/train/<class>/<picture> and {0}/val/<class>/<picture>."
Tree: TypeAlias = dict[str, list[str]]
"""Classes and the paths of their pictures."""


class Picture(NamedTuple):
    """A picture of a class.

    Attributes:
        file: Path below the root, with forward slashes.
        label: Number of its class.
    """

    file: str
    label: int


@dataclass(frozen=True)
class PictureFolder:
    """What `scan` found.

    Attributes:
        root: The folder.
        classes: Names of the classes; the position is the label.
        splits: The pictures of each split in the order of their paths.
        drawn: The splits that were not there as folders and were drawn from the training pictures.
        skipped: What was left out, and how often: "hidden", "not a picture", "broken link", "outside a class folder".
        left_out: Pictures that cannot be used, with the kind of damage, where these are to be left out.
    """

    root: Path
    classes: tuple[str, ...]
    splits: Mapping[Split, Sequence[Picture]]
    drawn: tuple[Split, ...]
    skipped: Mapping[str, int]
    left_out: Mapping[str, str] = field(default_factory=dict)

    def counts(self, split: Split) -> list[int]:
        """Return the number of pictures of each class."""
        found = Counter(picture.label for picture in self.splits[split])
        return [found[label] for label in range(len(self.classes))]


Choose: TypeAlias = Callable[[Path, Mapping[Split, Tree]], tuple[dict[Split, Tree], dict[str, str]]]
"""Divides what a folder holds into what can be used and what is left out, with the kind of damage."""


def scan(
    root: str | os.PathLike[str],
    val_fraction: float = 0.2,
    test_fraction: float = 0.0,
    split_seed: int = 0,
    choose: Choose | None = None,
) -> PictureFolder:
    """Find classes and pictures; draw the splits that have no folder of their own from the training pictures.

    Args:
        root: The folder.
        val_fraction: Share of each class to draw for validation if there is no folder for it.
        test_fraction: The same for the test.
        split_seed: Another seed draws other pictures.
        choose: Says what can be used; folders that cannot be read are then left out, too.

    Raises:
        DataError: If the folder is missing, arranged in no known way, holds fewer than two classes, an empty class, or a class
            in validation or test that training does not know.
    """
    folder = existing(Path(root).expanduser())
    skipped: Counter[str] = Counter()
    tolerant = choose is not None
    trees = {split: read_classes(folder, name, skipped, tolerant) for split, name in split_folders(folder, skipped).items()}
    left_out: dict[str, str] = {}
    if choose is not None:
        trees, left_out = choose(folder, trees)
    classes = _check_classes(folder, trees, skipped)
    fractions: dict[Split, float] = {"val": val_fraction, "test": test_fraction}
    missing: dict[Split, float] = {split: share for split, share in fractions.items() if split not in trees and share > 0}
    trees |= _draw(trees["train"], missing, split_seed)
    splits = {
        split: [Picture(file, label) for label, name in enumerate(classes) for file in trees.get(split, {}).get(name, [])]
        for split in SPLITS
    }
    return PictureFolder(folder, tuple(classes), splits, tuple(missing), dict(skipped), left_out)


def summary(folder: PictureFolder, most: int = 30) -> str:
    """Return a table of pictures per class and split, and what was skipped.

    Args:
        folder: What `scan` found.
        most: Up to this many classes are listed; more are summed up.
    """
    counts = {split: folder.counts(split) for split in SPLITS}
    if len(folder.classes) <= most:
        first = "class"
        rows = [[shown(name), *(counts[split][label] for split in SPLITS)] for label, name in enumerate(folder.classes)]
    else:
        first = f"{len(folder.classes)} classes"
        parts: dict[str, Callable[[list[int]], float]] = {"smallest": min, "median": median, "largest": max}
        rows = [[name, *(round(part(counts[split])) for split in SPLITS)] for name, part in parts.items()]
        smallest = sorted(range(len(folder.classes)), key=lambda label: counts["train"][label])[:5]
        rows += [[shown(folder.classes[label]), *(counts[split][label] for split in SPLITS)] for label in smallest]
    rows.append(["total", *(sum(counts[split]) for split in SPLITS)])
    heads = [f"{split} (drawn)" if split in folder.drawn else split for split in SPLITS]
    table = tabulate(rows, [first, *heads], disable_numparse=[0])
    skipped = ", ".join(f"{number} {kind}" for kind, number in sorted(folder.skipped.items()))
    return f"{shown(str(folder.root))}\n{table}" + (f"\nskipped: {skipped}.{unread_hint(folder.skipped)}" if skipped else "")


def unread_hint(skipped: Mapping[str, int]) -> str:
    """Return a sentence about images in formats that are not read, if there were some."""
    unread = [f"{number} {kind}" for kind, number in sorted(skipped.items()) if kind.startswith(UNREAD)]
    return f" {', '.join(unread)}: convert them to JPEG or PNG." if unread else ""


# ------------------------------------------------------------------------------------------------------------ the layout


def split_folders(root: Path, skipped: Counter[str]) -> dict[Split, str]:
    """Return the folder of each split below the root; pictures that are not split yet have the folder "" of `train`."""
    names, loose = subfolders(str(root), skipped)
    if not names and loose:
        raise DataError(f"{root} holds {loose} pictures but no class folders. {_ARRANGE.format(root)}")
    if not names:
        raise DataError(f"{root} holds no class folders. {_ARRANGE.format(root)}")
    skipped.update({"outside a class folder": loose} if loose else {})
    found = [name for name in names if name.lower() in NAMES]
    if not found or not _are_splits(root, names, found):
        return {"train": ""}
    layout: dict[Split, str] = {}
    for name in found:
        split = NAMES[name.lower()]
        if split in layout:
            raise DataError(f"{root} holds both '{layout[split]}' and '{name}': expected one folder for {split}. Remove one.")
        layout[split] = name
    if "train" not in layout:
        raise DataError(f"{root} holds {_list(found)} but no 'train'. {_ARRANGE.format(root)}")
    return layout


def _are_splits(root: Path, names: Sequence[str], found: Sequence[str]) -> bool:
    """Tell splits from classes that are called so, such as the vehicle `train` beside `car` and `bus`."""
    if len(found) == len(names):
        return True
    with_classes = [name for name in found if subfolders(str(root / name), Counter())[0]]
    if with_classes and {NAMES[name.lower()] for name in found} == {"train"}:
        others = [name for name in names if name not in found]
        raise DataError(
            f"{root} can be read in two ways: '{found[0]}' with folders of its own may be a split or a class beside "
            f"{_list(others)}. Move {_list(others)} away, or rename '{found[0]}' if it is a class."
        )
    return bool(with_classes)


def read_classes(root: Path, split: str, skipped: Counter[str], tolerant: bool = False) -> Tree:
    """Return the pictures of each class folder; paths are below the root and in order.

    Args:
        root: The folder.
        split: The folder of a split in it, or "" if it is not split.
        skipped: Counts what is left out, by kind.
        tolerant: Whether folders that cannot be opened are skipped, not refused.
    """
    top = root / split
    names, loose = subfolders(str(top), Counter() if not split else skipped)
    if split:
        skipped.update({"outside a class folder": loose} if loose else {})
        if not names and loose:
            raise DataError(f"{top} holds {loose} pictures but no class folders. {_ARRANGE.format(root)}")
    above = {identity(str(root)), identity(str(top))}
    tree: Tree = {}
    for name in names:
        prefix = f"{split}/{name}/" if split else f"{name}/"
        files = [prefix + file for file in walk(str(top / name), skipped, above, tolerant)]
        tree.setdefault(unicodedata.normalize("NFC", name), []).extend(files)
    return {name: sorted(files, key=order) for name, files in tree.items()}


def _check_classes(root: Path, trees: Mapping[Split, Tree], skipped: Mapping[str, int]) -> list[str]:
    classes = sorted(trees["train"])
    if empty := [name for name in classes if not trees["train"][name]]:
        raise DataError(
            f"In the training pictures of {root}, {_list(empty)} holds no picture. Add some (files ending in "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}) or remove the folder.{unread_hint(skipped)}"
        )
    if len(classes) < 2:
        raise DataError(f"{root} holds {len(classes)} class ({_list(classes)}), expected at least 2. {_ARRANGE.format(root)}")
    for split in ("val", "test"):
        unknown = [name for name, files in trees.get(split, {}).items() if files and name not in trees["train"]]
        if unknown:
            raise DataError(
                f"The {split} split of {root} holds {_list(unknown)}, which is no class of the training split."
                f"{did_you_mean(unknown[0], classes)} Rename or remove it, or add training pictures of that class."
            )
    return classes


def _list(names: Iterable[str], most: int = 5) -> str:
    quoted = [f"'{name}'" for name in names]
    return ", ".join(quoted[:most]) + (f" and {len(quoted) - most} more" if len(quoted) > most else "")


# -------------------------------------------------------------------------------------------------------------- the draw


def _draw(train: Tree, fractions: Mapping[Split, float], seed: int) -> dict[Split, Tree]:
    """Draw validation pictures from one end of each class in the order of hashes, test pictures from the other."""
    drawn: dict[Split, Tree] = {split: {} for split in ("train", *fractions)}
    for name, files in train.items():
        drawing = sorted(files, key=lambda file: (seed_of(seed, order(file)), file))
        val = _share(len(files), fractions.get("val", 0), len(files) - 1)
        test = _share(len(files), fractions.get("test", 0), len(files) - 1 - val)
        parts = {"val": drawing[:val], "test": drawing[len(files) - test :], "train": drawing[val : len(files) - test]}
        for split, tree in drawn.items():
            tree[name] = sorted(parts[split], key=order)
    return drawn


def _share(number: int, fraction: float, most: int) -> int:
    """Return a rounded share: at least 1 and at most `most`, and 0 where nothing is asked for or can be spared."""
    return min(max(1, round(number * fraction)), max(0, most)) if fraction > 0 else 0
