"""The progress bar: where an epoch stands, its loss, the head's learning rate, and the metrics that the module wants shown.

It is drawn on stderr, at most ten times a second, and only then the loss is asked of the device; lines go to stdout, so
that `resnet-finetune fit … | tee log` shows the bar and keeps the lines.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor
from tqdm import tqdm

from finetune.console import clean
from finetune.stages import HEAD


def wanted() -> bool:
    """Say whether anybody looks: stderr is a terminal, and not that of an automatic build."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("CI")


class Bar(ProgressBar):
    """One bar per epoch, and one for the validation or test under way."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bars: dict[str, Any] = {}

    @property
    def is_enabled(self) -> bool:
        """Whether anything is drawn; the module's `print` asks."""
        return self._enabled

    def disable(self) -> None:
        """Draw nothing from now on."""
        self._enabled = False

    def enable(self) -> None:
        """Draw again."""
        self._enabled = True

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        """Print a line above the bar."""
        tqdm.write(sep.join(map(str, args)), **kwargs)

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, int | str | float | dict[str, float]]:
        """Return what stands beside the bar, apart from the loss."""
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        head = next((group for group in groups if group.get("stage") == HEAD), groups[-1] if groups else None)
        rate: dict[str, Any] = {} if head is None else {"lr": float(head["lr"])}
        return {**rate, **trainer.progress_bar_metrics}

    # -------------------------------------------------------------------------------------------------- hooks of Lightning

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Open the bar of the epoch, which may begin in its middle after a resume."""
        if "train" not in self._bars:
            of = f"/{trainer.max_epochs}" if (trainer.max_epochs or -1) > 0 else ""
            self._open("train", f"epoch {trainer.current_epoch + 1}{of}", self.total_train_batches)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar."""
        bar = self._bars["train"]
        if bar.update(batch_idx + 1 - bar.n):  # it was drawn
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            first = {"loss": float(loss)} if isinstance(loss, Tensor) and loss.numel() == 1 else {}
            bar.set_postfix_str(clean(shown({**first, **self.get_metrics(trainer, pl_module)})))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar, which leaves its place to the line of the epoch."""
        self._close("train")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar of a validation."""
        numbers = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._open("val", "validation", sum(numbers))

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Move the bar."""
        self._step("val")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar."""
        self._close("val")

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open the bar of a test."""
        self._open("test", "test", sum(trainer.num_test_batches))

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Move the bar."""
        self._step("test")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Close the bar."""
        self._close("test")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Close all bars, so that what is said next stands on a line of its own."""
        for name in list(self._bars):
            self._close(name)

    # ------------------------------------------------------------------------------------------------------------ drawing

    def _open(self, name: str, text: str, total: float) -> None:
        self._close(name)
        length = int(total) if total != float("inf") else None
        self._bars[name] = tqdm(
            desc=text, total=length, leave=False, dynamic_ncols=True, disable=not self._enabled, bar_format=_FORMAT
        )

    def _step(self, name: str) -> None:
        if name in self._bars:
            self._bars[name].update()

    def _close(self, name: str) -> None:
        bar = self._bars.pop(name, None)
        if bar is not None:
            bar.close()


_FORMAT = "{desc}: {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}{postfix}]"


def shown(values: Mapping[str, Any]) -> str:
    """Return values as they stand beside the bar.

    >>> shown({"loss": 0.123456, "lr": 0.00038, "val/acc": 0.5})
    'loss 0.1235, lr 0.00038, val/acc 0.5'
    """
    return ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items())
