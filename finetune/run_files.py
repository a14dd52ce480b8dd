"""What a run left in its folder, read back: also of a run that is going on, or was killed while it wrote.

What is missing is empty, and rows that were cut off are left out: looking at a run never fails because the run did. A file that
holds something else counts as missing, and `RunFiles.unreadable` says so.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, TypeVar

import numpy as np

from finetune.errors import CheckpointError, FinetuneError, did_you_mean
from finetune.outcomes import Outcome, read_outcome
from finetune.record_file import DOMAINS as DOMAINS
from finetune.record_file import RECORD as RECORD
from finetune.record_file import load_domains, load_record
from finetune.runs import CHECKPOINTS, CONFIG, RESUMED_CONFIG
from finetune.sample import BUILT_IN
from finetune.schema import convert, read_text, read_yaml

METRICS, GRADIENTS, AUGMENTED = "metrics.csv", "gradients.csv", "augmented.jpg"
EXPLAINED = "explained.png"
PREDICTIONS = {split: f"predictions.{split}.csv" for split in ("test", "target", "val")}
RATE = "lr/"
_MOST_BYTES = 64 * 2**20  # of a table
_MOST_STEPS = 10**12
OF_TARGET = ("oracle/", "target/")
"""How metrics begin that were measured on the target of an adaptation: with its labels, and without."""
_OF_TARGET_TEST = "oracle/target_test"

Row = dict[str, str]
T = TypeVar("T")


class _Config(TypedDict, total=False):
    """The parts of a configuration that looking at a run needs."""

    run: dict[str, Any] | None
    trainer: dict[str, Any] | None


class Curve(NamedTuple):
    """A quantity over a run: `x` in epochs (1.0 is the end of the first), or in steps while no epoch is done."""

    x: np.ndarray
    y: np.ndarray


class Span(NamedTuple):
    """A freezing phase on the axis of the curves: where it begins and ends, and what trains."""

    start: float
    end: float
    name: str


class RunFiles:
    """The files of a run, each read when it is first asked for.

    Args:
        folder: The run's folder. Links in it are not followed: a report would show what they lead to.
        root: The folder of the images; where the record says if None.

    Attributes:
        unreadable: By the name of a file that holds something else than it should, what is wrong with it.
    """

    def __init__(self, folder: str | os.PathLike[str], root: Path | None = None) -> None:
        self.folder = Path(folder)
        self._root = root
        self.unreadable: dict[str, str] = {}

    def _leniently(self, name: str, read: Callable[[], T]) -> T | None:
        """Return what a file holds; None if it is not there, and, noted, if it cannot be read."""
        if not os.path.lexists(self.folder / name):
            return None
        if (self.folder / name).is_symlink():  # a report would show what it leads to
            self.unreadable[name] = f"{self.folder / name} is a link, which is not followed."
            return None
        try:
            return read()
        except FinetuneError as error:
            self.unreadable[name] = str(error)
            return None

    @cached_property
    def record(self) -> dict[str, Any]:
        """What `record.json` says, or nothing."""
        return self._leniently(RECORD, lambda: load_record(self.folder)) or {}

    @cached_property
    def domains(self) -> dict[str, Any]:
        """What `domains.json` says of the features of both domains, or nothing."""
        return self._leniently(DOMAINS, lambda: load_domains(self.folder)) or {}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved configuration; that of the last resume, if there was one."""
        for name in (RESUMED_CONFIG, CONFIG):
            found = self._leniently(name, lambda name=name: _read_config(self.folder / name))  # type: ignore[misc]
            if found:
                return found
        return {}

    @cached_property
    def metrics(self) -> dict[str, Curve]:
        """The columns of `metrics.csv`, a curve each."""
        curves: dict[str, list[tuple[float, float]]] = {}
        for row in self._metric_rows:
            place = self._place(row)
            for name, value in _numbers(row).items():
                if name not in ("step", "epoch"):
                    curves.setdefault(name, []).append((place, value))
        return {name: _curve(points) for name, points in curves.items()}

    @property
    def rates(self) -> dict[str, Curve]:
        """The learning rate of each stage, in the order of the network."""
        found = {name.removeprefix(RATE): curve for name, curve in self.metrics.items() if name.startswith(RATE)}
        return {stage: found[stage] for stage in in_order(found, self.stages)}

    @cached_property
    def gradients(self) -> list[tuple[float, str, dict[str, float]]]:
        """The rows of `gradients.csv`: the place on the axis, the stage, and its numbers."""
        rows = self._leniently(GRADIENTS, lambda: _read_rows(self.folder / GRADIENTS)) or []
        return [(self._place(row), row["stage"], _numbers(row)) for row in rows if row.get("stage")]

    @cached_property
    def _ends(self) -> dict[float, float]:
        """How many steps were made when an epoch had ended, by the number of epochs, from the rows that end one."""
        last: dict[float, float] = {}
        for row in self._metric_rows:
            numbers = _numbers(row)
            ends = any(name.startswith(("train/", "val/")) for name in numbers)
            if ends and {"epoch", "step"} <= set(numbers):
                done = numbers["epoch"] + 1
                last[done] = max(numbers["step"] + 1, last.get(done, 0.0))
        return last

    @cached_property
    def steps_per_epoch(self) -> float | None:
        """Optimizer steps of an epoch, the median if they differ; None before the first has ended."""
        return float(np.median([steps / epochs for epochs, steps in self._ends.items()])) if self._ends else None

    def _epochs_after(self, steps: float) -> float:
        """Return how many epochs were done after so many steps: epochs of a resumed run may have different lengths."""
        knots = [(0.0, 0.0)]
        for epochs, made in sorted(self._ends.items()):
            if epochs > knots[-1][0] and made > knots[-1][1]:
                knots.append((epochs, made))
        at = next((n for n, (_, made) in enumerate(knots) if steps <= made and n), len(knots) - 1)
        (before, begin), (after, end) = knots[at - 1], knots[at]
        return before + (after - before) * (steps - begin) / (end - begin)

    @property
    def unit(self) -> str:
        """What the axis of the curves counts: `epoch`, or `step` while no epoch is done."""
        return "step" if self.steps_per_epoch is None else "epoch"

    @property
    def epochs_done(self) -> int:
        """Number of epochs that have ended."""
        ends = [curve.x.max() for name, curve in self.metrics.items() if name.startswith(("train/", "val/")) and len(curve.x)]
        return round(max(ends)) if ends and self.unit == "epoch" else 0

    @property
    def monitor(self) -> tuple[str, str]:
        """The metric that chose the best checkpoint, and whether `max` or `min` of it is best."""
        options = {**(self.config.get("run") or {}), **{k: self.record[k] for k in ("monitor", "mode") if self.record.get(k)}}
        name = str(options.get("monitor") or "val/acc")
        return name, str(options.get("mode") or ("min" if "loss" in name else "max"))

    @cached_property
    def best_epoch(self) -> int | None:
        """The epoch, counted from 0, that the best checkpoint is of."""
        recorded = (self.record.get("best") or {}).get("epoch")
        if recorded is not None:
            return int(recorded)
        name, mode = self.monitor
        curve = self.metrics.get(name)
        if curve is None or self.unit != "epoch" or not np.isfinite(curve.y).any():
            return None
        chosen = np.nanargmax(curve.y) if mode == "max" else np.nanargmin(curve.y)
        return round(float(curve.x[chosen])) - 1

    def at_best(self) -> dict[str, float]:
        """Return the metrics of validation, of a target too, at the best epoch, and those of the test."""
        found: dict[str, float] = {}
        for name, curve in self.metrics.items():
            if name.startswith(("val/", *OF_TARGET)) and not name.startswith(_OF_TARGET_TEST) and self.best_epoch is not None:
                here = np.flatnonzero(np.round(curve.x) == self.best_epoch + 1)
                found |= {name: float(curve.y[here[-1]])} if len(here) else {}
            elif name.startswith("test/") and len(curve.y):
                found[name] = float(curve.y[-1])
        return found | {str(name): float(value) for name, value in (self.record.get("test") or {}).items()}

    @property
    def stages(self) -> list[str]:
        """The stages in the order of the network, the head last."""
        return [str(stage["stage"]) for stage in self.record.get("stages") or []]

    @cached_property
    def spans(self) -> list[Span]:
        """The freezing phases on the axis of the curves, as far as the run is planned."""
        planned = self.epochs_planned or self.epochs_done
        spans = []
        for phase in self.record.get("phases") or []:
            start, end = phase["start"], min(phase["end"], max(planned, phase["start"] + 1))
            norms = " and norms" if phase.get("norms") else ""
            spans.append(Span(start, end, phase_name(phase["train"], self.stages) + norms))
        return spans if self.unit == "epoch" else []

    @property
    def epochs_planned(self) -> int:
        """Number of epochs that the run was to have; 0 if it has another limit."""
        found = (self.config.get("trainer") or {}).get("max_epochs")
        return found if isinstance(found, int) and found > 0 else 0

    @property
    def data_root(self) -> Path:
        """The folder that the paths of pictures start from."""
        if self._root is not None:
            return self._root
        recorded = (self.record.get("data") or {}).get("root")
        root = str(recorded or dict(flat(self.config)).get("data.root") or ".")
        try:
            return BUILT_IN[root]() if root in BUILT_IN else Path(root).expanduser()
        except RuntimeError:  # the home of a user that is not known here
            return Path(root)

    def picture(self, file: str) -> Path | None:
        """Return the path of an image that a table of predictions names; None if it lies outside the data of the run.

        Args:
            file: A path, absolute or relative to the root of the data.
        """
        target = ((self.record.get("data") or {}).get("target") or {}) if self._root is None else {}
        roots = [self.data_root, *([Path(str(target["root"]))] if target.get("root") else [])]
        return next((path for root in roots if (path := path_within(root, file)) is not None), None)

    def image(self, name: str) -> Path | None:
        """Return the path of an image that the run drew into its folder; None if it is missing or a link."""
        path = self.folder / name
        return path if path.is_file() and not path.is_symlink() else None

    @property
    def config_text(self) -> str:
        """The configuration as it stands in its file, empty if there is none."""
        what = "the options of a run"
        return self._leniently(CONFIG, lambda: read_text(self.folder / CONFIG, what, errors="replace")) or ""

    @cached_property
    def outcomes(self) -> dict[str, Outcome]:
        """What the best checkpoint said of the pictures of a split, the test split first."""
        found = {}
        for split, name in PREDICTIONS.items():
            outcome = self._leniently(name, lambda name=name: read_outcome(self.folder / name))  # type: ignore[misc]
            if outcome is not None:
                found[split] = outcome
        return {split: outcome for split, outcome in found.items() if len(outcome.files)}

    @cached_property
    def _metric_rows(self) -> list[Row]:
        return self._leniently(METRICS, lambda: _read_rows(self.folder / METRICS)) or []

    def _place(self, row: Row) -> float:
        """Return where a row stands on the axis: what was measured, after its step; a rate or a gradient, at its step."""
        numbers = _numbers(row)
        step = numbers.get("step", math.nan)
        if self.steps_per_epoch is None:
            return step
        measured = any(name.startswith(("train/", "val/", "test/", "target/", "oracle/")) for name in numbers)
        return self._epochs_after(step + measured)


def find_run(what: str, root: Path) -> Path:
    """Find the run that a user means.

    Args:
        what: A run's folder, something in it, or `last`: the run that trained last.
        root: Where runs are kept.

    Raises:
        CheckpointError: If it is none.
    """
    if what == "last":
        runs = [found.parent for pattern in ("*/*", "*/*/*/*") for found in root.glob(f"{pattern}/{CONFIG}")]
        if not runs:
            raise CheckpointError(f"There is no run in {root}. Name its folder.")
        return max(runs, key=_trained_at)
    path = Path(what)
    inside = os.path.isfile(path) or path.name == CHECKPOINTS
    for folder in (path, path.parent, path.parent.parent) if inside else (path,):
        if any(os.path.isfile(folder / name) for name in (RECORD, METRICS, CONFIG)):
            return folder
    if not os.path.exists(path):
        siblings = [entry.name for entry in path.parent.iterdir()] if os.path.isdir(path.parent) else []
        raise CheckpointError(f"There is no run {path}.{did_you_mean(path.name, siblings)} Expected a run's folder, or 'last'.")
    runs = sorted(found.parent for found in path.glob(f"**/{CONFIG}"))
    hint = f" There are runs below it, such as {runs[-1]}." if runs else ""
    raise CheckpointError(f"{path} is no run: expected a folder with {CONFIG}, {METRICS} or {RECORD}.{hint}")


def _trained_at(run: Path) -> float:
    """Return when a training last wrote to its folder; a report that is made there later is none."""
    files = (run / name for name in (RECORD, METRICS, CONFIG))
    return max(file.stat().st_mtime for file in files if file.is_file())


def phase_name(train: list[str], stages: list[str]) -> str:
    """Name what trains in a phase in a few letters.

    >>> stages = ["stem", "layer1", "layer2", "head"]
    >>> phase_name(["head"], stages), phase_name(["layer2", "head"], stages), phase_name(stages, stages)
    ('head', 'layer2 to head', 'everything')
    >>> phase_name(["layer1", "head"], stages)
    'layer1, head'
    """
    if stages and set(stages) <= set(train):
        return "everything"
    places = [stages.index(stage) for stage in train if stage in stages]
    together = len(places) == len(train) > 1 and places == list(range(places[0], places[0] + len(places)))
    return f"{train[0]} to {train[-1]}" if together else ", ".join(train) or "norms"


def in_order(names: Iterable[str], stages: Iterable[str]) -> list[str]:
    """Return names in the order of the stages; where that is not known, the stem first and the head last.

    >>> in_order(["head", "layer1", "stem"], [])
    ['stem', 'layer1', 'head']
    """
    places = {"stem": -1, "neck": 10_000, "head": 10_001} | {stage: place for place, stage in enumerate(stages)}
    return sorted(names, key=lambda name: places.get(name, len(places)))


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the options of a nested configuration with their dotted names, as they are typed.

    >>> dict(flat({"model": {"class_path": "m.Own", "init_args": {"lr": 0.1}}, "seed": 0}))
    {'model': 'm.Own', 'model.lr': 0.1, 'seed': 0}
    """
    for name, value in config.items():
        path = prefix.rstrip(".") if name in ("class_path", "init_args") else f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from flat(value, f"{path}.")
        else:
            yield path, value


def path_within(root: Path, file: str) -> Path | None:
    r"""Return a path in a folder, or None if it leads out of it.

    Args:
        root: The folder.
        file: A path, absolute or relative to the folder. Links in the folder are those of its owner, and are followed.

    >>> path_within(Path("/data"), "val/1.png"), path_within(Path("/data"), "/data/1.png")
    (PosixPath('/data/val/1.png'), PosixPath('/data/1.png'))
    >>> path_within(Path("/data"), "../1.png"), path_within(Path("/data"), "/etc/1.png"), path_within(Path("/data"), "a\0b")
    (None, None, None)
    """
    home, path = os.path.abspath(root), os.path.abspath(os.path.join(root, file))
    inside = path.startswith(os.path.join(home, "")) and "\0" not in file
    return Path(path) if inside else None


def _curve(points: list[tuple[float, float]]) -> Curve:
    x, y = np.array(sorted(points, key=lambda point: point[0]), dtype=float).reshape(-1, 2).T
    return Curve(x, y)


def _numbers(row: Row) -> dict[str, float]:
    numbers = {}
    for name, text in row.items():
        with contextlib.suppress(ValueError, TypeError):
            numbers[name] = float(text)
    return numbers


def _read_config(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_yaml(path, dict[str, Any], "the options of a run")
    convert(found, _Config, "the options of a run", where=str(path), finite=False)
    return found


def _read_rows(path: Path) -> list[Row]:
    """Return the whole rows of a CSV file that a run writes: those that say after how many steps they were measured."""
    what = "a table of a run"
    text = read_text(path, what, max_bytes=_MOST_BYTES, errors="replace").replace("\0", "")
    complete = text[: text.rfind("\n") + 1]
    reader = csv.DictReader(io.StringIO(complete, newline=""))
    try:
        return [row for row in reader if None not in row and None not in row.values() and _is_placed(row)]
    except csv.Error as error:
        raise CheckpointError(f"{path} does not hold {what}: line {reader.line_num}: {error}.") from error


def _is_placed(row: Row) -> bool:
    numbers = _numbers({name: row[name] for name in ("step", "epoch") if row.get(name)})
    return 0 <= numbers.get("step", math.nan) <= _MOST_STEPS and 0 <= numbers.get("epoch", 0) <= _MOST_STEPS
