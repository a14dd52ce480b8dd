"""What weights are worth: a linear probe against a random start and against real ImageNet weights, and few pictures per class.

    python benchmarks/transfer.py --weights bundled --reference mobilenetv2_100 mobilenetv2.safetensors \
        --held_out signs/ cartoons/ --few signs/ cartoons/ photos/ things/ --card finetune/bundled/resnet18.json

The probe is a logistic regression on standardised frozen features, its regularisation chosen by cross-validation on the
training pictures, of which each seed draws 80 %. "Gap closed" is where the weights stand between a random start (0 %) and the
reference (100 %). With few pictures per class, the recipe `small` starts from the weights, and the same network is trained from
random values, everything training, for the same number of seconds.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
import yaml
from common import machine, quiet
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tabulate import tabulate

from finetune import FinetuneModule, FolderDataModule
from finetune.averaging import average_of
from finetune.defaults import RunOptions
from finetune.recipe_files import find_recipe

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
SMALL = yaml.safe_load(find_recipe("small").read_text())
FROM_RANDOM = {"freezing": "full", "bn": "train", "optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05, "warmup_epochs": 1}
SCRATCH = {"model": FROM_RANDOM, "data": {"batch_size": 20, "augment": "light"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--weights", default="bundled", help="as for --model.weights (default: bundled)")
    parser.add_argument("--reference", nargs=2, metavar=("BACKBONE", "FILE"), help="real ImageNet weights")
    parser.add_argument("--held_out", nargs="*", default=[], help="folders for the linear probe")
    parser.add_argument("--few", nargs="*", default=[], help="folders for few pictures per class")
    parser.add_argument("--shots", type=int, default=20, help="pictures per class with --few (default: 20)")
    parser.add_argument("--epochs", type=int, default=15, help="epochs from the weights with --few (default: 15)")
    parser.add_argument("--size", type=int, default=128, help="input size in pixels (default: 128)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--few_seeds", type=int, default=1)
    parser.add_argument("--card", type=Path, help="write the tables into this card, too")
    options = parser.parse_args()
    tables = {}
    if options.held_out:
        tables["linear probe"] = probes(options)
    if options.few:
        tables[f"{options.shots} pictures per class"] = few_shot(options)
    for title, rows in tables.items():
        print(f"\n{title}, {options.size} px, {machine()}\n" + tabulate(rows, headers="keys", disable_numparse=True))
    if options.card:
        card = json.loads(options.card.read_text())
        card["transfer"] = {**card.get("transfer", {}), "input_size": options.size, **tables}
        options.card.write_text(json.dumps(card, indent=2) + "\n")


def probes(options: argparse.Namespace) -> list[dict[str, str]]:
    rows = []
    for folder in options.held_out:
        found: dict[str, list[float]] = {"random start": [], "weights": [], "reference": []}
        for seed in range(options.seeds):
            data = FolderDataModule(folder, image_size=options.size, val_fraction=0.3, split_seed=seed, workers=0)
            with quiet():
                torch.manual_seed(seed)
                sides = {
                    "random start": FinetuneModule(options.backbone, num_classes=2, weights="none"),
                    "weights": FinetuneModule(options.backbone, num_classes=2, weights=options.weights),
                    "reference": FinetuneModule(options.reference[0], num_classes=2, weights=options.reference[1]),
                }
                for name, model in sides.items():
                    found[name].append(probe(model.eval(), data, seed))
        means = {name: float(np.mean(values)) for name, values in found.items()}
        closed = (means["weights"] - means["random start"]) / (means["reference"] - means["random start"])
        cells = {name: f"{means[name]:.3f} ± {np.std(values):.3f}" for name, values in found.items()}
        rows.append({"folder": Path(folder).name, **cells, "gap closed": f"{closed:.0%}"})
        print(rows[-1], flush=True)
    return rows


def features(model: FinetuneModule, data: FolderDataModule, split: Any) -> tuple[np.ndarray, np.ndarray]:
    found, labels = [], []
    with torch.inference_mode():
        for batch in data.eval_loader(split):
            found.append(model.features(batch["image"]))
            labels.append(batch["label"])
    return torch.cat(found).numpy(), torch.cat(labels).numpy()


def probe(model: FinetuneModule, data: FolderDataModule, seed: int) -> float:
    x, y = features(model, data, "train")
    chosen = np.concatenate(
        [
            np.random.default_rng(seed).permutation(np.flatnonzero(y == label))[: round(0.8 * np.sum(y == label))]
            for label in np.unique(y)
        ]
    )
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    fitted = GridSearchCV(classifier, {"logisticregression__C": [0.001, 0.01, 0.1]}, cv=3).fit(x[chosen], y[chosen])
    return float(fitted.score(*features(model, data, "val")))


def few_shot(options: argparse.Namespace) -> list[dict[str, str]]:
    rows = []
    for folder in options.few:
        ours, scratch, seconds = [], [], []
        for seed in range(options.few_seeds):
            with tempfile.TemporaryDirectory(prefix="few-") as root:
                draw(folder, root, options.shots, seed)
                took, accuracy = train(root, options, seed, options.weights, options.epochs, SMALL)
                ours.append(accuracy)
                seconds.append(took)
                epoch, _ = train(root, options, seed, "none", 2, SCRATCH)
                scratch.append(train(root, options, seed, "none", max(2, round(2 * took / epoch)), SCRATCH)[1])
        cells = {"weights": f"{np.mean(ours):.3f}", "from scratch": f"{np.mean(scratch):.3f}"}
        rows.append({"folder": Path(folder).name, **cells, "seconds each": f"{np.mean(seconds):.0f}"})
        print(rows[-1], flush=True)
    return rows


def draw(folder: str, root: str, shots: int, seed: int) -> None:
    """Link `shots` pictures of each class to train with, and up to 40 others to measure on."""
    data = FolderDataModule(folder, val_fraction=0.3)
    for split, number in (("train", shots), ("val", 40)):
        files = list(zip(data.files(split), data.labels(split), strict=True))
        random.Random(seed).shuffle(files)
        taken: dict[int, int] = {}
        for path, label in files:
            taken[label] = taken.get(label, 0) + 1
            if taken[label] <= number:
                target = Path(root, split, data.classes[label])
                target.mkdir(parents=True, exist_ok=True)
                (target / f"{taken[label]}-{path.name}").symlink_to(path.resolve())


def train(
    root: str, options: argparse.Namespace, seed: int, weights: str, epochs: int, recipe: dict[str, Any]
) -> tuple[float, float]:
    """Return the seconds of training and the accuracy after the last epoch."""
    begin = time.perf_counter()
    with quiet():
        L.seed_everything(seed, verbose=False)
        data = FolderDataModule(**{**recipe["data"], "root": root, "image_size": options.size})
        given = {"backbone": options.backbone, "num_classes": data.num_classes, "weights": weights}
        model = FinetuneModule(**{**recipe["model"], **given})
        average = average_of(RunOptions(**recipe.get("run", {})))
        more = {"check_val_every_n_epoch": epochs, "num_sanity_val_steps": 0, "callbacks": [average] if average else []}
        trainer = L.Trainer(max_epochs=epochs, **more, **QUIET)
        trainer.fit(model, data)
    return time.perf_counter() - begin, float(trainer.callback_metrics["val/acc"])


if __name__ == "__main__":
    main()
