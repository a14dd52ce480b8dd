"""The record of a run, `record.json`: what was trained on what, with which weights and how, and how far it came.

It is written when training starts, after every epoch and at the end, whole or not at all. Its fields:

    format      1
    state       running, finished, stopped (Ctrl-C, SIGTERM) or failed (then `error` says why); a kill leaves it at running
    command     the words that started the run; resumed: those that went on with it, and when
    started, updated, seconds   when it was started and last written, and how long it has trained in all
    version, versions, git, hardware
    data        root, classes, counts of the pictures per split and class, fingerprint; target, of domain adaptation
    weights     what was used of the pretrained weights, with a summary of one line
    stages      per stage: parameters, lr (the highest), trains_from_epoch (null if it never does)
    phases      per freezing phase: start, end (the epoch before which it ends), train, norms
    monitor, mode, best   the metric that chooses the best checkpoint, and its value, epoch and checkpoint (average_of: how many
                epochs it is the average of, the best of which is named)
    warnings    what was printed about gradients, updates and the loss
    test        the metrics of the best checkpoint on the test split

Epochs are counted from 0, as in `metrics.csv`. What is not known is null, or an empty list.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from finetune import checkpoints
from finetune.environment import git_state, library_versions
from finetune.errors import CheckpointError, FinetuneError
from finetune.files import write_atomically
from finetune.folders import SPLITS, PictureFolder
from finetune.hardware import describe_device
from finetune.record_file import RECORD as RECORD
from finetune.record_file import load_record
from finetune.runs import CHECKPOINTS
from finetune.timetable import Timetable, stage_rates
from finetune.version import __version__
from finetune.weight_report import Report

FORMAT = 1


def read_record(run: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the record of a run, empty if it has none.

    Args:
        run: The run's folder.

    Raises:
        CheckpointError: If the file holds something else.
    """
    return load_record(run) if Path(run, RECORD).exists() else {}


class RunRecord(Callback):
    """Keep the record of a run.

    Args:
        run: The run's folder.
        command: The words that started this process.

    Attributes:
        content: What was written last.
    """

    def __init__(self, run: str | os.PathLike[str], command: Sequence[str] = ()) -> None:
        self.run, self.command = Path(run), list(command)
        self.content: dict[str, Any] = {}
        self._epoch: int | None = None  # the last that was trained to its end
        self._trained: float | None = None  # seconds of training, once it has ended

    # ------------------------------------------------------------------------------------------------- hooks of Lightning

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write down what is known before the first step; go on with the record of a run that is resumed."""
        if not trainer.is_global_zero:
            return
        before = read_record(self.run)
        self._start(before)
        self.content |= {
            "hardware": describe_device(pl_module.device, trainer.world_size),
            "data": describe_data(getattr(trainer, "datamodule", None), pl_module),
            "weights": _describe_weights(pl_module),
            "best": before.get("best"),
        }
        self._note_best(trainer)
        self._write("running")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write down what the previous epoch came to, now that its checkpoints are kept."""
        if trainer.is_global_zero:
            self.content |= _describe_stages(trainer, pl_module)
            self._note_best(trainer)
            self._write("running")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember which epoch the checkpoints that are now kept belong to."""
        self._epoch = trainer.current_epoch

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write down that training is done."""
        if trainer.is_global_zero:
            self._note_best(trainer)
            self._write("finished")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the test metrics of a run that was trained before."""
        if trainer.is_global_zero and self.content:
            self.content["test"] = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self._write(self.content["state"])

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Write down that the run was stopped, or why it failed; a resume that never began leaves the record as it is."""
        if not trainer.is_global_zero or (not self.content and (self.run / RECORD).exists()):
            return
        if not self.content:
            self._start({})
        if isinstance(exception, Exception):
            own = isinstance(exception, FinetuneError)
            self.content["error"] = str(exception) if own else f"{type(exception).__name__}: {exception}"
        self._note_best(trainer)
        self._write("failed" if isinstance(exception, Exception) else "stopped")

    def note_average(self, trainer: L.Trainer, value: float, epochs: int) -> None:
        """Note that an average of so many of the best epochs is the best checkpoint now, and what it reaches."""
        if trainer.is_global_zero and self.content.get("best"):
            self.content["best"] |= {"value": value, "average_of": epochs}
            self._write(self.content["state"])

    def note_warning(self, trainer: L.Trainer, text: str) -> None:
        """Add a warning about the training, for the report; the file has it when the next epoch begins."""
        if trainer.is_global_zero and self.content and text not in self.content["warnings"]:
            self.content["warnings"].append(text)

    # -------------------------------------------------------------------------------------------------------- private

    def _start(self, before: dict[str, Any]) -> None:
        """Begin the content, or go on where the record of an earlier process ended."""
        now = _now()
        self._before, self._began = float(before.get("seconds", 0.0)), time.monotonic()
        self._trained = None
        resumed = [{"command": self.command, "started": now}] if before else []
        self.content = {
            "format": FORMAT,
            "state": "running",
            "command": before.get("command", self.command),
            "resumed": [*before.get("resumed", []), *resumed],
            "warnings": list(before.get("warnings") or []),
            "started": before.get("started", now),
            "version": __version__,
            "versions": library_versions(),
            "git": git_state(),
            "hardware": None,
            "data": None,
            "weights": None,
            **{name: [] for name in ("stages", "phases")},
            **dict.fromkeys(("monitor", "mode", "best", "test")),
        }

    def _note_best(self, trainer: L.Trainer) -> None:
        """Note the best checkpoint; its epoch is the one that has just ended, or stands in a checkpoint from before."""
        found = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor]
        if not found:
            return
        best = found[0]
        self.content |= {"monitor": best.monitor, "mode": best.mode}
        name = f"{CHECKPOINTS}/{Path(best.best_model_path).name}"
        if best.best_model_score is None or not (self.run / name).is_file():
            return
        value, known = float(best.best_model_score), self.content["best"]
        if known is None or known["value"] != value or known["checkpoint"] != name:
            epoch = self._epoch if self._epoch is not None else _epoch_of(self.run / name)
            self.content["best"] = {"value": value, "epoch": epoch, "checkpoint": name}

    def _write(self, state: str) -> None:
        if self._trained is None:
            now = round(self._before + time.monotonic() - self._began, 1)
            self._trained = None if state == "running" else now  # a test afterwards is not training
            self.content["seconds"] = now
        self.content |= {"state": state, "updated": _now()}
        self.run.mkdir(parents=True, exist_ok=True)  # the command has made it; a script may name one that is not there yet
        write_atomically(self.run / RECORD, json.dumps(checkpoints.plain(self.content), indent=1))


def describe_data(data: Any, module: Any = None) -> dict[str, Any]:
    """Return what is known of the data: root, classes, counts per split and class, fingerprint.

    Args:
        data: A data module, or None.
        module: The module, which may know the names of the classes where the data do not.
    """
    folder = getattr(data, "folder", None)
    if isinstance(folder, PictureFolder):
        target = getattr(data, "describe_target", None)
        return {
            "root": str(folder.root.absolute()),
            "classes": list(folder.classes),
            "counts": {split: folder.counts(split) for split in SPLITS},
            "fingerprint": fingerprint(folder),
            **({"target": target()} if target else {}),
        }
    root = getattr(data, "root", None)
    names = getattr(data, "classes", None) or getattr(module, "class_names", None) or []
    root = os.path.abspath(root) if isinstance(root, str | os.PathLike) else _root_of_files(getattr(data, "files", None))
    return {"root": root, "classes": [str(name) for name in names], "counts": {}, "fingerprint": None}


def _root_of_files(files: Any) -> str | None:
    """Return the folder that all validation images lie in, where a data module knows their files."""
    if not callable(files):
        return None
    with contextlib.suppress(Exception):  # it is somebody else's code
        paths = [os.path.dirname(os.path.abspath(path)) for path in files("val")]
        return os.path.commonpath(paths) if paths else None
    return None


def fingerprint(folder: PictureFolder) -> str:
    """Return a number that tells one set of pictures from another: a hash of the path and the size of every file.

    A copy of the folder has the same, on any machine, however it is split. The time of change is left out, as every copy has
    another; so a picture that was changed to one of exactly as many bytes goes unnoticed.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted({picture.file for pictures in folder.splits.values() for picture in pictures}):
        size = os.stat(os.path.join(folder.root, file)).st_size
        digest.update(f"{file}\0{size}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _describe_weights(module: Any) -> dict[str, Any] | None:
    report = getattr(module, "weights_report", None)
    if not isinstance(report, Report):
        return None
    return {**report.as_dict(), "summary": report.summary().splitlines()[0].removeprefix("weights: ")}


def _describe_stages(trainer: L.Trainer, module: Any) -> dict[str, Any]:
    """Return stages and freezing phases, empty where a module has none."""
    times = getattr(module, "timetable", None)
    if not isinstance(times, Timetable) or not trainer.optimizers:
        return {}
    stages = [
        {"stage": stage, "parameters": number, "lr": rate, "trains_from_epoch": times.first_epoch(stage)}
        for stage, number, rate in stage_rates(trainer.optimizers[0].param_groups)
    ]
    phases = [{"start": p.start, "end": p.end, "train": list(p.train), "norms": p.norms} for p in times.phases]
    return {"stages": stages, "phases": phases}


def _epoch_of(checkpoint: Path) -> int | None:
    try:
        return int(checkpoints.read(checkpoint)["epoch"])
    except (CheckpointError, KeyError):
        return None


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
