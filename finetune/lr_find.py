"""The learning-rate range test (Smith 2017) that keeps the ratios between stages.

The rates of all stages rise together, each from its own: what is found is `lr`, the rate of the head, for the freezing policy
and the layer decay that are set. The stages that train are those of the policy's last phase, which bears the least.

The smallest loss of the sweep says little where the head is solved for already; where it explodes says how much the network
bears, with every optimizer.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor
from tqdm import tqdm

from finetune.errors import ConfigError
from finetune.freezing import Phase
from finetune.module import FinetuneModule
from finetune.timetable import ENDLESS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS = 100
_LOW, _HIGH = 1e-4, 1e3  # times the rate that is set
_SMOOTH = 0.9  # of the running mean of the loss
_DIVERGED = 3.0  # times the smallest loss
FEWEST = 10  # steps of a curve that says something
_BACK = 5.0  # the suggestion is this much below the rate at which the loss explodes (measured: benchmarks/lr_find.py)


@dataclass
class Curve:
    """The loss over the learning rate.

    Attributes:
        rates: Learning rate of the head in each step.
        losses: Training loss of the step's batch.
    """

    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def smooth(self) -> list[float]:
        """Return the running mean of the losses, without the bias of its start."""
        mean, result = 0.0, []
        for number, loss in enumerate(self.losses, start=1):
            mean = _SMOOTH * mean + (1 - _SMOOTH) * loss
            result.append(mean / (1 - _SMOOTH**number))
        return result

    def exploded(self) -> int | None:
        """Return the step in which the smoothed loss is three times its smallest so far, or None.

        Where the smallest is near zero or below, as with terms that reward, it counts as a tenth of the first one.
        """
        smooth = self.smooth()
        lowest = itertools.accumulate(smooth, min)
        steps = enumerate(zip(smooth, lowest, strict=True))
        rise = _DIVERGED - 1
        return next(
            (step for step, (loss, low) in steps if step > FEWEST and loss - low > rise * max(low, 0.1 * abs(smooth[0]))), None
        )

    def suggestion(self) -> float:
        """Return the rate to train with: a fifth of the one at which the loss explodes, or of the last one if it does not.

        Raises:
            ConfigError: If there are too few steps to tell.
        """
        if len(self.losses) < FEWEST:
            raise ConfigError(
                f"The loss left the finite numbers after {len(self.losses)} steps: the curve is too short to suggest a rate. "
                "Lower --model.lr by 100 and try again."
            )
        step = self.exploded()
        return self.rates[-1 if step is None else step] / _BACK

    def draw(self, suggestion: float) -> Figure:
        """Return the figure of the curve, with the suggestion in it."""
        from finetune.figure_style import BLUE, FAINT, RED, add_legend, new_axes

        figure, axes = new_axes(3.1, "Learning-rate range test", "learning rate of the head", "training loss")
        axes.plot(self.rates, self.losses, color=FAINT, linewidth=0.7, label="each step")
        smooth = self.smooth()
        axes.plot(self.rates, smooth, color=BLUE, linewidth=1.8, label="smoothed")
        axes.axvline(suggestion, color=RED, linestyle="--", linewidth=1.2, label=f"suggestion {suggestion:.2g}")
        axes.set_xscale("log")
        low = min(smooth)
        axes.set_ylim(low * 0.8, max(smooth[0], low * _DIVERGED) * 1.1)
        add_legend(axes)
        return figure


class LearningRateSweep(L.Callback):
    """Raise all learning rates together, exponentially, and keep the loss of each step; the module is left as it was.

    Args:
        steps: Optimizer steps.
        bar: Whether to draw a bar of progress.

    Attributes:
        curve: What was measured.
    """

    def __init__(self, steps: int = STEPS, bar: bool = False) -> None:
        self.steps = steps
        self._bar = tqdm(desc="lr-find", total=steps, unit="step", disable=not bar, leave=False)
        self.curve = Curve()
        self._before: dict[str, Tensor] = {}
        self._done = 0

    def factor(self, step: int) -> float:
        """Return what the rates are multiplied by in a step, counted from 0."""
        return float(_LOW * (_HIGH / _LOW) ** (step / max(1, self.steps - 1)))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the weights."""
        self._before = {name: tensor.detach().clone() for name, tensor in pl_module.state_dict().items()}

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the sweep in the place of the run's timetable, which the module has made meanwhile."""
        if trainer.current_epoch:
            return
        assert isinstance(pl_module, FinetuneModule)
        assert pl_module.timetable is not None
        last = pl_module.timetable.phases[-1]
        everlasting = Phase(last.train, last.norms, 0, ENDLESS)
        sweep: Any = self.factor
        pl_module.timetable = replace(pl_module.timetable, phases=(everlasting,), schedule=sweep, warmup_steps=0, by_steps=True)
        trainer.fit_loop.max_epochs = ENDLESS
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = group["initial_lr"] * pl_module.timetable.factor(group["stage"], 0)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *args: Any) -> None:
        """Keep the loss of the step, and end the sweep when it is done or the loss explodes."""
        step, self._done = self._done, trainer.global_step
        if step == self._done:
            return  # gradients are still being accumulated
        loss = float(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean"))  # all processes stop together
        if math.isfinite(loss):
            self.curve.rates.append(pl_module.hparams["lr"] * self.factor(step))
            self.curve.losses.append(loss)
        self._bar.update()
        if not math.isfinite(loss) or self.curve.exploded() is not None or step + 1 >= self.steps:
            trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the weights."""
        self._bar.close()
        pl_module.load_state_dict(self._before)


def find_lr(module: FinetuneModule, data: L.LightningDataModule, steps: int = STEPS, **options: Any) -> Curve:
    """Run the range test.

    Args:
        module: The module with the freezing policy, layer decay and optimizer to be used; its weights are as before in the end.
        data: The training pictures.
        steps: Optimizer steps.
        **options: Arguments of the trainer, such as accelerator and precision.

    Returns:
        Rates and losses; `suggestion()` of it is the rate to begin with.
    """
    sweep = LearningRateSweep(steps)
    callbacks = [sweep, *options.pop("callbacks", [])]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "limit_val_batches": 0}
    options = {"max_epochs": 10, **options, **quiet, "num_sanity_val_steps": 0}
    with torch.random.fork_rng(devices=[]):
        L.Trainer(**options, callbacks=callbacks).fit(module, datamodule=data)
    return sweep.curve


def write_curve(curve: Curve, suggestion: float, folder: Path) -> Sequence[Path]:
    """Write the curve as a table and as a picture, and return their paths."""
    table = "\n".join(["lr,loss,smoothed", *(f"{a:.6g},{b:.6g},{c:.6g}" for a, b, c in _rows(curve))])
    paths = [folder / "lr_find.csv", folder / "lr_find.png"]
    paths[0].write_text(table + "\n", encoding="utf-8")
    curve.draw(suggestion).savefig(paths[1])
    return paths


def _rows(curve: Curve) -> Sequence[tuple[float, float, float]]:
    return list(zip(curve.rates, curve.losses, curve.smooth(), strict=True))
