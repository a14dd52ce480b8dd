"""The cost of measuring gradient flow: a training step with the callback at its default rate, and without.

    python benchmarks/gradient_flow.py --steps 100 --rounds 7

Both sides train the same network on the same ready batches from memory, in turn. Seconds are those of a step, averaged over all
steps of a round but the first two, so that the steps that measure count in full.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from common import alternate, arguments, machine, table
from torch.utils.data import DataLoader

from finetune import FinetuneModule, GradientFlow
from finetune.defaults import RunOptions

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
WARM_UP = 2  # steps that are not counted


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="steps of each side in a round (default: 100)")
    parser.add_argument("--optimizer", default="sgd")
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch_size, 3, options.size, options.size)
    batches = [
        {
            "image": torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
            "label": torch.randint(0, 10, shape[:1], generator=generator),
        }
        for _ in range(4)
    ]
    every = RunOptions().gradients_every
    sides = {"without": lambda: step(options, batches, 0), f"with, every {every} steps": lambda: step(options, batches, every)}
    seconds = alternate(sides, options.rounds)
    title = (
        f"one step of full fine-tuning, {options.backbone} at {options.size} px, batch {options.batch_size}, "
        f"{options.optimizer}, {options.steps} steps a round, {options.rounds} rounds\n{machine()}"
    )
    print(table(title, seconds, "without"))
    without, on = seconds.values()
    ratios = [b / a for a, b in zip(without, on, strict=True)]
    print(f"cost: {100 * (statistics.median(ratios) - 1):+.2f} % of a step (median of the rounds' ratios)")


class Clock(L.Callback):
    """The mean time of a step, from the end of one to the end of another."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())


def step(options: argparse.Namespace, batches: list[Any], every: int) -> float:
    torch.manual_seed(0)
    model = FinetuneModule(options.backbone, num_classes=10, weights="none", lr=0.001, optimizer=options.optimizer)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        callbacks = [*([GradientFlow(Path(folder), every)] if every else []), clock]
        trainer = L.Trainer(max_epochs=1, callbacks=callbacks, limit_val_batches=0, **QUIET)
        trainer.fit(model, DataLoader([batches[i % len(batches)] for i in range(options.steps)], batch_size=None))
    return (clock.ends[-1] - clock.ends[WARM_UP - 1]) / (len(clock.ends) - WARM_UP)


if __name__ == "__main__":
    main()
