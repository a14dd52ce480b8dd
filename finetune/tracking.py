"""Following a run: `metrics.csv`, always; TensorBoard and Weights & Biases, if asked for with `--track`.

A tracker is a Lightning logger, which takes metrics as they come, and that can do four things more: describe the run when it
starts, show a figure, conclude with what came out, and close. All trackers are told the same by the same functions.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import lightning as L
import numpy as np
import numpy.typing as npt
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from PIL import Image

from finetune import checkpoints, figures
from finetune.console import say
from finetune.defaults import RunOptions
from finetune.errors import ConfigError, did_you_mean
from finetune.record import RunRecord
from finetune.runs import RunLogger
from finetune.wandb_tracking import WandbTracker

TRACKERS = ("wandb", "tensorboard", "csv")
FIGURES = "figures"

Pixels: TypeAlias = npt.NDArray[np.uint8]


@runtime_checkable
class Tracker(Protocol):
    """What a logger must be able to do to be told all of a run."""

    def describe(self, config: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Take the options by name and the record of the run, when training starts."""

    def show(self, name: str, pixels: Pixels, step: int) -> None:
        """Take a figure, (height, width, 3)."""

    def conclude(self, record: Mapping[str, Any], step: int) -> None:
        """Take the record of a run that is done."""

    def close(self, finished: bool) -> None:
        """Finish writing and sending."""


class CsvTracker(RunLogger):
    """Metrics as `metrics.csv`, figures as PNG files; options and facts are in the run's folder already."""

    def describe(self, config: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Leave them to `config.yaml` and `record.json`."""

    def show(self, name: str, pixels: Pixels, step: int) -> None:
        """Write a figure."""
        folder = Path(self.log_dir, FIGURES)
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{name}.png")

    def conclude(self, record: Mapping[str, Any], step: int) -> None:
        """Leave it to `record.json`."""

    def close(self, finished: bool) -> None:
        """Write what is left."""
        self.save()


class TensorBoardTracker(TensorBoardLogger):
    """Metrics, options, figures and the record in the folder `tensorboard/` of a run.

    Args:
        run: The run's folder.
        until: Optimizer steps that the checkpoint of a resumed run has done; later ones, done again, are not shown twice.
    """

    def __init__(self, run: Path, until: int | None = None) -> None:
        super().__init__(save_dir=run, name="", version="tensorboard", purge_step=until)

    def log_hyperparams(self, params: Any = None, *args: Any, **kwargs: Any) -> None:
        """Leave options to `describe`, which has all of them, once."""

    def save(self) -> None:
        """Write what is left; options are not for a file of their own."""
        self.experiment.flush()

    def describe(self, config: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Write the options, for the tab that compares runs by them, and the record."""
        from torch.utils.tensorboard.summary import hparams

        kinds = (bool, int, float, str)
        options = {name: value if isinstance(value, kinds) else json.dumps(value) for name, value in config.items()}
        compared = {f"best/{record['monitor']}": 0.0} if record.get("monitor") else {}
        for part in hparams(options, compared):  # type: ignore[no-untyped-call]
            self.experiment._get_file_writer().add_summary(part)
        text = json.dumps(record, indent=1, default=str)
        self.experiment.add_text("record", "\n".join(f"    {line}" for line in text.splitlines()))

    def show(self, name: str, pixels: Pixels, step: int) -> None:
        """Write a figure."""
        self.experiment.add_image(f"{FIGURES}/{name}", pixels, step, dataformats="HWC")

    def conclude(self, record: Mapping[str, Any], step: int) -> None:
        """Leave it: the best value and the test metrics are there."""

    def close(self, finished: bool) -> None:
        """Write what is left."""
        self.finalize("closed")


class Tracking(Callback):
    """Describe a run to its trackers when training starts, and tell them the best value whenever there is a new one.

    Args:
        record: The callback that keeps the record; it must stand before this one.

    Attributes:
        config: The options by name.
    """

    def __init__(self, record: RunRecord) -> None:
        self.record = record
        self.config: Mapping[str, Any] = {}
        self._told: Any = None
        self._described = False

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Describe the run, whose phases and rates are now known."""
        if trainer.is_global_zero and not self._described:
            self._described = True
            for tracker in trackers_among(trainer.loggers):
                tracker.describe(self.config, self.record.content)
        self._tell_best(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell the best value of all."""
        self._tell_best(trainer)

    def _tell_best(self, trainer: L.Trainer) -> None:
        best = self.record.content.get("best")
        if not trainer.is_global_zero or best is None or best["value"] == self._told:
            return
        self._told = best["value"]
        for logger in trainer.loggers:
            logger.log_metrics({f"best/{self.record.content['monitor']}": best["value"]}, step=trainer.global_step)


def parse_names(given: str | Sequence[str]) -> list[str]:
    """Return the trackers that were asked for.

    Args:
        given: Names, as a list or with commas between them.

    Raises:
        ConfigError: If one is unknown, or its package is not installed.

    >>> parse_names("csv, csv"), parse_names([])
    (['csv'], [])
    """
    words = given.split(",") if isinstance(given, str) else given
    names = [word.strip().lower() for word in words if word.strip()]
    for name in names:
        if name not in TRACKERS:
            hint = did_you_mean(name, TRACKERS)
            raise ConfigError(
                f"There is no tracker '{name}'.{hint} Expected --track with one or several of: {','.join(TRACKERS)}."
            )
        if name != "csv" and find_spec(name) is None:
            raise ConfigError(f'Tracking with {name} needs a package that is not here: pip install "resnet-finetune[{name}]"')
    return list(dict.fromkeys(names))


def build_trackers(options: RunOptions, run: Path, until: int | None = None) -> list[Logger]:
    """Return the loggers of a run, `metrics.csv` first.

    Args:
        options: Of the run.
        run: Its folder.
        until: Optimizer steps that the checkpoint of a resumed run has done.

    Raises:
        ConfigError: As `parse_names`.
    """
    names = parse_names(options.track)
    built: list[Logger] = [CsvTracker(run, until)]
    if "tensorboard" in names:
        built.append(TensorBoardTracker(run, until))
    if "wandb" in names:
        built.append(WandbTracker(run, options))
    return built


def trackers_among(loggers: Iterable[Any]) -> list[Tracker]:
    """Return those loggers that are trackers; a user's own logger need not be one."""
    return [logger for logger in loggers if isinstance(logger, Tracker)]


def flat_options(config: Mapping[str, Any], model: Any = None) -> dict[str, Any]:
    """Return all options by the names that they have on the command line, such as `model.lr`; linked ones too.

    Args:
        config: The parsed configuration of a verb.
        model: The module, which knows what was linked to it, such as the number of classes.

    >>> flat_options({"model": {"class_path": "finetune.FinetuneModule", "init_args": {"lr": 0.1}}, "seed_everything": 0})
    {'model': 'finetune.FinetuneModule', 'model.lr': 0.1, 'seed_everything': 0}
    """
    found: dict[str, Any] = {}
    for name, value in config.items():
        if name != "config":
            found |= _flatten(name, checkpoints.plain(value))
    given = {name for name, value in found.items() if value is not None}
    for name, value in getattr(model, "hparams", {}).items():
        if not any(f"{key}.".startswith(f"model.{name}.") for key in given):
            found[f"model.{name}"] = checkpoints.plain(value)
    return found


def _flatten(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {name: value}
    if set(value) <= {"class_path", "init_args", "dict_kwargs"} and "class_path" in value:
        options = {**(value.get("init_args") or {}), **(value.get("dict_kwargs") or {})}
        return {name: value["class_path"], **(_flatten(name, options) if options else {})}
    return {key: item for part, inner in value.items() for key, item in _flatten(f"{name}.{part}", inner).items()}


def conclude(loggers: Iterable[Any], run: Path, record: Mapping[str, Any], step: int) -> None:
    """Hand the figures and what came out to all trackers.

    Args:
        loggers: Of the trainer.
        run: The run's folder.
        record: Its record.
        step: Optimizer steps that were done.
    """
    trackers = trackers_among(loggers)
    for name, pixels in _drawn(run).items():
        for tracker in trackers:
            tracker.show(name, pixels, step)
    for tracker in trackers:
        tracker.conclude(record, step)
        tracker.close(finished=True)


def _drawn(run: Path) -> dict[str, Pixels]:
    try:
        return {name: rasterise(figure) for name, figure in figures.of_run(run).items()}
    except Exception as error:  # whatever is wrong with a figure, the training is done
        say(f"warning: The figures could not be drawn ({type(error).__name__}: {error}).")
        return {}


@contextlib.contextmanager
def closing_if_it_fails(loggers: Iterable[Any]) -> Iterator[None]:
    """Close the trackers as those of a run that was stopped or failed, if what is inside raises."""
    try:
        yield
    except BaseException:
        for tracker in trackers_among(loggers):
            tracker.close(finished=False)
        raise


def rasterise(figure: Any) -> Pixels:
    """Return a figure of matplotlib as pixels, (height, width, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])
