"""The verb `predict`: a trained model and pictures → a table with a row per picture, however many there are."""

from __future__ import annotations

import csv
import io
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from finetune.console import say
from finetune.errors import ConfigError, DataError
from finetune.escaping import cell
from finetune.predictor import Answer, Augmentations, Predictor
from finetune.rows import GrowingFile
from finetune.trained import describe_trained
from finetune.walk import Pictures

_LINES = (".jsonl", ".ndjson")
_COLUMNS = "label", "probability"


def predict_to_file(
    model: str,
    pictures: Sequence[str],
    out: str = "predictions.csv",
    files_from: str | None = None,
    topk: int = 3,
    probabilities: bool = False,
    embed: bool = False,
    tta: Augmentations = "none",
    temperature: float | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> None:
    """Do what `resnet-finetune predict` does. A run that was interrupted is continued by the same call.

    Args:
        model: What `Predictor` takes, or `last`.
        pictures: Folders, files and patterns.
        out: Where to write, .csv or .jsonl; it appears there when it is complete.
        files_from: A text file with the path of a picture on each line.
        topk: How many classes per picture.
        probabilities: Write the probabilities of all classes, too.
        embed: Write features instead of classes.
        tta: Test-time augmentation, see `Predictor`.
        temperature: What logits are divided by, see `Predictor`.
        batch_size: Pictures at a time.
        workers: Processes that read pictures; from the cores if None.
        device: A torch device, or `auto`.
        overwrite: Replace the output if it exists.

    Raises:
        ConfigError: If the output exists, or an option is out of range.
    """
    if topk < 1 or batch_size < 1:
        raise ConfigError(f"Expected --topk and --batch_size to be at least 1, found {topk} and {batch_size}.")
    predictor = Predictor(model, device=device, tta=tta, temperature=temperature, batch_size=batch_size)
    say(describe_trained(predictor.trained))
    places = Pictures(tuple(pictures), files_from)
    total = places.count()
    if workers is None and total <= batch_size:
        workers = 0
    options = {
        "model": _identity(predictor.trained.path),
        "pictures": [*pictures, *([f"--files_from {files_from}"] if files_from else [])],
        "temperature": predictor.trained.temperature,
        "topk": topk,
        "probabilities": probabilities,
        "embed": embed,
        "tta": tta,
    }
    encode = _Lines(predictor, options) if Path(out).suffix in _LINES else _Csv(predictor, options)
    table = GrowingFile(Path(out), options, overwrite)
    try:
        if table.rows and (found := next(itertools.islice(places, table.rows - 1, None), None)) != table.last:
            _refuse_other_pictures(table, found, overwrite)
        if table.rows:
            say(f"{table.partial} holds {table.rows} of {total} rows: going on from there.")
        else:
            table.append(encode.header(), 0, "")
        with tqdm(total=total, initial=table.rows, unit="picture", disable=None) as bar:
            for batch in predictor.stream(places, start=table.rows, embed=embed, workers=workers):
                table.append(encode(batch), len(batch), batch[-1].file, sum(bool(answer.error) for answer in batch))
                bar.update(len(batch))
        table.finish()
    except KeyboardInterrupt:
        say(f"\nStopped after {table.rows} of {total} pictures. The same command goes on from there.")
        raise
    finally:
        table.close()
    if total and table.failed == total:
        raise DataError(f"None of the {total} pictures can be read. The column 'error' of {out} says why.")
    unreadable = f", {table.failed} of them unreadable (see 'error')" if table.failed else ""
    say(f"{total} pictures{unreadable}: {out}")


class _Encoder(ABC):
    """Turns answers into the rows of a table.

    Args:
        predictor: Where the answers come from.
        options: Which columns there are: topk, probabilities, embed.
    """

    def __init__(self, predictor: Predictor, options: Mapping[str, Any]) -> None:
        self.predictor = predictor
        self.topk = 0 if options["embed"] else min(options["topk"], len(predictor.classes))
        self.all: Sequence[str] = ()
        if options["embed"]:
            self.all = [f"f{index}" for index in range(predictor.feature_width)]
        elif options["probabilities"]:
            self.all = [f"p:{name}" for name in predictor.classes]

    def header(self) -> bytes:
        """Return what stands before the rows."""
        return b""

    @abstractmethod
    def __call__(self, answers: Sequence[Answer]) -> bytes:
        """Return the rows of some answers."""


class _Csv(_Encoder):
    """A row of columns: file, label and probability of each rank, all probabilities or features, error."""

    def header(self) -> bytes:
        ranks = ["", *(f"_{rank}" for rank in range(2, self.topk + 1))][: self.topk]
        return self._rows([["file", *(f"{column}{rank}" for rank in ranks for column in _COLUMNS), *self.all, "error"]])

    def __call__(self, answers: Sequence[Answer]) -> bytes:
        return self._rows([self._cells(answer) for answer in answers])

    def _cells(self, answer: Answer) -> list[str]:
        if answer.values is None:
            return [cell(answer.file), *[""] * (2 * self.topk + len(self.all)), cell(answer.error)]
        best = self.predictor.top(answer, self.topk)
        pairs = zip(best.labels, best.probabilities, strict=True)
        top = [text for label, p in pairs for text in (cell(label), f"{p:.6f}")]
        return [cell(answer.file), *top, *(f"{value:.7g}" for value in (answer.values if self.all else ())), ""]

    @staticmethod
    def _rows(rows: list[list[str]]) -> bytes:
        text = io.StringIO()
        csv.writer(text).writerows(rows)
        return text.getvalue().encode("utf-8", "surrogateescape")


class _Lines(_Encoder):
    """A JSON object on each line."""

    def __call__(self, answers: Sequence[Answer]) -> bytes:
        return "".join(json.dumps(self._record(answer)) + "\n" for answer in answers).encode()

    def _record(self, answer: Answer) -> dict[str, Any]:
        record: dict[str, Any] = {"file": answer.file, "error": answer.error or None}
        if answer.values is None:
            return record
        values = [float(f"{value:.7g}") for value in answer.values] if self.all else []
        if not self.topk:
            return {**record, "features": values}
        best = self.predictor.top(answer, self.topk)
        top = [{"label": label, "probability": round(p, 6)} for label, p in zip(best.labels, best.probabilities, strict=True)]
        record |= {**top[0], "top": top}
        return {**record, "probabilities": dict(zip(self.predictor.classes, values, strict=True))} if self.all else record


def _identity(path: Path) -> list[Any]:
    """Return what tells a model from another one that takes its place."""
    file = path / "model.safetensors" if path.is_dir() else path
    return [str(path.resolve()), file.stat().st_size, file.stat().st_mtime_ns]


def _refuse_other_pictures(table: GrowingFile, found: str | None, overwrite: bool) -> None:
    if overwrite:
        return table.begin_anew()
    raise DataError(
        f"The pictures have changed since {table.partial} was begun: its last row, number {table.rows}, is of {table.last}, "
        f"and there is now {found or 'nothing'}. Restore them to go on, or give --overwrite to begin anew."
    )
