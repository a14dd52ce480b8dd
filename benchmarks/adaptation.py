"""Domain adaptation: what each method makes of a target, chosen without its labels, and beside it by an oracle.

    python benchmarks/adaptation.py digits
    python benchmarks/adaptation.py usps --root digits_mnist_usps/
    python benchmarks/adaptation.py pacs --root pacs_subset/ --weights mobilenetv2_100.safetensors

Each run is that of the recipe domain_adaptation with the options below. Runs that are done stand in a CSV file and are not done
again, so this can be stopped and started anew.
"""

from __future__ import annotations

import argparse
import csv
import logging
import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import yaml
from tabulate import tabulate

from finetune import AdaptDataModule, AdaptModule
from finetune.adaptation_methods import METHODS
from finetune.recipe_files import find_recipe
from finetune.target import ORACLE

FEW = ("SourceOnly", "AdaBN", "MCC", "CDAN", "CORAL", "MMD", "InfoMax")
MONITOR = "target/infomax"
SMALL = {"backbone": "test_resnet", "weights": "none", "lr_scale": 1.0, "lr": 0.05}  # from random weights
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


class Task(NamedTuple):
    """A source and a target, and what is trained on them."""

    name: str
    model: dict[str, Any]
    data: dict[str, Any]
    epochs: int


def tasks(options: argparse.Namespace) -> Iterator[Task]:
    """Return the tasks of a benchmark."""
    root = Path(options.root or ".")
    if options.benchmark == "digits":
        yield Task("digits -> digits_m", SMALL, {"image_size": 32, "steps_per_epoch": 100}, 6)
    elif options.benchmark == "usps":
        for source, target in (("mnist", "usps"), ("usps", "mnist")):
            folders = {"root": str(root / source), "target": str(root / target)}
            data = {"hflip": False, "image_size": 32, "steps_per_epoch": 100}
            yield Task(f"{source} -> {target}", SMALL, {**data, **folders}, 4)
    else:
        model = {"backbone": "mobilenetv2_100", "weights": options.weights, "lr_scale": 0.1}
        for target in ("art_painting", "cartoon", "sketch"):
            folders = {"root": str(root / "photo"), "target": str(root / target)}
            data = {"image_size": 96, "batch_size": 16, "steps_per_epoch": 25}
            yield Task(f"photo -> {target}", model, {**data, **folders}, 4)


class Watch(L.Callback):
    """Keep the metrics of each epoch."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.epochs.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def measure(task: Task, method: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train once; return accuracies on the target, chosen without labels, by the oracle, and of the last epoch."""
    recipe = yaml.safe_load(find_recipe("domain_adaptation").read_text())
    L.seed_everything(seed, verbose=False)
    data = AdaptDataModule(**{**recipe["data"]["init_args"], **task.data, "workers": options.workers})
    given = {**recipe["model"]["init_args"], **task.model, "adaptation": method}
    model = AdaptModule(**given, num_classes=data.num_classes)
    watch, begin = Watch(), time.perf_counter()
    length = {"max_epochs": 1, "limit_train_batches": 2} if options.quick else {"max_epochs": task.epochs}
    trainer = L.Trainer(accelerator="cpu", num_sanity_val_steps=0, callbacks=[watch], **length, **QUIET)
    trainer.fit(model, data)
    chosen = max(watch.epochs, key=lambda epoch: epoch[MONITOR])
    found = {"source": chosen["val/acc"], "chosen": chosen[ORACLE], "oracle": max(e[ORACLE] for e in watch.epochs)}
    found |= {"last": watch.epochs[-1][ORACLE], "seconds": time.perf_counter() - begin}
    return {"task": task.name, "method": method, "seed": seed, **{name: round(value, 4) for name, value in found.items()}}


def done(file: Path) -> list[dict[str, str]]:
    """Return the rows of the runs that are done."""
    if not file.is_file():
        return []
    with file.open(newline="") as handle:
        return list(csv.DictReader(handle))


def append(file: Path, row: dict[str, Any]) -> None:
    """Add a row to the file."""
    first = not file.is_file()
    with file.open("a", newline="") as handle:
        writer = csv.DictWriter(handle, list(row))
        if first:
            writer.writeheader()
        writer.writerow(row)


def table(rows: list[dict[str, str]], task: str) -> str:
    """Return the table of a task in percent: the mean over seeds, and each seed in brackets."""
    lines = []
    for method in METHODS:
        own = [row for row in rows if (row["task"], row["method"]) == (task, method)]
        if own:
            cells = [[100 * float(row[name]) for row in own] for name in ("chosen", "oracle", "last", "source")]
            texts = [f"{statistics.mean(cell):.1f} ({', '.join(f'{value:.1f}' for value in cell)})" for cell in cells]
            lines.append([method, *texts, f"{statistics.mean(float(row['seconds']) for row in own):.0f}"])
    heads = ["method", "target, chosen without labels", "by oracle", "last epoch", "source", "seconds"]
    return f"{task}\n\n" + tabulate(lines, heads, tablefmt="github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmark", choices=["digits", "usps", "pacs"])
    parser.add_argument("--root", help="the folder that holds the folders of the domains")
    parser.add_argument("--weights", default="auto", help="weights of mobilenetv2_100, for pacs (default: auto)")
    parser.add_argument("--methods", nargs="+", help="which methods (default: all for digits, seven otherwise)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--csv", type=Path, default=Path("adaptation.csv"), help="the file of runs (default: adaptation.csv)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read pictures (default: 0)")
    parser.add_argument("--quick", action="store_true", help="two steps of each run, to see that it runs")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    methods = options.methods or (METHODS if options.benchmark == "digits" else FEW)
    chosen = list(tasks(options))
    for seed in options.seeds:
        for task in chosen:
            for method in methods:
                key = (task.name, method, str(seed))
                if key not in {(row["task"], row["method"], row["seed"]) for row in done(options.csv)}:
                    append(options.csv, measure(task, method, seed, options))
                    print(done(options.csv)[-1], flush=True)
    for task in chosen:
        print(f"\n{table(done(options.csv), task.name)}")


if __name__ == "__main__":
    main()
