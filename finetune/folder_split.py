"""The images of a folder as a run's table knows them, and the folder divided as a table says."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from finetune.content import Content, contents
from finetune.folders import SPLITS, Picture, PictureFolder, Split
from finetune.split_changes import Image
from finetune.split_table import Role
from finetune.walk import order


def images_of(
    found: PictureFolder, used: PictureFolder, drawn: Collection[Split], hashed: bool = True, workers: int | None = None
) -> list[Image]:
    """Return all images of a folder, how they are used, and their content.

    Args:
        found: The whole folder.
        used: The folder as a run uses it, perhaps with fewer images or divided otherwise.
        drawn: The splits that no folder says.
        hashed: Whether to hash the files.
        workers: Threads that read; from the cores if None.
    """
    files = [picture.file for split in SPLITS for picture in found.splits[split]]
    hashes = contents(found.root, files, workers) if hashed else {}
    splits: dict[str, Split] = {picture.file: split for split in SPLITS for picture in used.splits[split]}
    return [
        Image(
            picture.file,
            found.classes[picture.label],
            splits.get(picture.file),
            not (split in drawn or (split == "train" and drawn)),
            *hashes.get(picture.file, Content(0, "")),
        )
        for split in SPLITS
        for picture in found.splits[split]
    ]


def with_roles(
    found: PictureFolder, images: Sequence[Image], roles: Mapping[str, Role], drawn: Collection[Split]
) -> PictureFolder:
    """Return a folder divided by the roles of its images."""
    number = {name: label for label, name in enumerate(found.classes)}
    splits: dict[Split, Sequence[Picture]] = {}
    for split in SPLITS:
        inside = [Picture(image.file, number[image.label]) for image in images if roles[image.file] == split]
        splits[split] = sorted(inside, key=lambda picture: (picture.label, order(picture.file)))
    return replace(found, splits=splits, drawn=tuple(split for split in SPLITS if split in drawn))
