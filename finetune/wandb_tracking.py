"""A run in Weights & Biases. Whatever happens to the network, the account or the service, training goes on.

W&B keeps all that it is told in the run's folder before it sends it. So where it cannot be reached, or there is no account, the
run is kept there, and one command sends it later. Only public settings of `wandb` are used, and each of its waits has an end.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
from lightning.fabric.loggers.logger import _DummyExperiment, rank_zero_experiment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import WandbLogger
from msgspec import Meta

from finetune.console import say
from finetune.defaults import RunOptions
from finetune.files import write_atomically
from finetune.mistakes import Mistake, mistakes_of
from finetune.own_modules import outside_working_folder
from finetune.runs import CHECKPOINTS, CONFIG
from finetune.schema import read_json
from finetune.thumbnails import thumbnail

IDENTITY = "wandb.json"  # in the run's folder: which W&B run it is, so that a resumed run goes on with it
PROJECT = "resnet-finetune"
STEP = "trainer/global_step"  # as Lightning's own logger calls it
_PROBE, _INIT, _FINISH = 5.0, 30.0, 120.0  # seconds that are waited for an answer, for a new run, and for the last upload
_FACTS = ("command", "resumed", "version", "versions", "git", "hardware", "data", "weights", "stages", "phases")


class _Identity(TypedDict, total=False):
    """Which run of W&B a run is; its id becomes part of an address."""

    id: Annotated[str, Meta(pattern=r"\A[\w-]{1,128}\Z")]
    project: str | None
    entity: str | None
    url: str | None


class WandbTracker(WandbLogger):
    """Lightning's logger for W&B, with the run's own folder and identity, and without an end to training.

    Args:
        run: The run's folder.
        options: project, entity, group, tags, offline and artifact are used.
    """

    def __init__(self, run: Path, options: RunOptions) -> None:
        self.run, self.options = run, options
        self.identity = _read_identity(run)
        self._lost = False
        super().__init__(name=f"{run.parent.name} {run.name}", save_dir=run, id=self.identity.get("id"))

    # ------------------------------------------------------------------------------------------ what a logger can do

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of `wandb`."""
        if self._experiment is None:
            with self._surviving():
                self._experiment = self._start()
        return self._experiment or _DummyExperiment()

    def log_hyperparams(self, params: Any = None) -> None:
        """Leave options to `describe`, which has all of them, once."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send metrics."""
        with self._surviving():
            super().log_metrics(metrics, step)

    # ----------------------------------------------------------------------------------------- what a tracker can do

    def describe(self, config: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Send options, facts and tables, and say which value of the monitored metric counts."""
        with self._surviving():
            facts = {name: record[name] for name in _FACTS if record.get(name) is not None}
            swept = set(self.experiment.config.keys()) if _sweeps() else set()  # the agent has told these already
            options = {name: value for name, value in config.items() if name not in swept}
            self.experiment.config.update({**options, "record": facts}, allow_val_change=True)
            if record.get("monitor"):
                self.experiment.define_metric(record["monitor"], summary=record["mode"], step_metric=STEP, step_sync=True)
            tables = {"run/stages": _stage_table(record), "run/classes": _class_table(record)}
            self._log({name: table for name, table in tables.items() if table is not None}, 0)

    def show(self, name: str, pixels: npt.NDArray[np.uint8], step: int) -> None:
        """Send a figure: pixels (height, width, 3)."""
        import wandb

        with self._surviving():
            self._log({f"figures/{name}": wandb.Image(pixels)}, step)

    def conclude(self, record: Mapping[str, Any], step: int) -> None:
        """Send what came out: the best value, the mistakes with their pictures and, if asked for, the best checkpoint."""
        with self._surviving():
            best = record.get("best")
            if best:
                self.experiment.summary.update({f"best/{record['monitor']}": best["value"], "best/epoch": best["epoch"]})
            mistakes = mistakes_of(self.run, (record.get("data") or {}).get("root"))
            if mistakes:
                self._log({"predictions": _mistake_table(mistakes)}, step)
            if best and self.options.artifact:
                self._send_checkpoint(record)

    def close(self, finished: bool) -> None:
        """End the run, and say where it is, or how to send it."""
        if self._experiment is None:
            return
        run, self._experiment = self._experiment, None
        sent = run.settings.mode == "online"
        try:
            run.finish(exit_code=0 if finished else 1)
        except Exception:  # it took too long, or the process behind wandb is gone
            sent = False
        folder = shlex.quote(os.path.relpath(self.run / "wandb"))
        if run.settings.mode in ("offline", "dryrun"):
            say(f"W&B    kept on this machine; to send it: wandb sync {folder}")
        elif sent and not self._lost:
            say(f"W&B    {run.url}")
        elif run.settings.mode != "disabled":
            say(f"W&B    not all of it was sent; to send the rest: wandb sync --include-online {folder}")

    # ------------------------------------------------------------------------------------------------------- private

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        if values:
            self.experiment.log({**values, STEP: step})

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        """Let training go on when W&B fails: say so once."""
        try:
            yield
        except Exception as error:  # whatever it is, it is not worth a training run
            if not self._lost:
                say(f"warning: W&B failed ({_first_line(error)}); training goes on, and metrics.csv has everything.")
            self._lost = True

    def _start(self) -> Any:
        """Begin or go on with a W&B run, on this machine only where it cannot be sent."""
        import wandb

        with outside_working_folder():  # its settings there could name another server
            settings = wandb.setup().settings
        reason = self._why_offline(settings)
        if reason is None:
            try:
                run = self._init(settings.mode)
            except (wandb.Error, TimeoutError, OSError, ValueError) as error:
                reason = _first_line(error)
        if reason is not None:
            say(f"W&B: the run is kept on this machine ({reason}).")
            run = self._init("offline")
        self._id = run.id
        if settings.mode != "disabled":
            url = run.url if run.settings.mode == "online" else None
            self.identity = {"id": run.id, "project": run.project, "entity": run.entity or None, "url": url}
            write_atomically(self.run / IDENTITY, json.dumps(self.identity, indent=1))
            run.define_metric(STEP)
            run.define_metric("*", step_metric=STEP, step_sync=True)
        return run

    def _why_offline(self, settings: Any) -> str | None:
        """Return why a run cannot be sent, or None; so that nothing asks for a key or waits for an answer in vain."""
        import wandb

        if settings.mode == "disabled":
            return None
        if self.options.offline or settings.mode in ("offline", "dryrun"):
            return "as asked"
        if not _answers(settings):
            return f"{settings.base_url} does not answer"
        try:
            return None if wandb.login(prompt=False) else "no account is set up here: wandb login"
        except (wandb.Error, ValueError) as error:
            return _first_line(error)

    def _init(self, mode: str) -> Any:
        import wandb

        chosen = self.options
        own: dict[str, Any] = (
            {} if _sweeps() else {"id": self._id, "project": _project(chosen), "entity": chosen.entity, "resume": "allow"}
        )
        waits: dict[str, Any] = {"init_timeout": _INIT, "finish_timeout": _FINISH}
        waits = {name: seconds for name, seconds in waits.items() if f"WANDB_{name.upper()}" not in os.environ}
        return wandb.init(
            **own,
            mode=mode,  # type: ignore[arg-type]
            dir=str(self.run.absolute()),
            name=None if "WANDB_NAME" in os.environ else self._name,
            group=chosen.group,
            tags=chosen.tags,
            reinit="create_new" if wandb.run is not None else None,  # a run that is not ours goes on beside
            settings=wandb.Settings(silent=True, finish_timeout_raises=True, **waits),
        )

    def _send_checkpoint(self, record: Mapping[str, Any]) -> None:
        import wandb

        details = {"best": record["best"], "monitor": record["monitor"], "test": record.get("test")}
        artifact = wandb.Artifact(f"model-{self.experiment.id}", "model", metadata=details)
        for file in (record["best"]["checkpoint"], CONFIG):
            artifact.add_file(str(self.run / file), name=file.removeprefix(f"{CHECKPOINTS}/"), policy="immutable")
        self.experiment.log_artifact(artifact, aliases=["best"])


def _sweeps() -> bool:
    """Say whether the agent of a sweep started this: it then says which run of which project this is."""
    return "WANDB_SWEEP_ID" in os.environ


def _project(options: RunOptions) -> str | None:
    return options.project or (None if "WANDB_PROJECT" in os.environ else PROJECT)


def _read_identity(run: Path) -> dict[str, Any]:
    path = run / IDENTITY
    advice = "Remove it: the run then goes on as a new run of W&B."
    return {**read_json(path, _Identity, "which run of W&B this is", advice=advice)} if path.is_file() else {}


def _answers(settings: Any) -> bool:
    """Say whether the server can be reached; behind a proxy that is not tried."""
    address = urlsplit(settings.base_url)
    if urllib.request.getproxies().get(address.scheme) or getattr(settings, f"{address.scheme}_proxy", None):
        return True
    port = address.port or {"http": 80}.get(address.scheme, 443)
    try:
        with socket.create_connection((address.hostname or "", port), timeout=_PROBE):
            return True
    except OSError:
        return False


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _stage_table(record: Mapping[str, Any]) -> Any:
    import wandb

    rows = [list(stage.values()) for stage in record.get("stages") or []]
    return wandb.Table(columns=list(record["stages"][0]), data=rows) if rows else None


def _class_table(record: Mapping[str, Any]) -> Any:
    import wandb

    data = record.get("data") or {}
    counts = data.get("counts") or {}
    rows = [list(row) for row in zip(data["classes"], *counts.values(), strict=True)] if counts else []
    return wandb.Table(columns=["class", *counts], data=rows) if rows else None


def _mistake_table(mistakes: list[Mistake]) -> Any:
    import wandb

    table = wandb.Table(columns=["picture", "file", "true", "predicted", "probability", "probability of true", "why"])
    for mistake in mistakes:
        picture = None if mistake.path is None else thumbnail(mistake.path)
        shown = None if picture is None else wandb.Image(picture)
        table.add_data(shown, mistake.file, mistake.true, mistake.said, mistake.sure, mistake.right, mistake.why)
    return table
