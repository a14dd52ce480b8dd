"""The first training pictures exactly as the network sees them, kept in the run's folder for a look."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from finetune.console import tell
from finetune.figure_style import label
from finetune.files import write_atomically
from finetune.reuse import ReuseLoader
from finetune.run_files import AUGMENTED
from finetune.thumbnails import jpeg, sheet

_MOST = 16


class AugmentedPictures(Callback):
    """Write `augmented.jpg` at the first training step: the pictures of the batch, after all that varies them.

    Nothing is drawn at random for it: the batch is the one that the network is about to see. Where a batch holds kept
    activations instead of pictures (`data.reuse`), the same pictures are read again, varied as they were.

    Args:
        run: The run's folder.
        most: How many pictures.
    """

    def __init__(self, run: Path, most: int = _MOST) -> None:
        self.file = run / AUGMENTED
        self.most = most
        self._looked = False

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Write the file, if it is not there yet; a failure is a warning."""
        if self._looked or not trainer.is_global_zero:
            return
        self._looked = True
        if self.file.exists():  # a resumed run
            return
        try:
            images, labels = first_pictures(batch, trainer.train_dataloader, trainer.current_epoch, self.most)
            if len(images):
                write_atomically(self.file, jpeg(sheet([_pixels(image) for image in images], _captions(pl_module, labels))))
        except Exception as error:
            tell(pl_module, f"warning: {self.file.name} could not be written: {error}")


def first_pictures(batch: Any, loader: Any, epoch: int, most: int = _MOST) -> tuple[Sequence[Tensor], list[int | None]]:
    """Return the first pictures of a batch and their labels; none if it has no pictures.

    Args:
        batch: A mapping with `image`, or with `index` where activations were kept, and perhaps `label`; or a pair.
        loader: The loader that it came from.
        epoch: The epoch that it is of.
        most: How many pictures.
    """
    if isinstance(batch, Mapping) and "kept" in batch and isinstance(loader, ReuseLoader):
        view = epoch % loader.reuse.views if loader.reuse.views else epoch
        items = [loader.dataset[(view, int(index))] for index in islice(batch["index"], most)]
        return [item["image"] for item in items], [item["label"] for item in items]
    if isinstance(batch, Mapping):
        images, labels = batch.get("image"), batch.get("label")
    else:
        images, labels = (*batch, None, None)[:2] if isinstance(batch, Sequence) else (None, None)
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3:
        return [], []
    shown = images[:most].cpu().unbind()
    if isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point():
        return shown, labels[:most].tolist()
    return shown, [None] * len(shown)


def _captions(module: L.LightningModule, labels: Sequence[int | None]) -> list[str]:
    names = getattr(module, "class_names", None) or []
    texts = ["" if number is None else names[number] if number < len(names) else str(number) for number in labels]
    return [label(text, 40).replace(r"\$", "$") for text in texts]


def _pixels(image: Tensor) -> Any:
    """Turn (3, height, width), uint8 or float in [0, 1], into uint8 (height, width, 3)."""
    if image.dtype != torch.uint8:
        image = image.float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return image.permute(1, 2, 0).contiguous().numpy()
