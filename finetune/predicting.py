"""What `Trainer.predict` asks of a module: images of a batch, with or without labels, to probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from finetune.calibration import stored_temperature
from finetune.errors import ConfigError, DataError


class PredictingModule(L.LightningModule):
    """The part of a module that serves `Trainer.predict`, with what `Predictor` would say of the same checkpoint."""

    _temperature = 1.0
    _loaded_step: int | None = None

    @property
    def classifies(self) -> bool:
        """Whether the head is one to predict classes with."""
        return True

    def on_predict_start(self) -> None:
        """Look up the temperature that `evaluate --calibrate` stored beside the checkpoint, where one is loaded.

        Raises:
            ConfigError: If the head was not trained to name classes.
        """
        if not self.classifies:
            raise ConfigError(
                "This model was distilled without --model.logits_weight, so its head names no classes: there is nothing to "
                "predict. Train a head on it with: fit --model.weights CHECKPOINT"
            )
        path = self.trainer.ckpt_path
        self._temperature = 1.0 if path is None else stored_temperature(Path(path), self._loaded_step)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return the probabilities of all classes (N, C) of a batch: images, with labels or without, see `images_of`."""
        logits: Tensor = self(images_of(batch))
        return (logits.float() / self._temperature).softmax(1)


def images_of(batch: Any) -> Tensor:
    """Return the images (N, 3, H, W) of a batch: a tensor, a mapping with `image`, or a sequence that begins with them.

    Raises:
        DataError: If there are none.
    """
    if isinstance(batch, Mapping):
        found = batch.get("image")
    else:
        found = batch[0] if isinstance(batch, Sequence) and len(batch) else batch
    if isinstance(found, Tensor) and found.ndim == 4:
        return found
    kind = f"a mapping with {sorted(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
    kind += f" of shape {tuple(found.shape)}" if isinstance(found, Tensor) else ""
    raise DataError(
        f"Expected a batch of images (N, 3, height, width), a mapping with 'image', or a pair (images, labels); found {kind}."
    )
