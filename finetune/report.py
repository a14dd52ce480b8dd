"""The report of a run: one HTML file with what was trained, on what, how it went, and where it goes wrong."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from finetune import scores
from finetune.console import say
from finetune.durations import duration
from finetune.figures import of_run
from finetune.files import read_plain
from finetune.outcomes import Outcome
from finetune.page import drawn, render, require_own_page, value_text, write_page
from finetune.run_files import AUGMENTED, EXPLAINED, RunFiles, flat
from finetune.runs import CHECKPOINTS, CONFIG, as_typed
from finetune.thumbnails import data_uri, thumbnail

REPORT = "report.html"
_MOST_BYTES = 2**25  # of an image that is shown as it is
MISTAKES = 24
_RESAMPLES, _MOST_CELLS = 200, 2_000_000  # pictures times classes up to which intervals take a moment only
_METRICS = {
    "acc": "share of the pictures that is right",
    "acc_macro": "mean recall of the classes",
    "f1": "mean F1 of the classes",
    "precision": "mean precision of the classes",
    "acc_top5": "the right class is among the five most probable",
    "auroc": "area under the ROC curve, mean of the classes",
    "nll": "negative log-likelihood; less is better",
    "brier": "squared error of the probabilities; less is better",
    "ece": "expected calibration error; less is better",
}
_OPTIONS = {
    "teacher": ("data.teacher", "data.teacher_weights"),
    "freezing policy": ("model.freezing",),
    "BatchNorm": ("model.bn",),
    "optimizer": ("model.optimizer", "model.optimizer_args", "model.weight_decay"),
    "learning rate": ("model.lr", "model.lr_decay", "model.lr_scale", "model.schedule", "model.warmup_epochs"),
    "augmentation": ("data.augment", "data.hflip"),
    "label smoothing": ("model.label_smoothing",),
    "batch": ("data.batch_size", "trainer.accumulate_grad_batches", "trainer.precision"),
    "seed": ("seed_everything",),
}


def write_report(
    run: str | os.PathLike[str] | RunFiles, out: str | os.PathLike[str] | None = None, overwrite: bool = False
) -> Path:
    """Write the report of a run, which may be going on, have ended, or have been killed.

    Args:
        run: The run's folder, or its files.
        out: Where to write; `report.html` in the run's folder if None. That one and other pages of this package are replaced.
        overwrite: Replace any file.

    Returns:
        The file.

    Raises:
        ConfigError: If it cannot be written, or another file is there.
    """
    files = run if isinstance(run, RunFiles) else RunFiles(run)
    path = Path(out or files.folder / REPORT)
    overwrite = overwrite or path.absolute() == files.folder.absolute() / REPORT
    require_own_page(path, overwrite)
    path = write_page(path, render("report.html", **content(files)), overwrite)
    warn_of_unreadable([files])
    return path


def warn_of_unreadable(runs: Iterable[RunFiles]) -> None:
    """Name the files of runs that a page is without, as they hold something else than they should."""
    for files in runs:
        for message in files.unreadable.values():
            say(f"warning: {message} The page is without it.", error=True)


def content(files: RunFiles) -> dict[str, Any]:
    """Return what the template of the report shows."""
    figures = drawn(of_run(files, pictures=False))
    outcome = next(iter(files.outcomes.values()), None)
    wrong = 0 if outcome is None else int((outcome.predicted != outcome.labels).sum())
    rows = _metric_rows(files)
    return {
        "name": f"{files.folder.absolute().parent.name}/{files.folder.absolute().name}",
        "path": as_typed(files.folder),
        "state": files.record.get("state"),
        "updated": _updated(files),
        "headline": _headline(files),
        "lead": _lead(files),
        "error": files.record.get("error"),
        "warnings": [str(text) for text in files.record.get("warnings") or []],
        "numbers": list(_numbers(files)),
        "facts": list(_facts(files)),
        "stages": list(_stages(files)),
        "phases": list(_phases(files)),
        "target_shots": ((files.record.get("data") or {}).get("target") or {}).get("shots") or 0,
        "augmented": _picture(files, AUGMENTED),
        "explained": _picture(files, EXPLAINED),
        "figures": figures,
        "training_figures": any(name in figures for name in ("loss", "metrics", "learning_rates", "gradient_flow")),
        "splits": list(_splits(files)),
        "metric_rows": rows,
        "intervals": any(cell["range"] for row in rows for cell in row["cells"]),
        "classes": [] if outcome is None else list(_classes(outcome)),
        "mistakes": [] if outcome is None else list(_mistakes(outcome, files)),
        "wrong": wrong,
        "commands": list(_commands(files)),
        "config": files.config_text,
        "versions": list(_versions(files)),
        "unreadable": list(files.unreadable.values()),  # the last, as each file is read when something needs it
    }


# -------------------------------------------------------------------------------------------------------------- the head


def _headline(files: RunFiles) -> str:
    name, value = files.monitor[0], files.at_best().get(files.monitor[0])
    return "report of a run" if value is None else f"{name} {value:.4f}"


def _lead(files: RunFiles) -> str:
    options, data = dict(flat(files.config)), files.record.get("data") or {}
    trained = str(options.get("model.backbone") or options.get("model") or "A network")
    classes, counts = data.get("classes") or [], {split: sum(n) for split, n in (data.get("counts") or {}).items() if n}
    purposes = {"train": "training", "val": "validation", "test": "the test"}
    numbers = [f"{number:,} for {purposes.get(split, split)}" for split, number in counts.items() if number]
    root = Path(value_text(data.get("root") or options.get("data.root") or options.get("data.pictures") or "pictures")).name
    text = f"{trained} on {root}" + (f": {len(classes)} classes" if classes else "")
    return f"{text}; pictures: {', '.join(numbers)}." if numbers else f"{text}."


def _updated(files: RunFiles) -> str:
    when = [path.stat().st_mtime for path in files.folder.glob("*.*") if path.name != REPORT]
    return datetime.fromtimestamp(max(when, default=0)).astimezone().strftime("%Y-%m-%d %H:%M")


def _numbers(files: RunFiles) -> Iterator[dict[str, str]]:
    values, monitor = files.at_best(), files.monitor[0]
    if monitor in values and files.best_epoch is not None:
        yield {"name": f"best {monitor}", "value": f"{values[monitor]:.4f}", "note": f"in epoch {files.best_epoch + 1}"}
    for name, value in values.items():
        if name == "test/acc":
            yield {"name": name, "value": f"{value:.4f}", "note": "of the best checkpoint"}
    for split, outcome in list(files.outcomes.items())[:1]:
        yield {"name": "calibration error", "value": f"{scores.ece(outcome):.3f}", "note": f"ECE on the {split} pictures"}
    of = f"of {files.epochs_planned}" if files.epochs_planned else ""
    yield {"name": "epochs", "value": f"{files.epochs_done}", "note": of}
    if files.record.get("seconds"):
        yield {"name": "time", "value": duration(files.record["seconds"]), "note": str(files.record.get("hardware") or "")}


# ------------------------------------------------------------------------------------------------------ what was trained


def _facts(files: RunFiles) -> Iterator[tuple[str, str]]:
    options, record = dict(flat(files.config)), files.record
    backbone = options.get("model.backbone") or options.get("model")
    if backbone:
        yield "network", str(backbone)
    if weights := _weights(record.get("weights") or {}) or options.get("model.weights"):
        yield "weights", str(weights)
    data = record.get("data") or {}
    if root := data.get("root") or options.get("data.root") or options.get("data.pictures"):
        yield "data", value_text(root)
    if target := data.get("target"):
        counts = ", ".join(f"{number:,} for {split}" for split, number in target["counts"].items() if number)
        yield "target", f"{target['root']} ({counts})"
    if data.get("fingerprint"):
        yield "fingerprint", str(data["fingerprint"])[:16]
    for name, paths in _OPTIONS.items():
        said = [(path, options[path]) for path in paths if path in options and not _is_off(options[path])]
        if said:
            yield name, ", ".join(_said(path, value, alone=len(said) == 1) for path, value in said)


def _weights(used: Mapping[str, Any]) -> str:
    text = str(used.get("summary") or "")
    if used.get("kept"):
        missing = len(used.get("missing") or ())
        text += f"\nkept {used['kept']} of {used['kept'] + missing} tensors of the backbone; the head is {used.get('head')}"
    return text


def _is_off(value: Any) -> bool:
    return value in (None, {}, []) or (isinstance(value, float) and not value)  # a seed of 0 is one


def _said(path: str, value: Any, alone: bool) -> str:
    own = path.rpartition(".")[2]
    return (
        value_text(value)
        if alone or own in ("optimizer", "lr", "schedule", "augment", "teacher")
        else f"{own} {value_text(value)}"
    )


def _stages(files: RunFiles) -> Iterator[dict[str, str]]:
    for stage in files.record.get("stages") or []:
        count, rate = stage.get("parameters"), stage.get("lr")
        yield {
            "name": str(stage.get("stage")),
            "parameters": f"{count:,}" if isinstance(count, int) else "",
            "lr": f"{rate:.3g}" if isinstance(rate, float | int) else "",
        }


def _phases(files: RunFiles) -> Iterator[dict[str, Any]]:
    last = files.epochs_planned or files.epochs_done
    for phase in files.record.get("phases") or []:
        start, end = phase["start"] + 1, min(phase["end"], max(last, phase["start"] + 1))
        yield {
            "epochs": f"epoch {end}" if start == end else f"epochs {start} to {end}",
            "train": phase["train"],
            "norms": bool(phase.get("norms")),
        }


def _picture(files: RunFiles, name: str) -> str | None:
    try:
        return data_uri(read_plain(files.folder / name, _MOST_BYTES))
    except OSError:
        return None


# -------------------------------------------------------------------------------------------------------------- results


def _splits(files: RunFiles) -> Iterator[dict[str, Any]]:
    """Say what was measured; a part of a split, or training pictures, where the trainer was told to."""
    counts = (files.record.get("data") or {}).get("counts") or {}
    overfits = bool(dict(flat(files.config)).get("trainer.overfit_batches"))
    for name, outcome in files.outcomes.items():
        split = "train" if overfits and name == "val" else name
        total = sum(counts.get(split) or [])
        part = f" of {total:,}" if len(outcome) < total else ""
        yield {"name": "training" if split == "train" else name, "pictures": len(outcome), "part": part}


def _metric_rows(files: RunFiles) -> list[dict[str, Any]]:
    """Return the metrics of all splits, with intervals where they are quick to compute."""
    found = []
    for outcome in files.outcomes.values():
        quick = outcome.probabilities.size <= _MOST_CELLS and len(outcome.classes) <= 100
        found.append(scores.metrics(outcome, resamples=_RESAMPLES if quick else 0))
    names = dict.fromkeys(name for metrics in found for name in metrics)
    return [
        {"name": name, "says": _METRICS.get(name, ""), "cells": [_cell(metrics.get(name)) for metrics in found]}
        for name in names
    ]


def _cell(interval: scores.Interval | None) -> dict[str, str]:
    if interval is None:
        return {"value": "", "range": ""}
    known = interval.low == interval.low
    return {"value": f"{interval.value:.4f}", "range": f"({interval.low:.3f} to {interval.high:.3f})" if known else ""}


def _classes(outcome: Outcome) -> Iterator[dict[str, Any]]:
    table, confusion = scores.per_class(outcome), scores.confusion(outcome)
    for number, name in enumerate(outcome.classes):
        others = confusion[number].copy()
        others[number] = 0
        said, times = int(others.argmax()), int(others.max())
        yield {
            "name": name,
            "support": int(table["support"][number]),
            **{score: float(table[score][number]) for score in ("precision", "recall", "f1")},
            "mistaken": f"{outcome.classes[said]} ({times})" if times else "",
            "times": times,
        }


def _mistakes(outcome: Outcome, files: RunFiles) -> Iterator[dict[str, Any]]:
    for index in scores.worst_mistakes(outcome, MISTAKES):
        path = files.picture(outcome.files[index])
        picture = None if path is None else thumbnail(path)
        said = int(outcome.predicted[index])
        yield {
            "image": None if picture is None else data_uri(picture),
            "true": outcome.classes[int(outcome.labels[index])],
            "said": outcome.classes[said],
            "sure": f"{100 * float(outcome.probabilities[index, said]):.0f} %",
            "file": Path(outcome.files[index]).name,
        }


# ------------------------------------------------------------------------------------------------------------ repeat it


def _commands(files: RunFiles) -> Iterator[dict[str, str]]:
    run = shlex.quote(as_typed(files.folder))
    words = [str(word) for word in files.record.get("command") or []]
    if words and os.path.basename(words[0]) in ("resnet-finetune", "cli.py", "__main__.py", "main.py"):
        words = words[1:]
    if words:
        yield {"name": "As it was typed", "text": f"resnet-finetune {shlex.join(words)}"}
    if (files.folder / CONFIG).is_file():
        again = f"resnet-finetune fit --config {run}/{CONFIG}"
        yield {"name": "The same options, whatever recipes or defaults change", "text": again}
    kept = {path.name for path in (files.folder / CHECKPOINTS).glob("*.ckpt")}
    if "last.ckpt" in kept and files.record.get("state") != "finished":
        yield {"name": "Go on from its last checkpoint", "text": f"resnet-finetune fit --ckpt_path {run}"}
    if kept and files.outcomes:  # it names classes
        yield {"name": "Use it", "text": f"resnet-finetune predict {run} PICTURES --out predictions.csv"}


def _versions(files: RunFiles) -> Iterator[tuple[str, str]]:
    record, git = files.record, files.record.get("git") or {}
    if git.get("commit"):
        yield "git commit", f"{git['commit']}{' and changes that are not committed' if git.get('dirty') else ''}"
    if record.get("started"):
        yield "started", str(record["started"])
    if record.get("hardware"):
        yield "machine", str(record["hardware"])
    if record.get("version"):
        yield "resnet-finetune", str(record["version"])
    yield from ((str(name), str(version)) for name, version in (record.get("versions") or {}).items())
