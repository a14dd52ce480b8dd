"""The verb `evaluate`: a trained model and labelled pictures → metrics with intervals, tables, calibration."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from finetune import checkpoints
from finetune.calibration import fit_temperature, scaled, store_temperature
from finetune.console import say
from finetune.content import contents
from finetune.errors import ConfigError, DataError
from finetune.escaping import cells, shown
from finetune.files import MARK, Unmarked, new_folder, require_free_folder
from finetune.folders import SPLITS, Split
from finetune.labelled import Labelled, own_pictures, pictures_in
from finetune.outcomes import Outcome, write_outcome
from finetune.predictor import Augmentations, Predictor
from finetune.report import write_report
from finetune.run_files import RunFiles
from finetune.run_split import trained_on
from finetune.runs import run_of
from finetune.scores import Interval, confused_pairs, confusion, ece, metrics, per_class, selective
from finetune.trained import describe_trained

THRESHOLDS = (0.5, 0.8, 0.9, 0.95, 0.99)
_MOST_ROWS = 30  # of a table on the console
_TABLES = frozenset({"confusion.csv", "metrics.json", "per_class.csv", "predictions.csv", "report.html"})
_OLDER = [Unmarked(_TABLES, "metrics.json", '"selective": [')]


def evaluate(
    model: str,
    folder: str | None = None,
    split: str | None = None,
    out: str | None = None,
    threshold: Sequence[float] = THRESHOLDS,
    calibrate: bool = False,
    tta: Augmentations = "none",
    temperature: float | None = None,
    resamples: int = 1000,
    batch_size: int = 64,
    workers: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> Path:
    """Do what `resnet-finetune evaluate` does.

    Args:
        model: What `Predictor` takes, or `last`.
        folder: <class>/<picture>, or {train,val,test}/<class>/<picture>; the pictures of the run itself if None.
        split: Which split of the folder: test where there is one, otherwise val, if None.
        out: The folder to write into; <run>/evaluation/<what was measured> if None.
        threshold: Confidences at which to say how many pictures would be answered, and how many of those rightly.
        calibrate: Fit the temperature on the run's validation pictures first and store it beside the checkpoint.
        tta: Test-time augmentation, see `Predictor`.
        temperature: What logits are divided by, see `Predictor`.
        resamples: How often pictures are drawn anew for the intervals.
        batch_size: Pictures at a time.
        workers: Processes that read pictures; from the cores if None.
        device: A torch device, or `auto`.
        overwrite: Replace the folder if it exists.

    Returns:
        The folder.

    Raises:
        ConfigError: If the folder to write into exists, or an option is out of range.
        DataError: If there are no labelled pictures, or of other classes.
    """
    wanted = _checked(split, threshold, resamples)
    reading: dict[str, Any] = {"tta": tta, "batch_size": batch_size, "device": device}
    predictor = Predictor(model, temperature=temperature, **reading)
    trained = predictor.trained
    say(describe_trained(trained))
    pictures = _pictures(predictor, folder, wanted)
    seen = 0 if folder is None else _count_trained_on(trained.path, pictures, workers)
    target = Path(out) if out else _place(trained.path, pictures)
    require_free_folder(target, overwrite, _OLDER)
    if calibrate:
        raw = Predictor(model, temperature=1.0, **reading)
        _calibrate(raw, workers, tell=folder is not None)
        predictor = Predictor(model, **reading)
    outcome = outcome_of(predictor, pictures, workers)
    found = metrics(outcome, resamples)
    report = {
        "model": str(trained.path),
        "pictures": pictures.name,
        "number": len(outcome),
        "trained_on": seen,
        "tta": tta,
        "temperature": predictor.trained.temperature,
        "metrics": {name: interval._asdict() for name, interval in found.items()},
        "selective": [dict(zip(_SELECTIVE, row, strict=True)) for row in _selective(outcome, threshold)],
    }
    with new_folder(target, overwrite, _OLDER) as partial:
        _write_tables(partial, outcome, report)
        files = RunFiles(run_of(trained.path) or target)
        files.outcomes = {pictures.name: outcome}
        write_report(files, partial / "report.html")
    say(shown(_text(outcome, found, threshold, pictures.name, predictor.trained.temperature), keep="\n"))
    say(f"files  {target}/  ({', '.join(sorted(path.name for path in target.iterdir() if path.name != MARK))})")
    return target


def outcome_of(predictor: Predictor, pictures: Labelled, workers: int | None = None) -> Outcome:
    """Predict labelled pictures, with a progress bar; those that cannot be read are named and left out.

    Raises:
        DataError: If none can be read.
    """
    known = dict(zip(pictures.files, pictures.labels, strict=True))
    workers = 0 if workers is None and len(known) <= predictor.batch_size else workers
    read, rows, failed = [], [], []
    with tqdm(total=len(known), unit="picture", disable=None) as bar:
        for batch in predictor.stream(pictures.files, workers=workers):
            for answer in batch:
                if answer.values is None:
                    failed.append(answer.error)
                else:
                    read.append(answer.file)
                    rows.append(answer.values)
            bar.update(len(batch))
    if not rows:
        raise DataError(f"None of the {len(known)} pictures of {pictures.name} can be read. The first: {failed[0]}")
    if failed:
        named = "\n  ".join(map(shown, failed[:5]))
        say(f"warning: {len(failed)} pictures cannot be read and are left out:\n  {named}")
    labels = np.array([known[file] for file in read], np.int64)
    probabilities = np.stack(rows).astype(np.float64)
    probabilities /= probabilities.sum(1, keepdims=True)  # float32 adds up to 1 only nearly
    return Outcome([os.path.abspath(file) for file in read], labels, probabilities, predictor.classes)


def _checked(split: str | None, threshold: Sequence[float], resamples: int) -> Split | None:
    if any(not 0 <= value <= 1 for value in threshold) or resamples < 0:
        raise ConfigError(
            f"Expected --threshold between 0 and 1 and --resamples of at least 0, found {threshold}, {resamples}."
        )
    chosen = next((each for each in SPLITS if each == split), None)
    if split is not None and chosen is None:
        raise ConfigError(f"Unknown split '{split}'. Expected {', '.join(SPLITS)}.")
    return chosen


def _pictures(predictor: Predictor, folder: str | None, split: Split | None) -> Labelled:
    if folder is not None:
        return pictures_in(folder, predictor.classes, split)
    predictor.trained.require_module()
    return own_pictures(predictor.trained.path, predictor.classes, split)


def _count_trained_on(model: Path, pictures: Labelled, workers: int | None) -> int:
    """Count the images that the model was trained on, by their content, and say so."""
    if not model.is_file() or run_of(model) is None:
        return 0
    files = [os.path.abspath(file) for file in pictures.files]
    found = contents(Path(os.sep), files, workers)
    seen = trained_on(model, [found[file].digest for file in files])
    if seen:
        say(
            f"warning: {seen} of the {len(files)} images were trained on, going by their content: the metrics are better than "
            "those of new images."
        )
    return seen


def _place(model: Path, pictures: Labelled) -> Path:
    name = "-".join(Path(pictures.name).name.split())
    return (run_of(model) or model.parent) / "evaluation" / name


def _calibrate(raw: Predictor, workers: int | None, tell: bool) -> None:
    """Fit and store the temperature of a checkpoint on its run's validation pictures."""
    raw.trained.require_module()
    path = raw.trained.path
    outcome = outcome_of(raw, own_pictures(path, raw.classes, "val", tell), workers)
    temperature = fit_temperature(outcome)
    before, after = ece(outcome), ece(scaled(outcome, temperature))
    details: dict[str, float | int | str] = {"pictures": len(outcome), "ece_before": before, "ece_after": after}
    file = store_temperature(path, temperature, int(checkpoints.read_own(path)["global_step"]), details)
    say(
        f"temperature {temperature:.4f}, fitted on {len(outcome)} validation pictures (ECE {before:.4f}, then {after:.4f}), is "
        f"stored in {file}: predict, evaluate and export use it."
    )


# ------------------------------------------------------------------------------------------------------------ the output


_SELECTIVE = ("threshold", "coverage", "accuracy")


def _selective(outcome: Outcome, thresholds: Iterable[float]) -> list[tuple[float, float, float | None]]:
    rows = [(threshold, *selective(outcome, threshold)) for threshold in thresholds]
    return [(threshold, coverage, None if math.isnan(accuracy) else accuracy) for threshold, coverage, accuracy in rows]


def _write_tables(folder: Path, outcome: Outcome, report: Mapping[str, Any]) -> None:
    write_outcome(outcome, folder / "predictions.csv")
    (folder / "metrics.json").write_text(json.dumps(report, indent=2) + "\n")
    columns = per_class(outcome)
    rows = [[name, *(f"{column[i]:.6g}" for column in columns.values())] for i, name in enumerate(outcome.classes)]
    _write_csv(folder / "per_class.csv", [["class", *columns], *rows])
    table = confusion(outcome).tolist()
    rows = [[name, *map(str, row)] for name, row in zip(outcome.classes, table, strict=True)]
    _write_csv(folder / "confusion.csv", [["true \\ taken for", *outcome.classes], *rows])


def _write_csv(path: Path, rows: Iterable[Sequence[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as handle:
        csv.writer(handle).writerows(cells(row) for row in rows)


def _text(outcome: Outcome, found: Mapping[str, Interval], thresholds: Iterable[float], name: str, temperature: float) -> str:
    """Return what the console shows."""
    heat = f", temperature {temperature:.3f}" if temperature != 1 else ""
    parts = [f"{name}: {len(outcome)} pictures of {len(outcome.classes)} classes{heat}"]
    rows = [(metric, f"{value:.4f}", f"{low:.4f} to {high:.4f}") for metric, (value, low, high) in found.items()]
    parts.append(
        tabulate(rows, ["metric", "value", "95 % interval"], disable_numparse=True, colalign=("left", "right", "left"))
    )
    columns = per_class(outcome)
    order = np.argsort(columns["recall"], kind="stable")[:_MOST_ROWS]
    shown = sorted(order) if len(outcome.classes) <= _MOST_ROWS else order
    table = [
        [outcome.classes[i], *(f"{columns[c][i]:.3f}" for c in columns if c != "support"), int(columns["support"][i])]
        for i in shown
    ]
    first = "class" if len(outcome.classes) <= _MOST_ROWS else f"class (lowest recall of {len(outcome.classes)})"
    parts.append(tabulate(table, [first, *columns], disable_numparse=True, colalign=("left", *["right"] * 4)))
    if pairs := confused_pairs(outcome, 5):
        named = [f"{outcome.classes[true]} for {outcome.classes[said]} ({times})" for true, said, times in pairs]
        parts.append(f"most often taken: {', '.join(named)}")
    answers = [
        (f"{threshold:g}", f"{coverage:.1%}", "-" if accuracy is None else f"{accuracy:.4f}")
        for threshold, coverage, accuracy in _selective(outcome, thresholds)
    ]
    if answers:
        parts.append(tabulate(answers, ["confidence at least", "answered", "accuracy of those"], disable_numparse=True))
    return "\n\n".join(parts) + "\n"
