"""A step of full fine-tuning: a bare PyTorch loop, the hand-written Lightning version, and the toolkit.

    python benchmarks/step.py photos/ --steps 12

All sides have the same network and optimizer and get the same ready batches from memory, so that only the step is measured; the
bare loop and the toolkit have the same memory format. Seconds are those of one step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import lightning as L
import timm
import torch
from common import alternate, arguments, choice, machine, table
from handwritten import MEAN, STD, Classifier
from torch import nn
from torch.utils.data import DataLoader

from finetune import FinetuneModule, FolderDataModule

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
WARM_UP = 2  # steps that are not counted


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10, help="steps of each side in a round (default: 10)")
    options = parser.parse_args()
    with choice(options.root, options.train, options.val) as root:
        data = FolderDataModule(root, options.batch_size, augment="none", image_size=options.size, workers=0)
        batches = []
        for batch in data.train_dataloader():
            batches.append(batch)
            if len(batches) == options.steps + WARM_UP:
                break
        classes = len(os.listdir(root / "train"))
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (MEAN, STD))
    ready = [((batch["image"] / 255 - mean) / std, batch["label"]) for batch in batches]
    sides = {
        "bare loop": lambda: bare(options, classes, ready),
        "hand-written Lightning": lambda: hand_written(options, classes, ready),
        "toolkit": lambda: toolkit(options, classes, batches),
    }
    seconds = alternate(sides, options.rounds)
    title = (
        f"one step of full fine-tuning, {options.backbone} at {options.size} px, batch {options.batch_size}, SGD, "
        f"{options.steps} steps a round, {options.rounds} rounds, {Path(options.root).name}\n{machine()}\n"
        "the toolkit's step takes uint8 pictures, and normalises them and keeps metrics besides"
    )
    print(table(title, seconds, "bare loop"))


def bare(options: argparse.Namespace, classes: int, batches: list[Any]) -> float:
    torch.manual_seed(0)
    model = timm.create_model(options.backbone, num_classes=classes).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=True)
    times = []
    for images, labels in batches:
        begin = time.perf_counter()
        loss = nn.functional.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[WARM_UP:])


class Clock(L.Callback):
    """The time from the end of one step to the end of the next: with everything that the Trainer does between them."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())

    def median(self) -> float:
        return statistics.median(b - a for a, b in zip(self.ends[WARM_UP - 1 :], self.ends[WARM_UP:], strict=False))


def run(model: L.LightningModule, batches: list[Any]) -> float:
    clock = Clock()
    trainer = L.Trainer(max_epochs=1, callbacks=[clock], limit_val_batches=0, **QUIET)
    trainer.fit(model, DataLoader(batches, batch_size=None))
    return clock.median()


def hand_written(options: argparse.Namespace, classes: int, batches: list[Any]) -> float:
    torch.manual_seed(0)
    return run(Classifier(options.backbone, classes, trained=6, epochs=1), batches)


def toolkit(options: argparse.Namespace, classes: int, batches: list[Any]) -> float:
    torch.manual_seed(0)
    return run(FinetuneModule(options.backbone, num_classes=classes, weights="none", lr=0.01), batches)


if __name__ == "__main__":
    main()
