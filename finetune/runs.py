"""A run's folder `runs/<name>/<time>/`: finding it, logging into it, and writing checkpoints that are whole or not there."""

from __future__ import annotations

import contextlib
import csv
import glob
import itertools
import os
import shlex
import signal
import threading
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path, PurePath
from typing import Any

import torch
from filelock import FileLock, Timeout
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers.csv_logs import CSVLogger, ExperimentWriter

from finetune.errors import CheckpointError, ConfigError, did_you_mean
from finetune.escaping import column
from finetune.files import atomic_write, remove_leftovers
from finetune.room import disk_error, tensor_bytes, unwritable

CHECKPOINTS = "checkpoints"
CONFIG = "config.yaml"
RESUMED_CONFIG = "config.resumed.yaml"  # of the last resume, which may have prolonged the run
_LOCK = ".lock"
_PATIENCE = 10.0  # seconds; processes that read pictures hold the lock until they notice that their parent is gone
_SHARED = "RESNET_FINETUNE_RUN"  # how the first process tells those that it starts


def as_typed(path: Path) -> str:
    """Return a path as somebody in the working folder would type it."""
    whole = path.absolute()
    return str(whole.relative_to(Path.cwd()) if whole.is_relative_to(Path.cwd()) else whole)


def run_home(root: Path, name: str) -> Path:
    """Return the folder of the runs of a name: below the folder of all runs.

    Raises:
        ConfigError: If the name would lead elsewhere.

    >>> run_home(Path("runs"), "birds/small").as_posix()
    'runs/birds/small'
    """
    path = PurePath(name)
    if not path.parts or path.is_absolute() or path.drive or ".." in path.parts or not name.isprintable():
        raise ConfigError(
            f"Expected run.name to be a name such as 'birds', or 'birds/small', found {name!r}: runs are kept below run.folder "
            f"({root}), and no name leads out of it. To keep them elsewhere, set --run.folder."
        )
    return root / path


def new_run(root: Path, name: str, job: Path | None = None) -> Path:
    """Make the folder of a new run; two runs that start in the same second get two folders.

    Only the first of several processes makes one. The others learn of it when training begins; until then they have a path that
    is never made.

    Args:
        root: Where runs are kept.
        name: Name of the run.
        job: The folder in place of one that is named by the time.

    Raises:
        ConfigError: If the folder cannot be made.
    """
    home = run_home(root, name)
    time = datetime.now().astimezone().strftime("%Y-%m-%d_%H-%M-%S")
    wanted = job or home / time
    if getattr(rank_zero_only, "rank", 0) != 0:
        return Path(os.environ.get(_SHARED) or job or home / "of the first process")
    try:
        wanted.parent.mkdir(parents=True, exist_ok=True)
        run = _first_free(wanted)
    except OSError as error:
        reason = f"The run's folder {wanted} cannot be made: {error.strerror}."
        raise ConfigError(f"{reason} Choose another with --run.folder.") from error
    os.environ[_SHARED] = str(run)
    return run


def _first_free(wanted: Path) -> Path:
    for number in itertools.count(1):
        run = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        with contextlib.suppress(FileExistsError):
            run.mkdir()
            return run
    raise AssertionError("unreachable")


def find_checkpoint(what: str, root: Path, name: str | None = None, prefer: str = "best") -> Path:
    """Find the checkpoint that a user means.

    Args:
        what: A file, a run's folder, or `last`: the newest run that has a checkpoint.
        root: Where runs are kept.
        name: For `last`, look among the runs of this name only.
        prefer: Which checkpoint of a run's folder is meant, `best` or `last`.

    Raises:
        CheckpointError: If there is none.
    """
    if what == "last":
        below = glob.escape(run_home(Path(), name).as_posix()) if name else "*"
        single = root.glob(f"{below}/*/{CHECKPOINTS}/last.ckpt")
        of_several = root.glob(f"{below}-*/*/*/*/{CHECKPOINTS}/last.ckpt")  # of --run.seeds, --data.folds or --compare
        newest = max([*single, *of_several], key=lambda path: path.stat().st_mtime, default=None)
        if newest is None:
            where = root / name if name else root
            raise CheckpointError(f"There is no run with a checkpoint in {where}: start one without --ckpt_path.")
        return newest
    path = Path(what)
    if os.path.isdir(path):  # no error for a name that no file can have
        kept = [path / CHECKPOINTS / f"{kind}.ckpt" for kind in dict.fromkeys((prefer, "best", "last"))]
        inside = next((checkpoint for checkpoint in kept if checkpoint.is_file()), None)
        if inside is None:
            raise CheckpointError(f"The folder {path} holds no checkpoint: expected {kept[0]}.")
        return inside
    if not os.path.isfile(path):
        siblings = [entry.name for entry in path.parent.iterdir()] if os.path.isdir(path.parent) else []
        raise CheckpointError(
            f"There is no checkpoint {path}.{did_you_mean(path.name, siblings)} "
            "Expected a .ckpt file, a run's folder, or 'last'."
        )
    return path


def run_of(checkpoint: Path) -> Path | None:
    """Return the run's folder that a checkpoint lies in, or None if it lies elsewhere."""
    if checkpoint.name.startswith("hpc_ckpt_"):  # Lightning's, of a job of SLURM that was requeued
        return checkpoint.parent
    return checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINTS else None


def drop_repeated(file: Path, until: int | None) -> list[str]:
    """Drop the rows of a CSV file that a kill cut off, and those of steps that will be done again.

    Args:
        file: A file with the column `step`.
        until: Optimizer steps that are done; all are if None.

    Returns:
        The columns of the file.
    """
    with file.open(newline="") as handle:
        reader = csv.DictReader(handle)
        rows, columns = list(reader), list(reader.fieldnames or [])
    kept = [row for row in rows if None not in row and (row.get("step") or "").isdigit()]
    kept = [row for row in kept if until is None or int(row["step"]) < until]
    with atomic_write(file) as partial, partial.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, fieldnames=columns)
        csv.writer(handle).writerow(column(name) for name in columns)
        writer.writerows(kept)
    return [column(name) for name in columns]


@contextlib.contextmanager
def only_here(run: Path | None) -> Iterator[None]:
    """Let no other process train in a run's folder meanwhile: both would write its checkpoints.

    Args:
        run: The folder; nothing is done if None, and nothing where the file system has no locks.

    Raises:
        ConfigError: If one does.
    """
    if run is None:
        yield
        return
    lock = FileLock(run / _LOCK)
    try:
        lock.acquire(timeout=_PATIENCE)
    except Timeout:
        raise ConfigError(
            f"Another process is training in {as_typed(run)}. Wait until it is done, or stop it; or begin a run of your own."
        ) from None
    except (OSError, NotImplementedError):  # what filelock raises on a file system without locks: training goes on without one
        pass
    try:
        yield
    finally:
        if lock.is_locked:
            (run / _LOCK).unlink(missing_ok=True)
            lock.release()


class RunLogger(CSVLogger):
    """Write `metrics.csv` into a run's folder; a resumed run goes on with the file that is there.

    Args:
        run: The run's folder.
        until: Optimizer steps that the checkpoint has done; rows of later steps, which will be done again, are dropped.
    """

    def __init__(self, run: Path, until: int | None = None) -> None:
        super().__init__(save_dir=run.parent.parent, name=run.parent.name, version=run.name)
        self._until = until

    def log_hyperparams(self, params: Any = None) -> None:
        """Leave options to the run's configuration file."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer of the file."""
        if self._experiment is None:
            self._experiment = _Writer(self.log_dir, self._until)
        return self._experiment

    def complete(self, row: Mapping[str, float]) -> None:
        """Write a row unless it is there: the one that a kill may have left out behind a checkpoint.

        Args:
            row: Metrics, with `step`.
        """
        self.experiment.go_on()
        file, step = Path(self.log_dir, "metrics.csv"), int(row["step"])
        names = {column(name) for name in row} - {"step", "epoch"}
        there = []
        if file.is_file():
            with file.open(newline="") as handle:
                there = [line for line in csv.DictReader(handle) if line["step"] == str(step)]
        if names and not any(all(line.get(name) for name in names) for line in there):
            self.log_metrics({**row, "epoch": int(row["epoch"])}, step=step)
            self.save()


class _Writer(ExperimentWriter):
    def __init__(self, log_dir: str, until: int | None) -> None:
        super().__init__(log_dir)
        self._until, self._goes_on = until, Path(self.metrics_file_path).is_file()

    def go_on(self) -> None:
        """Drop what will be done again, once there is something to write: until then a resume may be refused."""
        if self._goes_on:
            self.metrics_keys, self._goes_on = drop_repeated(Path(self.metrics_file_path), self._until), False

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        """Take a row."""
        self.go_on()
        super().log_metrics({column(name): value for name, value in metrics_dict.items()}, step)

    def _check_log_dir_exists(self) -> None:
        """Keep what is there: the folder is ours, and Lightning would delete `metrics.csv`."""


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Let signals whose handlers may raise wait: torch ends the process where one breaks into its writing of a file.

    One of them is that of a process that reads pictures and has ended, as SIGTERM to a whole group comes to it, too.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, Any]] = []
    numbers = [number for name in ("SIGCHLD", "SIGINT", "SIGTERM") if (number := getattr(signal, name, None)) is not None]
    handlers: dict[int, Any] = {number: signal.getsignal(number) for number in numbers}
    before = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in before:
        signal.signal(number, lambda *arguments: came.append(arguments))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number, frame in came:
            before[number](number, frame)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its place and move it there when it is whole, so that a kill leaves the previous one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Save a checkpoint.

        Args:
            checkpoint: What to save.
            path: Where to.
            storage_options: Must be None.

        Raises:
            CheckpointError: If the disk is full, or cannot be written to.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        try:
            with _signals_wait(), atomic_write(path) as partial, partial.open("wb") as handle:
                torch.save(checkpoint, handle)
        except (OSError, RuntimeError) as error:
            if disk_error(error) is None:
                raise
            kept = "The one before it is as it was: " if path.is_file() else ""
            raise CheckpointError(
                f"{unwritable(path.parent, error, tensor_bytes(checkpoint))} {kept}{_how_to_go_on(path)}"
            ) from error


def _how_to_go_on(path: Path) -> str:
    run = run_of(path)
    if run is None or not path.with_name("last.ckpt").is_file():
        return "Make room, and start again."
    return f"make room, then go on with: resnet-finetune fit --ckpt_path {shlex.quote(os.path.relpath(run))}"
