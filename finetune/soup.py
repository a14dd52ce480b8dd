"""The best epochs of a run, and the average of their weights (uniform model soup, Wortsman et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch

from finetune import checkpoints
from finetune.console import tell
from finetune.errors import CheckpointError
from finetune.files import atomic_write
from finetune.room import tensor_bytes, unwritable
from finetune.validation import MeasuredCheckpoint


class BestEpochs(MeasuredCheckpoint):
    """Keep the checkpoints of the best epochs in `epochs/`, and average them when training is over.

    Args:
        folder: The run's folder of checkpoints.
        number: How many epochs.
        monitor: The metric that says which are best.
        mode: `max` or `min`.
    """

    def __init__(self, folder: Path, number: int, monitor: str, mode: str) -> None:
        options: dict[str, Any] = {"save_on_train_epoch_end": True, "auto_insert_metric_name": False}
        super().__init__(folder / "epochs", "{epoch:03d}", monitor=monitor, mode=mode, save_top_k=number, **options)
        self.soup = folder / "soup.ckpt"

    def average(self, trainer: L.Trainer) -> float | None:
        """Write the average of the best epochs as soup.ckpt and return what it reaches; None where there are none to average.

        Args:
            trainer: The trainer behind its training.
        """
        ranked = sorted(self.best_k_models.items(), key=lambda item: float(item[1]), reverse=self.mode == "max")
        if len(ranked) < 2:
            text = f"There is no average of the best epochs: found {len(ranked)} measured, expected at least 2."
            tell(trainer, f"warning: {text}")
            return None
        fault = None
        if trainer.is_global_zero:
            try:
                soup([Path(path) for path, _ in ranked], self.soup)
            except CheckpointError as error:
                fault = f"warning: There is no average of the best epochs. {error}"
        if fault := trainer.strategy.broadcast(fault):
            tell(trainer, fault)
            return None
        if not str(self.monitor).startswith("val/"):  # what training measures, a finished model has no value of
            tell(trainer, f"warning: {self.monitor} is not measured in validation, so {self.soup.name} was not compared.")
            return None
        loggers, trainer.loggers = trainer.loggers, []
        try:
            data: Any = trainer
            results = trainer.validate(datamodule=data.datamodule, ckpt_path=self.soup, weights_only=True, verbose=False)
        finally:
            trainer.loggers = loggers
        return next((float(result[str(self.monitor)]) for result in results if self.monitor in result), None)


def soup(paths: Sequence[Path], out: Path) -> Path:
    """Average the weights of checkpoints of one run (uniform model soup, Wortsman et al. 2022) and write the result.

    Everything but the weights is that of the first; numbers that are no floats, such as counters, too.

    Args:
        paths: The checkpoints, the best one first.
        out: The file to write.

    Raises:
        CheckpointError: If there are fewer than two, they are of different networks, or there is no room.
    """
    if len(paths) < 2:
        raise CheckpointError(f"An average needs at least 2 checkpoints, found {len(paths)}.")
    first = checkpoints.read_own(paths[0])
    total = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in first["state_dict"].items()}
    for path in paths[1:]:
        other = checkpoints.read_own(path)["state_dict"]
        shapes = [{name: tuple(tensor.shape) for name, tensor in state.items()} for state in (total, other)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"{path} and {paths[0]} are checkpoints of different networks: their weights have no average."
            )
        for name, tensor in other.items():
            if tensor.is_floating_point():
                total[name] = total[name] + tensor.double()
    first["state_dict"] = {
        name: (total[name] / len(paths)).to(tensor.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in first["state_dict"].items()
    }
    kept = {"state_dict", "hyper_parameters", "datamodule_hyper_parameters", checkpoints.KEY, "epoch", "global_step"}
    kept |= {"pytorch-lightning_version", "hparams_name", "datamodule_hparams_name"}
    try:
        with atomic_write(out) as partial, partial.open("wb") as handle:  # its own errors say why, those of torch do not
            torch.save({key: value for key, value in first.items() if key in kept}, handle)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(unwritable(out.parent, error, tensor_bytes(first["state_dict"]))) from error
    return out
