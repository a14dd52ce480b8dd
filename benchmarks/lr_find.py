"""Whether lr-find suggests a good rate: against the best of a grid of seven.

    python benchmarks/lr_find.py photos/:30@96 --weights mobilenetv2_100=mobilenetv2.safetensors --recipe small --epochs 5

The grid is the recipe's rate and three below and above it, in steps of the square root of 10; each trains from the same start,
and the one with the smallest loss on the validation pictures after the last epoch is the best.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning as L
import torch
import yaml
from common import machine, quiet
from quality import QUIET, Row, parse
from tabulate import tabulate
from torch.nn import functional as F

from finetune import FinetuneModule, FolderDataModule
from finetune.averaging import average_of
from finetune.defaults import RunOptions
from finetune.lr_find import find_lr
from finetune.recipe_files import find_recipe

GRID = [10 ** (step / 2) for step in range(-3, 4)]  # times the rate of the recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", metavar="FOLDER[:SHOTS][@PIXELS]")
    parser.add_argument("--weights", required=True, metavar="BACKBONE=FILE")
    parser.add_argument("--recipe", default="small")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--size", type=int, default=96, help="size of the input in pixels (default: 96)")
    options = parser.parse_args()
    backbone, _, weights = options.weights.partition("=")
    recipe = yaml.safe_load(find_recipe(options.recipe).read_text())
    rows = []
    for text in options.folders:
        row = parse(text, options.size)
        module, data = parts(row, recipe, backbone, weights, recipe["model"]["lr"])
        with quiet():
            curve = find_lr(module, data, enable_progress_bar=False)
        found = curve.suggestion()
        losses, grid = {}, [recipe["model"]["lr"] * factor for factor in GRID]
        for rate in grid:
            losses[rate] = trained(row, recipe, backbone, weights, rate, options.epochs)
            print(f"{text} {rate:.2g}: loss {losses[rate][0]:.4f}, accuracy {losses[rate][1]:.4f}", flush=True)
        best = min(grid, key=lambda rate: losses[rate][0])
        ratio = max(found / best, best / found)
        rows.append([text.rpartition("/")[2], f"{found:.2g}", f"{best:.2g}", f"{ratio:.1f}"])
        print(rows[-1], flush=True)
    heads = ["folder", "suggestion", "best of the grid", "factor between"]
    print(tabulate(rows, heads, disable_numparse=True), machine(), sep="\n\n")


def parts(row: Row, recipe: dict[str, Any], backbone: str, weights: str, lr: float) -> tuple[FinetuneModule, FolderDataModule]:
    """Return the module and the data of a run."""
    L.seed_everything(0, verbose=False)
    classes = FolderDataModule(row.root).num_classes
    options = {**recipe["model"], "backbone": backbone, "weights": weights, "num_classes": classes, "lr": lr}
    module = FinetuneModule(**options)
    return module, row.data(0, module, recipe["data"])


def trained(row: Row, recipe: dict[str, Any], backbone: str, weights: str, lr: float, epochs: int) -> tuple[float, float]:
    """Train at a rate and return loss and accuracy on the validation pictures."""
    with quiet():
        module, data = parts(row, recipe, backbone, weights, lr)
        average = average_of(RunOptions(**recipe.get("run", {})))
        callbacks = [] if average is None else [average]
        L.Trainer(max_epochs=epochs, callbacks=callbacks, **QUIET).fit(module, datamodule=data)
        module.eval()
        with torch.inference_mode():
            said = [(module(batch["image"]), batch["label"]) for batch in data.eval_loader("val")]
    logits, labels = (torch.cat(parts) for parts in zip(*said, strict=True))
    return float(F.cross_entropy(logits, labels)), float((logits.argmax(1) == labels).float().mean())


if __name__ == "__main__":
    main()
