"""What follows a training: the best checkpoint is measured, the report is written, and the last lines say what to type next."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden
from tabulate import tabulate

from finetune import checkpoints
from finetune.adapt import AdaptModule
from finetune.console import say
from finetune.domain_table import domain_table
from finetune.domains import measure_domains
from finetune.durations import duration
from finetune.errors import FinetuneError
from finetune.explain import draw_mistakes
from finetune.keep_outcomes import KeepOutcomes
from finetune.module import FinetuneModule
from finetune.record import RunRecord, read_record
from finetune.report import REPORT, write_report
from finetune.runs import CHECKPOINTS, as_typed
from finetune.soup import BestEpochs


@rank_zero_only
def say_once(text: str) -> None:
    """Print on the first of several processes."""
    say(text)


def metric_table(results: Iterable[Mapping[str, float]]) -> str:
    """Return a table of what a trainer's `validate` or `test` found."""
    rows = [(name, f"{float(value):.4f}") for result in results for name, value in result.items()]
    return tabulate(rows, headers=["metric", "value"], disable_numparse=True, colalign=("left", "right"))


def close_run(run: Path, trainer: L.Trainer, best: ModelCheckpoint, epochs: BestEpochs | None) -> None:
    """Test the best checkpoint if there is a test split, and say where things are and what to type next.

    Args:
        run: The run's folder.
        trainer: The trainer behind its training.
        best: Its checkpoint of the best epoch.
        epochs: Its checkpoints of several good epochs, if their average was asked for.
    """
    with_data: Any = trainer
    module, data = trainer.lightning_module, with_data.datamodule
    chosen = Path(best.best_model_path or run / CHECKPOINTS / "last.ckpt")
    if not chosen.is_file():
        say_once("No checkpoint was written: the run ended before its first epoch did.")
        return
    score = best.best_model_score
    if score is not None:
        epoch = int(checkpoints.read(chosen)["epoch"]) + 1
        say_once(f"\nbest   {best.monitor} {float(score):.4f} in epoch {epoch} ({as_typed(chosen)})")
        floor = getattr(module, "start_accuracy", None)
        if best.monitor == "val/acc" and floor is not None and floor - float(score) > 1e-6:
            say_once(f"note   The head alone had val/acc {floor:.4f} before training: {_why_below(trainer)}.")
    if epochs is not None and score is not None:
        _compare_soup(trainer, epochs, chosen, float(score))
    _say_time(run)
    if _has_test(module, data):
        results = trainer.test(datamodule=data, ckpt_path=str(chosen), weights_only=True, verbose=False)
        say_once(metric_table(results))
    if isinstance(module, AdaptModule) and trainer.is_global_zero:
        say_once(f"\n{domain_table({type(module.adaptation).__name__: run})}\n")
    _write_report(run, module)
    if (run / REPORT).is_file():
        say_once(f"open   {as_typed(run / REPORT)}")
    kept = [*run.glob("*.*"), *(run / CHECKPOINTS).glob("*.ckpt")]
    say_once(f"files  {as_typed(run)}/  ({', '.join(sorted(str(path.relative_to(run)) for path in kept))})")
    if isinstance(module, FinetuneModule) and module.classifies:
        say_once(f"next   resnet-finetune predict {shlex.quote(as_typed(run))} PICTURES --out predictions.csv")


@rank_zero_only
def _say_time(run: Path) -> None:
    """Print how long the run has trained, which is what its record and its report say."""
    record = read_record(run)
    if record.get("seconds") is not None:
        say(f"time   {duration(record['seconds'])} for training{' in all' if record.get('resumed') else ''}")


_RATES = re.compile(r"--model\.(init_args\.)?(lr|lr_scale|lr_decay|lr_rule|optimizer)(=|$)")


def _why_below(trainer: L.Trainer) -> str:
    """Say why training may have ended below where it started: the recipe is at fault only if nothing else was."""
    content = next((each.content for each in trainer.callbacks if isinstance(each, RunRecord)), {})  # type: ignore[attr-defined]
    typed = rates_typed(content.get("command") or [])
    if typed:
        return (
            f"{' '.join(typed)} lost that. Leave the rate to the recipe, or look for one with resnet-finetune lr-find; only "
            "where no rate keeps it, the recipe linear_probe suits these pictures"
        )
    if content.get("warnings"):
        return "training lost that, see the warnings above"
    return "the recipe linear_probe suits these pictures"


def rates_typed(command: Sequence[str]) -> list[str]:
    """Return the arguments of a command that set learning rates or the optimizer.

    >>> rates_typed(["fit", "--config", "small", "--model.lr", "0.02", "--model.lr_scale=5", "--model.dropout", "0.1"])
    ['--model.lr 0.02', '--model.lr_scale=5']
    """
    found = []
    for place, argument in enumerate(command):
        if match := _RATES.match(argument):
            found.append(argument if match[3] else " ".join(command[place : place + 2]))
    return found


def _compare_soup(trainer: L.Trainer, epochs: BestEpochs, best: Path, score: float) -> None:
    """Average the best epochs; an average that is better than the best of them becomes the best checkpoint of the run."""
    value = epochs.average(trainer)
    if value is None:
        return
    if not (value > score if epochs.mode == "max" else value < score):
        say_once(f"soup   {epochs.monitor} {value:.4f}, no better ({as_typed(epochs.soup)})")
        return
    if trainer.is_global_zero:
        os.replace(epochs.soup, best)
    trainer.strategy.barrier()
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, KeepOutcomes):
            callback.write_latest(trainer)
        elif isinstance(callback, RunRecord):
            callback.note_average(trainer, value, len(epochs.best_k_models))
    say_once(f"soup   {epochs.monitor} {value:.4f}, better: it is {as_typed(best)} now, and its epochs are in epochs/")


@rank_zero_only
def _write_report(run: Path, module: L.LightningModule) -> None:
    try:
        if isinstance(module, FinetuneModule) and module.classifies:
            with contextlib.suppress(FinetuneError):  # data without files: there is nothing to look at
                draw_mistakes(run)
                measure_domains(run)
        write_report(run)
    except Exception as error:  # whatever is wrong with a figure, the training is done
        say_once(f"warning: The report could not be written ({error}). Try again: resnet-finetune report {as_typed(run)}")


def _has_test(module: L.LightningModule, data: Any) -> bool:
    if not is_overridden("test_step", module, L.LightningModule):
        return False
    has = getattr(data, "has_test", None)
    return bool(has) if has is not None else is_overridden("test_dataloader", data, L.LightningDataModule)
