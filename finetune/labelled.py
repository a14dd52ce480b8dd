"""Labelled pictures to measure a trained model on: those of its own run, or any folder with its classes."""

from __future__ import annotations

import inspect
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from finetune import checkpoints
from finetune.data import FolderDataModule
from finetune.errors import DataError, did_you_mean
from finetune.folders import SPLITS, Split, read_classes, split_folders
from finetune.run_split import split_in
from finetune.walk import existing

_OF_ADAPTATION = {"target", "target_labels", "target_shots", "steps_per_epoch"}
"""Options of adaptation in checkpoints of earlier versions, which did not say how their images are found."""


class Labelled(NamedTuple):
    """Pictures and their labels.

    Attributes:
        root: The folder that they lie in.
        name: What they are, such as `photos test`.
        files: Paths.
        labels: Numbers of their classes.
    """

    root: Path
    name: str
    files: list[str]
    labels: list[int]


def data_of(checkpoint: Path) -> FolderDataModule | None:
    """Return the data that the run of a checkpoint was trained on; None if they were no folder, or are no longer there."""
    content = checkpoints.read_own(checkpoint)
    options = _folder_options(content)
    if options is None:
        return None
    data = FolderDataModule(**{**options, "reuse": "off", "decoded": None})
    try:
        found = bool(data.classes)
    except DataError:
        return None
    data.continue_from(split_in(checkpoint, content))
    return data if found else None


def _folder_options(content: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the options that find the labelled images of a checkpoint's run; None if they lay in no folder."""
    known = set(inspect.signature(FolderDataModule.__init__).parameters) - {"self"}
    stamped = content[checkpoints.KEY].get("data") or {}
    options = stamped.get("folder") if stamped else content.get("datamodule_hyper_parameters")
    if not options or "root" not in options or not set(options) <= known | _OF_ADAPTATION:
        return None
    return {name: value for name, value in options.items() if name in known}


def why_no_images(checkpoint: Path) -> str:
    """Return why the labelled images of a checkpoint's run cannot be read, as the beginning of a sentence."""
    content = checkpoints.read_own(checkpoint)
    stamped = content[checkpoints.KEY].get("data") or {}
    options = _folder_options(content)
    if options is not None:
        return f"The images that {checkpoint} was trained on are not in {options['root']} any more"
    if "pictures" in (content.get("datamodule_hyper_parameters") or {}):
        return f"{checkpoint} was distilled on images without labels"
    if stamped:
        return f"The images that {checkpoint} was trained on came from the data module {stamped['class']}, not from a folder"
    return f"{checkpoint} does not say which folder its images were in"


def own_pictures(checkpoint: Path, classes: tuple[str, ...], split: Split | None = None, tell: bool = True) -> Labelled:
    """Return pictures of the run of a checkpoint.

    Args:
        checkpoint: The checkpoint.
        classes: Its classes.
        split: Which; if None, test where there is one, otherwise val.
        tell: Whether to print how they differ from those of the run.

    Raises:
        DataError: If they are not there, or are of other classes.
    """
    data = data_of(checkpoint)
    if data is None:
        raise DataError(f"{why_no_images(checkpoint)}. Name a folder with its classes, as in evaluate RUN FOLDER.")
    if tuple(data.classes) != classes:
        raise DataError(
            f"{data.root} has changed since the run: its classes are now {', '.join(data.classes)}. Name another folder, as in "
            "evaluate RUN FOLDER."
        )
    split = split or ("test" if data.has_test else "val")
    files = [str(path) for path in data.files(split)]
    if tell:
        data.tell_changes()
    if not files:
        raise DataError(f"{data.root} has no pictures in the split '{split}'. Give another --split, or name a folder.")
    return Labelled(data.folder.root, f"{data.root} {split}", files, data.labels(split))


def pictures_in(root: str | os.PathLike[str], classes: tuple[str, ...], split: Split | None = None) -> Labelled:
    """Return the pictures of a folder <class>/<picture>, or of a split of a folder {train,val,test}/<class>/<picture>.

    Labels are those of the model, by name; a class that the folder lacks is no mistake.

    Args:
        root: The folder.
        classes: The classes of the model.
        split: Which; if None, test where there is one, otherwise val.

    Raises:
        DataError: If the folder is missing, has no such split, or holds a class that the model does not know.
    """
    folder = existing(Path(root).expanduser())
    skipped: Counter[str] = Counter()
    splits = split_folders(folder, skipped)
    if splits == {"train": ""}:
        if split is not None:
            raise DataError(f"{folder} is not split into train, val and test: leave --split out to measure on all of it.")
        sub, name = "", str(root)
    else:
        wanted = split or next((each for each in reversed(SPLITS) if each in splits), "train")
        if wanted not in splits:
            raise DataError(f"{folder} has no split '{wanted}', it has: {', '.join(splits)}. Give another --split.")
        sub, name = splits[wanted], f"{root} {wanted}"
    files, labels = _labelled(folder, sub, classes, skipped)
    return Labelled(folder / sub, name, files, labels)


def _labelled(root: Path, split: str, classes: tuple[str, ...], skipped: Counter[str]) -> tuple[list[str], list[int]]:
    number = {each: label for label, each in enumerate(classes)}
    folder = root / split
    files: list[str] = []
    labels: list[int] = []
    for found, inside in sorted(read_classes(root, split, skipped).items()):
        label = number.get(found)
        if label is None and inside:
            raise DataError(
                f"{folder} holds '{found}', which is no class of the model.{did_you_mean(found, classes)} It knows "
                f"{', '.join(classes[:10])}{', …' if len(classes) > 10 else ''}. Rename or remove the folder."
            )
        if label is not None:
            files += [str(root / file) for file in inside]
            labels += [label] * len(inside)
    if not files:
        raise DataError(f"{folder} holds no picture of a class of the model: expected <class>/<picture>.")
    return files, labels
