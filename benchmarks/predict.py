"""Prediction: a hand-written loop with timm and ImageFolder, against `Predictor` on a checkpoint and on its export to ONNX.

python benchmarks/predict.py photos/ --backbone resnet18

Seconds are those of naming the classes of all pictures, after the model was loaded. `--memory` instead compares the peak memory
of the command over ten times as many small pictures, which it makes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import lightning as L
import numpy as np
import timm
import torch
from common import alternate, arguments, choice, machine, quiet, table
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from finetune import FinetuneModule, FolderDataModule
from finetune.export import export
from finetune.predictor import Predictor


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--memory", type=int, metavar="FILES", help="compare the memory over so many and a tenth of them")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, choice(options.root, options.train, options.val) as root:
        checkpoint = trained(Path(folder), options, root)
        if options.memory:
            compare_memory(Path(folder), checkpoint, options)
            return
        files = sorted(str(path) for path in (root / "train").rglob("*") if path.is_file())
        with quiet():
            onnx = export(str(checkpoint), "onnx", str(Path(folder, "onnx")), files[:16]) / "model.onnx"
        workers = min(range(3), key=lambda number: by_hand(root, options, number)())
        sides: dict[str, Callable[[], float]] = {f"hand-written, {workers} workers": by_hand(root, options, workers)}
        for name, model in (("checkpoint", checkpoint), ("ONNX", onnx)):
            predictor = Predictor(model, batch_size=options.batch_size)
            best = min(range(3), key=lambda number, use=predictor: streamed(use, files, number)())
            sides[f"Predictor, {name}, {best} workers"] = streamed(predictor, files, best)
        seconds = alternate(sides, options.rounds)
    title = f"{len(files)} pictures, {options.backbone} at {options.size} px, of {Path(options.root).name}\n{machine()}"
    print(table(title, seconds, next(iter(sides))))


def trained(folder: Path, options: argparse.Namespace, root: Path) -> Path:
    """Save a model as a checkpoint; its weights do not matter here."""
    data = FolderDataModule(root, image_size=options.size)
    model = FinetuneModule(options.backbone, num_classes=data.num_classes, class_names=data.classes, weights="none")
    model.input_spec = replace(model.input_spec, size=options.size)
    with quiet():
        trainer = L.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
        trainer.strategy.connect(model)
        trainer.save_checkpoint(folder / "model.ckpt", weights_only=False)
    return folder / "model.ckpt"


def by_hand(root: Path, options: argparse.Namespace, workers: int) -> Callable[[], float]:
    """Return what a user writes: ImageFolder, Pillow transforms, a timm model in eval mode, inference mode."""
    steps = [transforms.Resize(round(options.size / 0.875)), transforms.CenterCrop(options.size), transforms.ToTensor()]
    transform = transforms.Compose([*steps, transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    dataset = datasets.ImageFolder(str(root / "train"), transform)
    model = timm.create_model(options.backbone, num_classes=len(dataset.classes)).eval()

    def run() -> float:
        begin = time.perf_counter()
        found = []
        with torch.inference_mode():
            for images, _ in DataLoader(dataset, options.batch_size, num_workers=workers):
                found.append(model(images).softmax(1))
        torch.cat(found)
        return time.perf_counter() - begin

    return run


def streamed(predictor: Predictor, files: list[str], workers: int) -> Callable[[], float]:
    """Return a run of the predictor over all files."""

    def run() -> float:
        begin = time.perf_counter()
        found = [answer.values for batch in predictor.stream(files, workers=workers) for answer in batch]
        np.stack([values for values in found if values is not None])
        return time.perf_counter() - begin

    return run


def compare_memory(folder: Path, checkpoint: Path, options: argparse.Namespace) -> None:
    """Run the command over few and over many small pictures, each in a process of its own, and print the peaks."""
    rng = np.random.default_rng(0)
    peaks = []
    for number in (options.memory // 10, options.memory):
        pictures = folder / str(number)
        for index in range(number):
            place = pictures / f"{index // 1000:03d}" / f"{index:06d}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(place)
        for place in list(pictures.rglob("*.png"))[:5]:
            place.write_bytes(b"damaged")
        words = ["predict", str(checkpoint), str(pictures), "--out", str(folder / f"{number}.csv"), "--workers", "0"]
        code = "import sys, resource; from finetune.main import main; main(sys.argv[1:]);"
        code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)"
        done = subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True, text=True)
        said, peak = done.stdout.splitlines()[-2:]
        rows = sum(1 for _ in (folder / f"{number}.csv").open()) - 1
        print(f"{number} files: {peak} MB, {rows} rows; {said.partition(':')[0]}", flush=True)
        peaks.append(float(peak))
    print(f"{machine()}\nratio of the peaks: {peaks[1] / peaks[0]:.3f}")


if __name__ == "__main__":
    main()
