"""The cost of measuring gradient flow: a training step with the callback at its default rate, and without.

    python benchmarks/gradient_flow.py --steps 100 --rounds 7

Both sides train the same network on the same ready batches from memory, in turn. Seconds are those of a step, averaged over all
steps of a round but the first two, so that the steps that measure count in full; most of them lie at the start of a run. Small
pictures are the hard case, as the cost does not depend on their size.
"""

from __future__ import annotations

import argparse
import csv
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
    parser.set_defaults(size=64)
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
    plain: list[float] = []
    measuring: list[float] = []
    sides = {
        "without": lambda: step(options, batches, 0, [], plain),
        f"with, every {every} steps": lambda: step(options, batches, every, measuring, plain),
    }
    seconds = alternate(sides, options.rounds)
    title = (
        f"one step of full fine-tuning, {options.backbone} at {options.size} px, batch {options.batch_size}, "
        f"{options.optimizer}, {options.steps} steps a round, {options.rounds} rounds\n{machine()}"
    )
    print(table(title, seconds, "without"))
    without, on = seconds.values()
    ratios = [b / a for a, b in zip(without, on, strict=True)]
    print(f"cost: {100 * (statistics.median(ratios) - 1):+.2f} % of a step in a run of {options.steps} (median of the ratios)")
    usual = statistics.median(plain)
    more = statistics.median(measuring) - usual
    print(
        f"a step that measures takes {1000 * more:.1f} ms more than the usual {1000 * usual:.0f} ms (medians of "
        f"{len(measuring)} and {len(plain)} steps); in the long run one in {every} does: {100 * more / usual / every:+.2f} %"
    )


class Clock(L.Callback):
    """Write down when each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())

    def steps(self) -> list[float]:
        return [end - begin for begin, end in zip(self.ends[WARM_UP - 1 :], self.ends[WARM_UP:], strict=False)]


def step(options: argparse.Namespace, batches: list[Any], every: int, measuring: list[float], plain: list[float]) -> float:
    """Return the mean time of a step; add the times of those that measure, and of the others, to two lists."""
    torch.manual_seed(0)
    model = FinetuneModule(options.backbone, num_classes=10, weights="none", lr=0.001, optimizer=options.optimizer)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        callbacks = [*([GradientFlow(folder, every)] if every else []), clock]
        trainer = L.Trainer(max_epochs=1, callbacks=callbacks, limit_val_batches=0, **QUIET)
        trainer.fit(model, DataLoader([batches[i % len(batches)] for i in range(options.steps)], batch_size=None))
        measured = measured_steps(Path(folder)) if every else set()
    times = clock.steps()
    for number, seconds in enumerate(times, start=WARM_UP):
        (measuring if number in measured else plain).append(seconds)
    return statistics.mean(times)


def measured_steps(folder: Path) -> set[int]:
    with (folder / "gradients.csv").open(newline="") as file:
        return {int(row["step"]) for row in csv.DictReader(file)}


if __name__ == "__main__":
    main()
