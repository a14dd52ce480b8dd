"""Training with frozen stages: what users write, against the toolkit with and without reuse of frozen work.

    python benchmarks/frozen.py photos/ --policy head --epochs 20

Seconds are those of a whole run after imports: building network, data and trainer, and all epochs with their validation.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import lightning as L
import torch
from common import alternate, arguments, choice, machine, table
from handwritten import STAGES, Classifier, loaders

from finetune import FinetuneModule, FolderDataModule
from finetune.backbones import create_model
from finetune.boundaries import describe
from finetune.stages import split_head

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--policy", default="head", help="head, last:1 or gradual:2 (default: head)")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument(
        "--hand_epochs", type=int, help="epochs of the hand-written side, which is then scaled up (default: all)"
    )
    parser.add_argument("--without_off", action="store_true", help="leave out the toolkit without reuse")
    options = parser.parse_args()
    with choice(options.root, options.train, options.val) as root, tempfile.TemporaryDirectory() as cache:
        workers = best_workers(root, options)
        sides = {f"hand-written, {workers} workers": lambda: hand_written(root, options, workers)}
        if not options.without_off:
            sides["toolkit, reuse off"] = lambda: toolkit(root, options, "off", cache)
        sides["toolkit, reuse exact, first run"] = lambda: toolkit(root, options, "exact", tempfile.mkdtemp(dir=cache))
        sides["toolkit, reuse exact, second run"] = lambda: toolkit(root, options, "exact", newest(cache))
        seconds = alternate(sides, options.rounds)
    scaled = f", hand-written side: {options.hand_epochs} epochs, scaled up" if options.hand_epochs else ""
    title = (
        f"{options.policy}, {options.epochs} epochs, {options.backbone} at {options.size} px, {options.train} + {options.val} "
        f"pictures of {Path(options.root).name}{scaled}\n{machine()}\n{limit(options)}"
    )
    print(table(title, seconds, next(iter(sides))))


def newest(cache: str) -> str:
    return str(max(Path(cache).iterdir(), key=lambda path: path.stat().st_mtime))


def trained_and_every(policy: str) -> tuple[int, int]:
    """Return how many stages train at first, and every how many epochs one more thaws (0: never)."""
    name, _, number = policy.partition(":")
    return {"head": (1, 0), "last": (1 + int(number or 0), 0), "gradual": (1, int(number or 1)), "full": (len(STAGES), 0)}[name]


def best_workers(root: Path, options: argparse.Namespace) -> int:
    """Return the number of worker processes, 0 to 2, with which the hand-written side reads and computes an epoch fastest."""

    def epoch(workers: int) -> float:
        train, _ = loaders(root, options.size, options.batch_size, workers)
        model = Classifier(options.backbone, len(os.listdir(root / "train")), 1, 1).eval()
        with torch.no_grad():
            next(iter(train))  # the processes have started
            begin = time.perf_counter()
            for images, _ in train:
                model.model(images)
        return time.perf_counter() - begin

    return min(range(3), key=epoch)


def hand_written(root: Path, options: argparse.Namespace, workers: int) -> float:
    begin = time.perf_counter()
    torch.manual_seed(0)
    trained, every = trained_and_every(options.policy)
    epochs = options.hand_epochs or options.epochs
    model = Classifier(options.backbone, len(os.listdir(root / "train")), trained, options.epochs, every)
    trainer = L.Trainer(max_epochs=epochs, num_sanity_val_steps=0, **QUIET)
    trainer.fit(model, *loaders(root, options.size, options.batch_size, workers))
    return (time.perf_counter() - begin) * options.epochs / epochs


def toolkit(root: Path, options: argparse.Namespace, reuse: str, cache: str, **reading: int) -> float:
    os.environ["RESNET_FINETUNE_CACHE"] = cache
    begin = time.perf_counter()
    torch.manual_seed(0)
    data = FolderDataModule(root, options.batch_size, augment="none", image_size=options.size, reuse=reuse, **reading)
    model = FinetuneModule(
        options.backbone, num_classes=data.num_classes, weights="none", freezing=options.policy, bn="auto", lr=0.01
    )
    L.Trainer(max_epochs=options.epochs, num_sanity_val_steps=0, **QUIET).fit(model, data)
    return time.perf_counter() - begin


def limit(options: argparse.Namespace) -> str:
    """Say what the ratio can be at most, counting multiply-adds alone: a backward pass counts as two forward ones."""

    model = create_model(options.backbone, 10)
    classifier, stages = split_head(model)
    rows = describe(model, stages, torch.nn.Linear(classifier.in_features, 10), options.size)
    work = [row["multiply-adds"] for row in rows]
    trained, every = trained_and_every(options.policy)
    hand = ours = 0
    lines = set()
    for epoch in range(options.epochs):
        number = min(1 + epoch // every, len(STAGES)) if every else trained
        above = sum(work[-number:])
        below = sum(work) - above
        hand += options.train * (below + 3 * above) + options.val * sum(work)
        ours += options.train * 3 * above + options.val * above
        if below and number not in lines:
            lines.add(number)
            ours += (options.train + options.val) * below
    return f"arithmetic limit of the first run: {hand / ours:.1f}x (multiply-adds alone)"


if __name__ == "__main__":
    main()
