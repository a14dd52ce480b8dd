"""Pictures that cannot be read, before training: they stop it, or are left out by choice.

Either is decided before the first step, on the whole folder, and remembered: all processes, all epochs, a resumed run, what was
kept of frozen stages, and validation then speak of the same pictures.
"""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from finetune import console
from finetune.errors import DataError
from finetune.escaping import cell, shown
from finetune.examined import examine_all
from finetune.files import write_atomically
from finetune.findings import Finding, Findings, told_briefly
from finetune.folders import SPLITS, Choose, Picture, PictureFolder, Split, Tree
from finetune.survey import survey

_NAMED = 5


SKIP = " Or train without them: --data.on_error skip."


def require_readable(root: Path, files: Sequence[str], workers: int | None = None, remedy: str = "") -> list[Finding]:
    """Look at the headers of pictures, which takes little time and is remembered; return what is odd about them.

    Args:
        root: The folder.
        files: Paths below it.
        workers: Processes that read; from the cores if None.
        remedy: What can be done beside replacing them.

    Raises:
        DataError: If a picture cannot be read.
    """
    bad: dict[str, str] = {}
    odd: list[Finding] = []
    for file, look in examine_all(root, files, full=False, workers=workers):
        if look.error:
            bad[file] = look.error
        odd += [Finding(kind, file) for kind, _ in look.notes]
    if bad:
        raise DataError(
            f"{len(bad)} of {len(files)} pictures of {root} cannot be read: {named(bad)}. Replace or remove them.{remedy} "
            f"{advice(root)}"
        )
    return odd


def look_before_training(folder: PictureFolder, workers: int | None = None, say: bool = True, remedy: str = SKIP) -> None:
    """Look at names and headers, see `require_readable`.

    Args:
        folder: What `scan` found.
        workers: Processes that read; from the cores if None.
        say: Print in a line what else may be wrong.
        remedy: What can be done beside replacing pictures.

    Raises:
        DataError: If a picture cannot be read.
    """
    files = [picture.file for split in SPLITS for picture in folder.splits[split]]
    odd = require_readable(folder.root, files, workers, remedy)
    if not say:
        return
    found = Findings(each for each in [*survey(folder.root).findings, *odd] if each.severity != "note")
    if found:
        console.say(f"check  {told_briefly(found.counts())}. {advice(folder.root)}")


def leaving_out(most: float, workers: int | None = None) -> Choose:
    """Return what `scan` needs to leave out pictures that cannot be read, and classes that are left without any.

    Every picture is decoded once, which is remembered.

    Args:
        most: The share of pictures that may be left out.
        workers: Processes that read; from the cores if None.
    """

    def choose(root: Path, trees: Mapping[Split, Tree]) -> tuple[dict[Split, Tree], dict[str, str]]:
        files = list(_files(trees, lambda split, label: True))
        bad = _damaged(root, files, workers)
        known = {label for label, inside in trees["train"].items() if any(file not in bad for file in inside)}
        unknown = _files(trees, lambda split, label: split != "train" and label not in known)
        bad |= dict.fromkeys((file for file in unknown if file not in bad), "unknown-class")
        _refuse_too_many(root, bad, len(files), most)
        left = {
            split: {label: [file for file in inside if file not in bad] for label, inside in tree.items() if label in known}
            for split, tree in trees.items()
        }
        return left, bad

    return choose


def unreadable(root: Path, files: Sequence[str], most: float, workers: int | None = None) -> dict[str, str]:
    """Return the images that cannot be read, with what is wrong with them; each is decoded once, which is remembered.

    Args:
        root: The folder.
        files: Paths below it.
        most: The share of them that may be left out.
        workers: Processes that read; from the cores if None.

    Raises:
        DataError: If there are more.
    """
    bad = _damaged(root, files, workers)
    _refuse_too_many(root, bad, len(files), most)
    return bad


def _damaged(root: Path, files: Sequence[str], workers: int | None) -> dict[str, str]:
    return {file: look.error for file, look in examine_all(root, files, full=True, workers=workers) if look.error}


def _refuse_too_many(root: Path, bad: Mapping[str, str], number: int, most: float) -> None:
    if len(bad) > most * number:
        raise DataError(
            f"{len(bad)} of {number} pictures of {root} cannot be used, more than data.max_errors allows ({most:.1%}): "
            f"{named(bad)}. Replace or remove them, or raise data.max_errors. {advice(root)}"
        )


def _files(trees: Mapping[Split, Tree], wanted: Callable[[Split, str], bool]) -> Iterator[str]:
    for split, tree in trees.items():
        for label, inside in tree.items():
            if wanted(split, label):
                yield from inside


class Reduced(Protocol):
    """Images of which some may have been left out: a `PictureFolder`, or the target of an adaptation."""

    @property
    def root(self) -> Path:
        """The folder that paths start from."""

    @property
    def splits(self) -> Mapping[Split, Sequence[Picture]]:
        """The images of each split."""

    @property
    def left_out(self) -> Mapping[str, str]:
        """Images that were left out, with what is wrong with them."""


def tell_left_out(folder: Reduced) -> None:
    """Say what was left out, if anything was."""
    if bad := folder.left_out:
        number = len(bad) + sum(len(pictures) for pictures in folder.splits.values())
        console.say(f"left out: {len(bad)} of {number} pictures ({len(bad) / number:.1%}): {named(bad)}. {advice(folder.root)}")


def write_left_out(folder: PictureFolder, path: Path) -> None:
    """Write down what was left out, if anything was: a CSV file with the columns file and kind."""
    if not folder.left_out:
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "kind"])
    writer.writerows([cell(file), kind] for file, kind in folder.left_out.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.getvalue().encode("utf-8", "surrogateescape"))


def named(bad: Mapping[str, str]) -> str:
    """Name the first of some files, with what is wrong with them.

    >>> named({"a/1.jpg": "truncated"})
    'a/1.jpg (truncated)'
    """
    first = [f"{shown(file)} ({kind})" for file, kind in list(bad.items())[:_NAMED]]
    return ", ".join(first) + (f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else "")


def advice(root: Path) -> str:
    """Say where all that is wrong is told."""
    return f"For all that is wrong: resnet-finetune check {shlex.quote(shown(str(root)))}"
