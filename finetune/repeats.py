"""The same training several times, with other seeds or other folds: one table with mean and spread.

Each training is a process of its own, so that nothing of one is left over for the next, and several devices work as always.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from finetune.apart import train_apart
from finetune.console import say
from finetune.errors import ConfigError
from finetune.escaping import cell, cells
from finetune.record import read_record
from finetune.runs import new_run

RESULTS = "results.csv"


@dataclass(frozen=True)
class Repeats:
    """What is done several times.

    Attributes:
        folder: Where runs are kept.
        name: Name of the runs.
        seeds: The seeds.
        folds: Number of folds; 0 for none.
    """

    folder: str
    name: str
    seeds: Sequence[int]
    folds: int = 0

    def trainings(self) -> list[tuple[str, list[str]]]:
        """Return the name of each training and the options that make it differ."""
        parts = [(f"fold-{fold}", ["--data.fold", str(fold)]) for fold in range(1, self.folds + 1)] or [("", [])]
        return [
            (
                "-".join(filter(None, (f"seed-{seed}" if len(self.seeds) > 1 or not part else "", part))),
                [*options, *_seed(seed)],
            )
            for seed in self.seeds
            for part, options in parts
        ]


def _seed(seed: int) -> list[str]:
    return ["--seed_everything", str(seed), "--run.seeds", "1"]


class Repeated(Exception):  # noqa: N818
    """Raised where a training turns out to be several; carries what to do."""

    def __init__(self, plan: Repeats) -> None:
        self.plan = plan


def plan_repeats(config: Any) -> Repeats | None:
    """Return what a configuration of `fit` asks to do several times, or None.

    Args:
        config: The parsed configuration.
    """
    data = config.data.get("init_args") or {}
    folds = int(data.get("folds") or 0) if data.get("fold") is None else 0
    seeds = int(config.run.seeds)
    if seeds < 1:
        raise ConfigError(f"Expected run.seeds to be at least 1, found {seeds}.")
    if (not folds and seeds == 1) or config.trainer.fast_dev_run:
        return None
    if config.get("ckpt_path"):
        raise ConfigError(
            "A repeated training cannot be resumed as a whole: leave out --ckpt_path, or resume one of its runs with "
            "--ckpt_path RUN."
        )
    first = config.seed_everything if isinstance(config.seed_everything, int) else 0
    return Repeats(config.run.folder, config.run.name or "run", range(first, first + seeds), folds)


def repeat(words: Sequence[str], plan: Repeats) -> None:
    """Train as often as planned, print the table of results and write it as results.csv.

    Args:
        words: `fit` and its options, as the user typed them.
        plan: What differs.

    Raises:
        SystemExit: If a training fails; those that are done are in the table all the same.
    """
    home = new_run(Path(plan.folder), f"{plan.name}-repeated")
    results: dict[str, dict[str, float]] = {}
    failed = 0
    for number, (name, options) in enumerate(plan.trainings(), start=1):
        say(f"\n=== {name}: training {number} of {len(plan.trainings())}")
        command = [*words, *options, "--run.folder", str(home), "--run.name", name]
        failed = train_apart(command)
        if failed:
            say(f"\n{name} ended with exit code {failed}.", error=True)
            break
        results[name] = _result(home / name)
    if results:
        say(f"\n{table(results)}\nfiles  {_write(results, home / RESULTS)}")
    if failed:
        raise SystemExit(failed)


def _result(folder: Path) -> dict[str, float]:
    """Return the figures of the one run in a folder: those of its best checkpoint."""
    record = read_record(max(folder.iterdir()))
    best = {record["monitor"]: float(record["best"]["value"])} if record.get("best") else {}
    return {**best, **(record.get("test") or {})}


def summary(results: dict[str, dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Return mean and standard deviation (of a sample) of each figure over the trainings."""
    names = list(dict.fromkeys(name for found in results.values() for name in found))
    columns = {name: [found[name] for found in results.values() if name in found] for name in names}
    return {n: (statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0) for n, v in columns.items()}


def table(results: dict[str, dict[str, float]]) -> str:
    """Return a table with a row per training, and one with mean and spread."""
    totals = summary(results)
    rows = [[name, *(f"{found[n]:.4f}" if n in found else "" for n in totals)] for name, found in results.items()]
    if len(results) > 1:
        rows.append(["mean ± spread", *(f"{mean:.4f} ± {spread:.4f}" for mean, spread in totals.values())])
    return tabulate(rows, ["training", *totals], disable_numparse=True)


def _write(results: dict[str, dict[str, float]], path: Path) -> Path:
    totals = summary(results)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["training", *cells(totals)])
        writer.writerows([cell(name), *(found.get(n, "") for n in totals)] for name, found in results.items())
        writer.writerow(["mean", *(mean for mean, _ in totals.values())])
        writer.writerow(["spread", *(spread for _, spread in totals.values())])
    return path
