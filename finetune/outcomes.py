"""What a model said of labelled pictures: one table that metrics, figures and reports are made from."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from finetune.errors import DataError
from finetune.escaping import cell, cells, from_cell, shown
from finetune.files import atomic_write
from finetune.schema import read_text

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]

_FIRST = ["file", "true", "label", "probability"]
_CLASS = "p:"
_MOST_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Outcome:
    """Labelled pictures and the probabilities that a model gave to each class.

    Attributes:
        files: The pictures.
        labels: Numbers of their true classes, (N,).
        probabilities: (N, C), each row adds up to 1.
        classes: Names of the classes.
    """

    files: Sequence[str]
    labels: Ints
    probabilities: Floats
    classes: tuple[str, ...]

    @property
    def predicted(self) -> Ints:
        """The number of the most probable class of each picture, (N,)."""
        return np.asarray(self.probabilities.argmax(1), np.int64)

    @property
    def confidence(self) -> Floats:
        """The probability of that class, (N,)."""
        return np.asarray(self.probabilities.max(1), np.float64)

    def __len__(self) -> int:
        return len(self.labels)


def write_outcome(outcome: Outcome, path: Path) -> None:
    """Write the table as a CSV file; it appears when it is complete.

    Its columns are file, true, label (the most probable class) and its probability, then one per class. Names that a
    spreadsheet would take for a formula are written behind an apostrophe, see `escaping.cell`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial, partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as handle:
        writer = csv.writer(handle)
        writer.writerow([*_FIRST, *(f"{_CLASS}{name}" for name in outcome.classes)])
        for file, true, best, row in zip(outcome.files, outcome.labels, outcome.predicted, outcome.probabilities, strict=True):
            shares = [f"{value:.9g}" for value in row]
            writer.writerow([*cells([file, outcome.classes[true], outcome.classes[best]]), shares[best], *shares])


def read_outcome(path: str | os.PathLike[str]) -> Outcome:
    """Read a table that `write_outcome` wrote.

    Raises:
        DataError: If it is missing or another kind of table.
    """
    text = read_text(
        path, "a table of labelled predictions", error=DataError, max_bytes=_MOST_BYTES, errors="surrogateescape", follow=False
    )
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        header = next(reader, [])
        rows = list(reader)
    except csv.Error as error:
        raise DataError(f"{path} is no table of labelled predictions: line {reader.line_num}: {error}.") from error
    classes = tuple(name.removeprefix(_CLASS) for name in header[len(_FIRST) :])
    number = {cell(name): index for index, name in enumerate(classes)}
    try:
        if header[: len(_FIRST)] != _FIRST or not classes or len(number) < len(classes):
            raise ValueError(f"its columns are {shown(', '.join(header[:6]))[:200] or 'missing'}")
        labels = np.array([number[row[1]] for row in rows], np.int64)
        values = np.array([row[len(_FIRST) :] for row in rows], np.float64).reshape(len(rows), len(classes))
        wrong = np.flatnonzero(~(np.abs(values.sum(1) - 1) < 0.01) | (values < 0).any(1))
        if len(wrong):
            raise ValueError(f"probabilities in row {wrong[0] + 1} that do not add up to 1")
    except (ValueError, KeyError, IndexError) as error:
        raise DataError(
            f"{path} is no table of labelled predictions: expected the columns {', '.join(_FIRST)} and one "
            f"'{_CLASS}<class>' for each class, found: {error}. Write it again with: resnet-finetune evaluate"
        ) from error
    return Outcome([from_cell(row[0]) for row in rows], labels, values, classes)
