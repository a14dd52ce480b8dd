"""Gradient flow: how gradients and weights move, stage by stage, as a callback that watches a run at a low rate.

Shortcuts exist so that gradients reach the stem. Whether they do, and whether each stage moves as it should, is measured in a
few steps; in all others nothing is done. `Flow` says what is measured; `FlowWarnings` say once what is wrong.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from finetune import escaping
from finetune.console import say, tell
from finetune.data import FolderDataModule
from finetune.errors import ConfigError, DataError
from finetune.flow_warnings import FlowWarnings, Rate, why_it_rests
from finetune.module import FinetuneModule
from finetune.record import RunRecord
from finetune.runs import RunLogger, drop_repeated
from finetune.stage_flow import Flow, Measurement, start_weights
from finetune.stages import HEAD

GRADIENTS = "gradients.csv"
START = "start.safetensors"
COLUMNS = ("step", "epoch", "stage", *(field.name for field in fields(Flow)))

_EARLY = (0, 1, 4, 16)  # steps into a phase; most of what goes wrong does so soon
_WHOLE = (SingleDeviceStrategy, DDPStrategy)  # strategies that leave parameters and gradients in one piece


class GradientFlow(Callback):
    """Measure the gradient flow of a `FinetuneModule`; with any other module it does nothing.

    Measured are the first step of each freezing phase, those 1, 4 and 16 steps after it, and one in so many: a function of the
    step, so that a resumed run measures the same. With several processes, whose gradients are equal by then, the first one
    measures.

    Args:
        folder: Where `gradients.csv` is written, and the weights that distances are measured from, for a run that is resumed:
            the run's folder. Without it, values go to the loggers only, and distances are unknown in a resumed run.
        every: Optimizer steps from one measurement to the next.

    Raises:
        ConfigError: If `every` is below 1.
    """

    def __init__(self, folder: Path | str | None = None, every: int = 50) -> None:
        if every < 1:
            raise ConfigError(
                f"Expected the steps from one measurement of gradients to the next to be 1 or more, found {every}."
            )
        self.folder = None if folder is None else Path(folder)
        self.every = every
        self._active = self._started = False
        self._warnings = FlowWarnings()
        self._batch: tuple[str, int, Any] | None = None
        self._pending: Measurement | None = None
        self._start: dict[str, Tensor] | None = None
        self._rates: dict[str, Rate] = {}
        self._since = 0.0  # steps of the phase before the one that is measured

    # ------------------------------------------------------------------------------------------------- hooks of Lightning

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Get ready; go on with the file that is there."""
        whole = isinstance(trainer.strategy, _WHOLE)
        self._active = trainer.is_global_zero and whole and isinstance(pl_module, FinetuneModule)
        self._pending = self._start = None
        self._started = False
        if not self._active or not isinstance(pl_module, FinetuneModule):
            return
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        self._warnings = FlowWarnings(scaled, pl_module.hparams.get("lr"), {HEAD, *pl_module.weights_report.untrained})
        named = dict(pl_module.named_parameters())
        members = pl_module.stage_parameters()
        self._members = {stage: {name: named[name] for name in names} for stage, names in members.items()}
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self._optimized = {id(parameter) for group in groups for parameter in group["params"]}
        if self.folder is not None:
            self._open(self.folder / GRADIENTS, trainer.global_step)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Remember the batch while it is there, to name a picture that is at fault."""
        self._batch = "train", batch_idx, batch

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Remember the batch while it is there."""
        self._batch = "val", batch_idx, batch

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Forget the batch."""
        self._batch = None

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Begin a measurement: gradients are accumulated, reduced and unscaled, and not yet clipped."""
        if not self._active or self._pending is not None:
            return
        since = self._steps_of_phase(trainer, pl_module)
        if not self._due(trainer, since):
            return
        assert isinstance(pl_module, FinetuneModule)
        self._since = since
        if not self._started:
            self._started = True
            self._start = self._starting_point(trainer, pl_module)
        for stage in self._meant_to_train(pl_module):
            meant = self._members[stage].keys() - pl_module.never_trained
            why = why_it_rests(stage, self._members[stage], meant, self._optimized)
            if why:
                self._say(trainer, self._warnings.once("rests", stage, why))
        self._pending = Measurement(self._members, self._start, _loss_scale(trainer, optimizer))
        self._rates = _rates(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Finish the measurement of this step, if one was begun; write it down, and warn."""
        if self._pending is not None:
            step = trainer.global_step - 1
            flows = self._pending.finish()
            self._pending = None
            self._write(trainer, step, flows)
            if any(flow.nonfinite for flow in flows.values()):
                self._name_pictures(trainer)
            self._say(trainer, self._warnings.judge(step, flows, self._rates, self._since))
        self._batch = None

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare the loss of the epoch with that of guessing."""
        loss = trainer.callback_metrics.get("train/loss")  # computed by all processes together
        guesses = getattr(pl_module, "has_cross_entropy", False)
        if self._active and guesses and loss is not None:
            classes = int(pl_module.hparams["num_classes"])
            self._say(trainer, self._warnings.judge_loss(trainer.current_epoch + 1, float(loss), classes))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Name the pictures with NaN, if it was they that stopped the run."""
        if isinstance(exception, DataError):
            self._name_pictures(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let go of what was remembered."""
        self._batch = self._pending = self._start = None

    # ---------------------------------------------------------------------------------------------------------- measuring

    def _due(self, trainer: L.Trainer, since: float) -> bool:
        return trainer.global_step % self.every == 0 or (since in _EARLY and since < self.every)

    @staticmethod
    def _steps_of_phase(trainer: L.Trainer, module: L.LightningModule) -> float:
        """Return how many steps the present phase is old, before the step that is about to be made."""
        timetable = getattr(module, "timetable", None)
        return float(timetable.since_phase(module.place)) if timetable else trainer.global_step

    def _meant_to_train(self, module: FinetuneModule) -> list[str]:
        """Return the stages that train now by the policy; what a subclass added beside the stages always does."""
        train = module.phase.train if module.phase else module.stage_names
        resting = {stage for stage in module.stage_names if stage not in train} | (set() if module.classifies else {HEAD})
        return [stage for stage in self._members if stage not in resting]

    def _starting_point(self, trainer: L.Trainer, module: FinetuneModule) -> dict[str, Tensor] | None:
        """Return the weights that training started from, of the stages that train in some phase."""
        never = module.timetable.never_trained(module.stage_names) if module.timetable else []
        parameters = {n: p for stage, named in self._members.items() if stage not in never for n, p in named.items()}
        start = start_weights(parameters, self.folder and self.folder / START, fresh=trainer.global_step == 0)
        if start is None:
            tell(
                module,
                "note: gradients.csv has no distances from now on: the weights that the run began with are not in its folder.",
            )
        return start

    def _open(self, file: Path, until: int) -> None:
        if file.is_file() and until > 0 and drop_repeated(file, until) == list(COLUMNS):
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(_line(COLUMNS), newline="")

    def _write(self, trainer: L.Trainer, step: int, flows: Mapping[str, Flow]) -> None:
        if self.folder is not None:
            rows = [(step, trainer.current_epoch, stage, *asdict(flow).values()) for stage, flow in flows.items()]
            with (self.folder / GRADIENTS).open("a", newline="") as file:
                file.write("".join(map(_line, rows)))  # in one go, so that a kill cuts off one line at most
        values = {
            f"gradients/{stage}/{name.removeprefix('grad_')}": float(value)
            for stage, flow in flows.items()
            for name, value in asdict(flow).items()
            if value is not None
        }
        for logger in trainer.loggers:
            if not isinstance(logger, RunLogger):
                logger.log_metrics(values, step=step)

    # ------------------------------------------------------------------------------------------------------------ warning

    def _say(self, trainer: L.Trainer, texts: Sequence[str]) -> None:
        for text in texts:
            warning = f"warning: {escaping.shown(text)}"
            if trainer.is_global_zero:
                tell(trainer.lightning_module, warning)
            else:  # where a module prints nothing
                say(warning)
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, RunRecord):
                    callback.note_warning(trainer, text)

    def _name_pictures(self, trainer: L.Trainer) -> None:
        if self._batch is None:
            return
        split, number, batch = self._batch
        bad = not_finite(batch)
        if bad:
            names = names_of(batch, bad, getattr(trainer, "datamodule", None), split)
            where = f"{'training' if split == 'train' else 'validation'} batch {number} of epoch {trainer.current_epoch + 1}"
            text = f"pictures hold NaN or infinite values: {names} in {where} (the first batch is 0). Repair or remove them."
            self._say(trainer, self._warnings.once("pictures", names, text))


def _rates(trainer: L.Trainer) -> dict[str, Rate]:
    """Return the learning rate of each stage, at this step and at its highest."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups if "stage" in group]
    return {group["stage"]: Rate(float(group["lr"]), float(group.get("initial_lr", group["lr"]))) for group in groups}


def _loss_scale(trainer: L.Trainer, optimizer: torch.optim.Optimizer) -> float:
    """Return what gradients are still multiplied by: fused optimizers undo the scaling of the loss themselves."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scaled = scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False)
    return float(scaler.get_scale()) if scaler is not None and scaled else 1.0


def _line(values: Sequence[Any]) -> str:
    """Return a line of a CSV file; what is None stays empty.

    >>> _line([50, 0, "stem", 0.25, None]).strip()
    '50,0,stem,0.25,'
    """
    text = io.StringIO()
    written = [escaping.cell(value) if isinstance(value, str) else value for value in values]
    csv.writer(text).writerow([f"{value:.8g}" if isinstance(value, float) else value for value in written])
    return text.getvalue()


def not_finite(batch: Any) -> list[int]:
    """Return the positions in a batch at which inputs hold NaN or infinite values.

    >>> not_finite({"image": torch.tensor([[0.0], [float("nan")]]), "label": torch.tensor([0, 1])})
    [1]
    """
    inputs = batch.get("image", batch.get("kept")) if isinstance(batch, Mapping) else batch
    if isinstance(inputs, Sequence) and inputs:
        inputs = inputs[0]
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or inputs.ndim < 1:
        return []
    bad: list[int] = (~inputs.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    return bad


def names_of(batch: Any, positions: Sequence[int], data: Any, split: str) -> str:
    """Name the pictures at some positions of a batch: by their files where these are known, otherwise by the position.

    Args:
        batch: The batch; files are known by its `index` if a `FolderDataModule` made it, or by its `file` or `path`.
        positions: The positions.
        data: The data module.
        split: train or val.
    """
    inside: Mapping[str, Any] = batch if isinstance(batch, Mapping) else {}
    shown = positions[:5]
    more = f" and {len(positions) - 5} more" if len(positions) > 5 else ""
    if isinstance(data, FolderDataModule) and "index" in inside:
        files = data.files("train" if split == "train" else "val")
        return ", ".join(str(files[int(inside["index"][position])]) for position in shown) + more
    for key in ("file", "path"):
        if isinstance(inside.get(key), Sequence):
            return ", ".join(str(inside[key][position]) for position in shown) + more
    return f"number {', '.join(map(str, shown))}{more}, counted from 0,"
