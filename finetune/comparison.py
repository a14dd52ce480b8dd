"""Several runs side by side: what differs in their options, their curves over each other, and which is best at what."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from finetune import scores
from finetune.curve_figures import named_curves
from finetune.durations import duration
from finetune.errors import ConfigError
from finetune.figure_style import style_of
from finetune.figures import split_metrics
from finetune.page import drawn, render, require_own_page, value_text, write_page
from finetune.report import REPORT, warn_of_unreadable, write_report
from finetune.run_files import OF_TARGET, Curve, RunFiles, find_run, flat

COMPARISON = "comparison.html"
_SMALLER = ("loss", "nll", "brier", "ece", "time")  # of these, less is better
_UNTOLD = ("run.", "trainer.logger", "trainer.callbacks", "trainer.default_root_dir", "ckpt_path", "config")
_MOST_CURVES = 6


def compare(runs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str] = COMPARISON, overwrite: bool = False) -> Path:
    """Write a page that compares runs.

    Args:
        runs: Their folders, two or more.
        out: Where to write; a page of this package is replaced.
        overwrite: Replace any file.

    Returns:
        The file.

    Raises:
        ConfigError: If there are fewer than two runs, the page cannot be written, or another file is there.
    """
    files = [RunFiles(run) for run in dict.fromkeys(Path(run).absolute() for run in runs)]
    if len(files) < 2:
        raise ConfigError(f"Expected at least two different runs to compare, found {len(files)}. Name another one.")
    path = Path(out)
    require_own_page(path, overwrite)
    written = write_page(path, render("comparison.html", **content(files, path.absolute().parent)), overwrite)
    warn_of_unreadable(files)
    return written


def report(runs: Sequence[str], out: str | None = None, overwrite: bool = False) -> Path:
    """Do what `resnet-finetune report` does: write the report of a run, or compare several.

    Args:
        runs: Folders, or `last`.
        out: Where to write; a page of this package is replaced.
        overwrite: Replace any file.

    Raises:
        CheckpointError: If one of them is no run.
        ConfigError: If the page cannot be written, or another file is there.
    """
    folders = [find_run(run, Path("runs")) for run in runs]
    if len(folders) == 1:
        return write_report(folders[0], out, overwrite)
    return compare(folders, out or COMPARISON, overwrite)


def content(files: Sequence[RunFiles], beside: Path) -> dict[str, Any]:
    """Return what the template of the comparison shows.

    Args:
        files: The runs.
        beside: The folder of the page, from where it links to the reports.
    """
    names = run_names([run.folder for run in files])
    curves = _curves(dict(zip(names, files, strict=True)))
    figures = {f"curve-{number}": named_curves(metric, lines) for number, (metric, lines) in enumerate(curves.items())}
    return {
        "runs": [_run(number, name, run, beside) for number, (name, run) in enumerate(zip(names, files, strict=True))],
        "different": _different(files),
        "results": list(_results(files)),
        "adapted": any(name.startswith(OF_TARGET) for run in files for name in run.metrics),
        "figures": drawn(figures),
        "options": list(differences([dict(flat(run.config)) for run in files])),
        "classes": list(_classes(files)),
    }


def run_names(folders: Sequence[Path]) -> list[str]:
    """Name runs by the last parts of their paths, as many as tell them apart.

    >>> run_names([Path("runs/small/1"), Path("runs/small/2")]), run_names([Path("a/runs/x/1"), Path("b/runs/x/1")])
    (['small/1', 'small/2'], ['a/runs/x/1', 'b/runs/x/1'])
    """
    parts = [folder.parts for folder in folders]
    for length in range(2, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def differences(options: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the options that are not the same in all runs, with the value in each; where runs are kept is left out.

    Args:
        options: The options of each run, by their dotted names.
    """
    for name in sorted({name for each in options for name in each}):
        values = [value_text(each[name]) if name in each else None for each in options]
        if len(set(values)) > 1 and not name.startswith(_UNTOLD):
            yield {"name": name, "values": values}


def _different(files: Sequence[RunFiles]) -> str:
    """Say so if the runs were measured on different pictures."""
    data = [run.record.get("data") or {} for run in files]
    known = {each.get("fingerprint") for each in data} - {None}
    if len(known) < 2:
        return ""
    roots = sorted({str(each.get("root")) for each in data})
    where = f" ({', '.join(roots)})" if len(roots) > 1 else ", though they lay in the same folder"
    return f"These runs were trained and measured on different pictures{where}: which value is better says little."


def _run(number: int, name: str, run: RunFiles, beside: Path) -> dict[str, Any]:
    report = run.folder / REPORT
    link = quote(Path(os.path.relpath(report, beside)).as_posix()) if report.is_file() else ""
    return {"name": name, "state": run.record.get("state") or "", "link": link, "colour": style_of(number)["color"]}


def _results(files: Sequence[RunFiles]) -> Iterator[dict[str, Any]]:
    """Yield a row for each metric, with the value of each run and whether it is the best."""
    values = [_values(run) for run in files]
    adapted = any(name.startswith(OF_TARGET) for each in values for name in each)
    for metric in dict.fromkeys(name for each in values for name in each):
        row = [each.get(metric, float("nan")) for each in values]
        shown = [_shown(metric, value) for value in row]
        of_source = adapted and metric.partition("/")[0] in ("val", "test")  # which says little of who does better there
        best = set() if of_source else _best(metric, shown, row)
        cells = [{"text": text, "best": number in best} for number, text in enumerate(shown)]
        yield {"name": metric, "cells": cells}


def _values(run: RunFiles) -> dict[str, float]:
    found = _in_order_of_weight(run.at_best(), run.monitor[0])
    for split, outcome in run.outcomes.items():
        found[f"{split}/ece"] = scores.ece(outcome)
    found["epochs"] = run.epochs_done
    if run.record.get("seconds"):
        found["time"] = float(run.record["seconds"])
    return found


def _in_order_of_weight(found: Mapping[str, float], monitor: str) -> dict[str, float]:
    """Return metrics with those of the target first, where there is one, then the metric that chose the checkpoint."""
    order = sorted(found, key=lambda name: (not name.startswith(OF_TARGET), name != monitor))
    return {name: found[name] for name in order}


def _best(metric: str, shown: Sequence[str], row: Sequence[float]) -> set[int]:
    """Return the places of the best values: equal ones as they are shown are equally good, and all equal is no difference."""
    if metric == "epochs" or len({text for text in shown if text}) < 2:
        return set()
    best = int(np.nanargmin(row) if metric.rpartition("/")[2] in _SMALLER else np.nanargmax(row))
    return {place for place, text in enumerate(shown) if text == shown[best]}


def _shown(metric: str, value: float) -> str:
    if value != value:
        return ""
    return duration(value) if metric == "time" else f"{value:.0f}" if metric == "epochs" else f"{value:.4f}"


def _curves(runs: Mapping[str, RunFiles]) -> dict[str, dict[str, Curve]]:
    """Return the curves of each metric, by run; runs without a whole epoch have none."""
    found: dict[str, dict[str, Curve]] = {}
    for name, run in runs.items():
        losses, shares = split_metrics(run.metrics) if run.unit == "epoch" else ({}, {})
        for metric, curve in {**losses, **shares}.items():
            found.setdefault(metric, {})[name] = curve
    order = sorted(found, key=lambda metric: (metric.startswith("train/"), not metric.endswith(("/acc", "/loss"))))
    return {metric: found[metric] for metric in order[:_MOST_CURVES]}


def _classes(files: Sequence[RunFiles]) -> Iterator[dict[str, Any]]:
    """Yield the F1 of each class in each run, where all runs were measured on the same classes and the same kind of split."""
    splits = [split for split in ("test", "val") if all(split in run.outcomes for run in files)]
    if not splits or len({run.outcomes[splits[0]].classes for run in files}) > 1:
        return
    outcomes = [run.outcomes[splits[0]] for run in files]
    table = np.array([scores.per_class(outcome)["f1"] for outcome in outcomes]).T
    for name, row in zip(outcomes[0].classes, table, strict=True):
        top = row.max() if row.max() > row.min() else np.inf
        yield {"name": name, "split": splits[0], "cells": [{"value": float(value), "best": value == top} for value in row]}
