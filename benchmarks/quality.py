"""How good the recipes are: against a logistic regression on frozen features (the floor) and against what users write.

    python benchmarks/quality.py photos/ photos/:5 photos/:20 drawings/@96 --weights mobilenetv2_100=mobilenetv2.safetensors \
        --ways floor small one_rate --seeds 3 --epochs 10 --out quality.csv

A folder may be followed by :SHOTS, so many training pictures of each class, and by @PIXELS, the size of the input. All ways
start from the same weights, see the same pictures for the same number of epochs, and are measured after the last one on
pictures that nothing was chosen by: the test split, or where there is none the validation split. A seed draws the shots, too,
and the split of a folder that has none.

Results are appended to --out as they come, so that a benchmark that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import yaml
from common import machine, quiet
from tabulate import tabulate
from torch import nn

from finetune import FinetuneModule, FolderDataModule
from finetune.averaging import average_of
from finetune.defaults import RunOptions
from finetune.folders import PictureFolder
from finetune.recipe_files import find_recipe
from finetune.subsets import drawing

QUIET = {
    "logger": False,
    "limit_val_batches": 0,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
FIELDS = ["backbone", "folder", "shots", "size", "epochs", "way", "seed", "accuracy", "macro", "seconds"]
EVERYTHING = {"freezing": "full", "lr": 1e-3, "lr_scale": None, "head_init": "default", "bn": "auto"}
RECIPES = ("small", "large", "linear_probe", "few_shot")


class Variant(NamedTuple):
    """A recipe, and what differs from it in the options of the model, of the data and of the run."""

    recipe: str = "small"
    model: Mapping[str, Any] = {}
    data: Mapping[str, Any] = {}
    run: Mapping[str, Any] = {}


VARIANTS = {
    "head": Variant(model={"freezing": "head"}),
    "norm": Variant(model={"freezing": "norm"}),
    "last:2": Variant(model={"freezing": "last:2"}),
    "lp_ft": Variant(model={"freezing": "lp_ft"}),
    "gradual": Variant(model={"freezing": "gradual"}),
    "full": Variant(model={"freezing": "full"}),
    "bn_auto": Variant(model={"bn": "auto"}),
    "bn_train": Variant(model={"bn": "train"}),
    "bn_frozen": Variant(model={"bn": "frozen"}),
    "head_default": Variant(model={"head_init": "default"}, run={"wise_ft": None}),
    "not_mixed": Variant(run={"wise_ft": None}),
    "ema": Variant(run={"wise_ft": None, "ema": 0.999}),
    "weighted": Variant(model={"class_weights": "balanced"}),
    "effective": Variant(model={"class_weights": "effective"}),
    "sampled": Variant(data={"sampling": "balanced"}),
    "focal": Variant(model={"focal_gamma": 2.0}),
    "mixup": Variant(model={"mixup": 0.2}),
    "cutmix": Variant(model={"cutmix": 1.0}),
    "l2_sp": Variant(model={"l2_sp": 0.1}),
    "one_rate": Variant(model=EVERYTHING, run={"wise_ft": None}),
    "one_rate/10": Variant(model={**EVERYTHING, "lr": 1e-4}, run={"wise_ft": None}),
}
SINGLE = ("floor", "lightning")


class Row(NamedTuple):
    """One folder under one set of conditions."""

    root: str
    shots: int | None
    size: int
    uneven: float | None = None

    def data(self, seed: int, model: L.LightningModule, options: Mapping[str, Any]) -> FolderDataModule:
        """Return its pictures."""
        kept = {key: value for key, value in options.items() if key not in ("root", "reuse")}
        data = FolderDataModule(
            self.root,
            **{
                **kept,
                "image_size": self.size,
                "shots": self.shots,
                "split_seed": seed,
                "workers": 0,
                "decoded": self.size * 4 // 3,
            },
        )
        if self.uneven is not None:
            data.folder = uneven(data.folder, self.uneven, seed)
        return data


def uneven(folder: PictureFolder, ratio: float, seed: int) -> PictureFolder:
    """Return the folder with fewer training pictures of each class than of the one before, down to a part of 1 / ratio.

    Which class is large and which is small follows from the seed.
    """
    classes = drawing(folder.splits["train"], seed)
    ranks = torch.randperm(len(classes), generator=torch.Generator().manual_seed(seed)).tolist()
    smallest = min(map(len, classes))
    kept = [
        picture
        for rank, pictures in zip(ranks, classes, strict=True)
        for picture in pictures[: round(smallest * ratio ** (-rank / (len(classes) - 1)))]
    ]
    return dataclasses.replace(folder, splits={**folder.splits, "train": kept})


def gradual(stages: Sequence[str], epochs: int) -> list[dict[str, Any]]:
    """Return a policy that thaws all stages within so many epochs, from the head down, also where stages are more."""
    last = [1 + round((len(stages) - 1) * epoch / max(1, epochs - 1)) for epoch in range(epochs)]
    phases = [{"train": list(stages[-number:]), "epochs": 1} for number in dict.fromkeys(last)]
    return [*phases[:-1], {"train": "full"}]


class Documented(L.LightningModule):
    """Transfer learning as Lightning's guide shows it: a frozen feature extractor, a new linear layer, Adam at 0.001."""

    def __init__(self, pretrained: FinetuneModule) -> None:
        super().__init__()
        self.pretrained = pretrained
        self.input_spec = pretrained.input_spec
        self.classifier = nn.Linear(pretrained.head.in_features, pretrained.head.out_features)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.pretrained.eval()
        with torch.no_grad():
            features = self.pretrained.features(images)
        return self.classifier(features)

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch["image"]), batch["label"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.classifier.parameters(), lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", metavar="FOLDER[:SHOTS][@PIXELS]")
    parser.add_argument("--weights", nargs="+", required=True, metavar="BACKBONE=FILE")
    parser.add_argument(
        "--ways", nargs="+", default=["floor", "small", "one_rate"], help=", ".join([*SINGLE, *RECIPES, *VARIANTS])
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--size", type=int, default=96, help="size of the input in pixels (default: 96)")
    parser.add_argument("--uneven", type=float, help="make folders uneven: the largest class has so many times the smallest")
    parser.add_argument(
        "--model", nargs="*", default=[], metavar="OPTION=VALUE", help="options of the model that differ from those of small"
    )
    parser.add_argument("--label", default="", help="said behind the name of a way, where --model changes it")
    parser.add_argument("--out", type=Path, default=Path("quality.csv"))
    options = parser.parse_args()
    if options.model and not options.label:
        parser.error("--model changes what a way is: give it another name in the table with --label")
    done = read(options.out)
    for seed in range(options.seeds):
        for pair in options.weights:
            backbone, _, weights = pair.partition("=")
            for text in options.folders:
                row = parse(text, options.size)._replace(uneven=options.uneven)
                for way in options.ways:
                    key = (
                        backbone,
                        name_of(row),
                        str(row.shots or "all"),
                        str(row.size),
                        str(options.epochs),
                        way + options.label,
                    )
                    if (*key, str(seed)) in done:
                        continue
                    begin = time.perf_counter()
                    changes = {k: yaml.safe_load(v) for k, _, v in (pair.partition("=") for pair in options.model)}
                    accuracy, macro = run(way, backbone, weights, row, seed, options.epochs, changes)
                    seconds = time.perf_counter() - begin
                    append(options.out, [*key, seed, f"{accuracy:.4f}", f"{macro:.4f}", f"{seconds:.1f}"])
                    print(*key, seed, f"{accuracy:.4f} {seconds:.1f} s", flush=True)
    print(table(options.out))
    if options.uneven:
        print("\nThe same over classes (macro):", table(options.out, "macro"), sep="\n")
    print(f"\n{machine()}")


def name_of(row: Row) -> str:
    return Path(row.root).name + (f" {row.uneven:g}:1" if row.uneven else "")


def parse(text: str, size: int) -> Row:
    text, _, pixels = text.partition("@")
    root, _, shots = text.rpartition(":") if text.rpartition(":")[2].isdigit() else (text, "", "")
    return Row(root, int(shots) if shots else None, int(pixels or size))


def run(
    way: str, backbone: str, weights: str, row: Row, seed: int, epochs: int, changes: dict[str, Any]
) -> tuple[float, float]:
    """Train in one way and return the accuracy over pictures and over classes."""
    L.seed_everything(seed, verbose=False)
    start: Callable[..., FinetuneModule] = lambda options: FinetuneModule(  # noqa: E731
        **{**options, "backbone": backbone, "weights": weights, "num_classes": FolderDataModule(row.root).num_classes}
    )
    with quiet():
        if way == "floor":
            model = start({"head_init": "logistic"})
            trainer, data = L.Trainer(max_epochs=1, **QUIET), row.data(seed, model, {})
            trainer.fit(Still(model), datamodule=data)
            return measure(model, data)
        variant = VARIANTS["one_rate" if way == "lightning" else way] if way not in RECIPES else Variant(way)
        options = yaml.safe_load(find_recipe(variant.recipe).read_text())
        in_model = {**options["model"], **(changes if variant.recipe == "small" else {}), **variant.model}
        model = start(in_model)
        if way == "gradual":
            model = start({**in_model, "freezing": gradual(model.stage_names, epochs)})
        data = row.data(seed, model, {**options["data"], **variant.data})
        trained = Documented(model) if way == "lightning" else model
        average = average_of(RunOptions(**{**options.get("run", {}), **variant.run}))
        callbacks = [] if average is None else [average]
        L.Trainer(max_epochs=epochs, callbacks=callbacks, **QUIET).fit(trained, datamodule=data)
        if way == "lightning":
            model.head = trained.classifier
        return measure(model, data)


class Still(L.LightningModule):
    """Let a module solve for its head, and train nothing."""

    def __init__(self, module: FinetuneModule) -> None:
        super().__init__()
        self.module, self.input_spec = module, module.input_spec

    def on_fit_start(self) -> None:
        from finetune.head_start import start_head

        start_head(self.module, self.trainer, "logistic")
        self.trainer.should_stop = True

    def training_step(self, batch: Any, batch_idx: int) -> None:
        return None

    def configure_optimizers(self) -> None:
        return None


@torch.inference_mode()
def measure(model: FinetuneModule, data: FolderDataModule) -> tuple[float, float]:
    model.eval()
    hits: dict[int, list[bool]] = {}
    for batch in data.eval_loader("test" if data.has_test else "val"):
        right = model(batch["image"]).argmax(1) == batch["label"]
        for label, hit in zip(batch["label"].tolist(), right.tolist(), strict=True):
            hits.setdefault(label, []).append(hit)
    every = [hit for found in hits.values() for hit in found]
    return statistics.mean(every), statistics.mean(statistics.mean(found) for found in hits.values())


# ------------------------------------------------------------------------------------------------------------ the results


def read(path: Path) -> set[tuple[str, ...]]:
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        return {tuple(row[field] for field in FIELDS[:7]) for row in csv.DictReader(file)}


def append(path: Path, values: list[Any]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(FIELDS)
        writer.writerow(values)
        file.flush()
        os.fsync(file.fileno())


def table(path: Path, value: str = "accuracy") -> str:
    """Return mean and spread (standard deviation) in percent of each way, and the seconds of a run."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    ways = list(dict.fromkeys(row["way"] for row in rows))
    lines = []
    for key in dict.fromkeys(tuple(row[field] for field in FIELDS[:5]) for row in rows):
        cells = []
        for way in ways:
            found = [row for row in rows if tuple(row[field] for field in FIELDS[:5]) == key and row["way"] == way]
            scores = [100 * float(row[value]) for row in found]
            spread = f" ±{statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
            took = statistics.mean(float(row["seconds"]) for row in found) if found else 0.0
            cells.append(f"{statistics.mean(scores):.1f}{spread} ({took:.0f} s)" if scores else "")
        lines.append([" ".join(key[:1]), f"{key[1]} {key[2]}", *cells])
    return tabulate(lines, ["backbone", "folder, shots", *ways], disable_numparse=True)


if __name__ == "__main__":
    main()
