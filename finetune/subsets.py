"""Fewer pictures, or other splits of them, to see what a way of training does with them: shots, a fraction, folds.

All of them are functions of (seed, path of the picture), class by class; with one seed, the pictures of 5 shots are among those
of 20.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from finetune.errors import ConfigError, DataError
from finetune.folders import Picture, PictureFolder, Split
from finetune.randomness import seed_of
from finetune.walk import order


def drawing(pictures: Sequence[Picture], seed: int) -> list[list[Picture]]:
    """Return the pictures class by class, each in the order in which they are drawn."""
    classes: dict[int, list[Picture]] = {}
    for picture in sorted(pictures, key=lambda picture: (seed_of(seed, "subset", order(picture.file)), picture.file)):
        classes.setdefault(picture.label, []).append(picture)
    return [classes[label] for label in sorted(classes)]


def fewer(folder: PictureFolder, shots: int | None, fraction: float, seed: int) -> PictureFolder:
    """Return the folder with fewer training pictures; validation and test stay whole.

    Args:
        folder: What was found.
        shots: Training pictures of each class; None for all.
        fraction: Share of the training pictures of each class, at least one.
        seed: Another seed draws other pictures.

    Raises:
        DataError: If a class has fewer pictures than shots.
    """
    if shots is None and fraction == 1:
        return folder
    classes = drawing(folder.splits["train"], seed)
    few = [c for c in classes if shots is not None and len(c) < shots]
    if few:
        raise DataError(
            f"data.shots asks for {shots} training pictures of each class, but '{folder.classes[few[0][0].label]}' has "
            f"{len(few[0])} ({len(few)} classes have too few). Lower data.shots."
        )
    number: Callable[[int], int] = (lambda n: shots) if shots is not None else (lambda n: max(1, round(fraction * n)))
    return _with(folder, {"train": [picture for c in classes for picture in c[: number(len(c))]]})


def fold_of(folder: PictureFolder, folds: int, fold: int, seed: int) -> PictureFolder:
    """Return the folder split anew for cross-validation: one fold validates, the others train; the test split stays.

    The folds are stratified: in each, the pictures of a class are as many as in the others, give or take one.

    Args:
        folder: What was found; its training and validation pictures are put together.
        folds: Number of folds.
        fold: Which of them validates, from 1.
        seed: Another seed makes other folds.

    Raises:
        DataError: If a class has fewer pictures than there are folds.
    """
    classes = drawing([*folder.splits["train"], *folder.splits["val"]], seed)
    smallest = min(classes, key=len)
    if len(smallest) < folds:
        raise DataError(
            f"data.folds asks for {folds} folds, but the class '{folder.classes[smallest[0].label]}' has "
            f"{len(smallest)} pictures. Lower data.folds or add pictures."
        )
    train: list[Picture] = []
    val: list[Picture] = []
    first = 0
    for pictures in classes:  # the folds that get one more than others take turns
        for position, picture in enumerate(pictures):
            (val if (first + position) % folds == fold - 1 else train).append(picture)
        first += len(pictures)
    return replace(_with(folder, {"train": train, "val": val}), drawn=tuple({*folder.drawn, "val"}))


def check_subset(shots: int | None, fraction: float, folds: int | None, fold: int | None) -> None:
    """Check the options `data.shots`, `fraction`, `folds` and `fold`.

    Raises:
        ConfigError: If one is out of its range, or they contradict each other.
    """
    if shots is not None and (shots < 1 or fraction != 1):
        raise ConfigError(f"Expected data.shots to be at least 1, and not beside data.fraction; found {shots} and {fraction}.")
    if not 0 < fraction <= 1:
        raise ConfigError(f"Expected data.fraction to be above 0 and at most 1, found {fraction}.")
    if folds is not None and folds < 2:
        raise ConfigError(f"Expected data.folds to be at least 2, found {folds}.")
    if fold is not None and (folds is None or not 1 <= fold <= folds):
        raise ConfigError(f"Expected data.fold to be between 1 and data.folds ({folds}), found {fold}.")


def _with(folder: PictureFolder, parts: dict[Split, list[Picture]]) -> PictureFolder:
    ordered = {split: sorted(found, key=lambda p: (p.label, order(p.file))) for split, found in parts.items()}
    return replace(folder, splits={**folder.splits, **ordered})
