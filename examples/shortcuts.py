"""What shortcuts do: the networks of He et al. 2015 for small pictures, with and without them, and the gradient at their stem.

    python examples/shortcuts.py                       # the built-in digits; some minutes on two cores
    python examples/shortcuts.py photos/ --epochs 10   # pictures of your own

Each network is trained in the same way, watched by the callback `GradientFlow`. Printed is a table; with matplotlib, a picture
is drawn besides.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import logging
import statistics
import warnings
from pathlib import Path
from typing import Any

import lightning as L
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

from finetune import FinetuneModule, FolderDataModule, GradientFlow


class Block(nn.Module):
    """Two convolutions, and around them a shortcut or none."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.stride, self.more, self.shortcut = stride, outputs - inputs, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) → (N, outputs, H / stride, W / stride)."""
        y: Tensor = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.shortcut:  # without parameters: every second pixel, and zeros for the new channels
            y = y + F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return F.relu(y)


class Network(nn.Module):
    """6n + 2 layers with weights: a stem, three groups of n blocks, a classifier.

    Args:
        depth: Number of layers, 20 or 56.
        shortcut: Whether blocks have shortcuts.
        num_classes: Number of classes.
    """

    def __init__(self, depth: int, shortcut: bool, num_classes: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.layer1 = _group(16, 16, 1, blocks, shortcut)
        self.layer2 = _group(16, 32, 2, blocks, shortcut)
        self.layer3 = _group(32, 64, 2, blocks, shortcut)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, num_classes)."""
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def _group(inputs: int, outputs: int, stride: int, blocks: int, shortcut: bool) -> nn.Sequential:
    rest = [Block(outputs, outputs, 1, shortcut) for _ in range(blocks - 1)]
    return nn.Sequential(Block(inputs, outputs, stride, shortcut), *rest)


def residual20(num_classes: int) -> Network:
    """20 layers with shortcuts."""
    return Network(20, True, num_classes)


def plain20(num_classes: int) -> Network:
    """20 layers without."""
    return Network(20, False, num_classes)


def residual56(num_classes: int) -> Network:
    """56 layers with shortcuts."""
    return Network(56, True, num_classes)


def plain56(num_classes: int) -> Network:
    """56 layers without."""
    return Network(56, False, num_classes)


NETWORKS = ("residual20", "plain20", "residual56", "plain56")
STEM, HEAD = "stem", "head"


def main() -> None:
    """Train the four networks and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", default="digits", help="a folder of pictures (default: the built-in digits)")
    parser.add_argument("--epochs", type=int, default=10, help="epochs of each network (default: 10)")
    parser.add_argument("--size", type=int, default=32, help="side of a picture in pixels (default: 32)")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate (default: 0.1)")
    parser.add_argument(
        "--seeds", type=int, default=1, help="how often each is trained, from other random weights (default: 1)"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/shortcuts"), help="where to write (default: runs/shortcuts)")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    rows = []
    flows = {}
    for name in NETWORKS:
        for seed in range(options.seeds):
            folder = options.folder / f"{name}-{seed}"
            metrics = train(name, seed, folder, options)
            flows[name, seed] = norms(folder)
            rows.append(row(name, seed, flows[name, seed], metrics))
    headers = [
        "network",
        "seed",
        "stem, step 0",
        "stem / head, step 0",
        "stem, median",
        "stem, from to",
        "train/loss",
        "val/acc",
    ]
    print(tabulate(rows, headers=headers, disable_numparse=True, colalign=("left", *["right"] * 7)))
    draw(flows, options.folder / "shortcuts.png")


def train(name: str, seed: int, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train one network and return its last metrics."""
    L.seed_everything(seed, verbose=False)
    data = FolderDataModule(options.root, options.batch_size, image_size=options.size, augment="none", workers=0)
    model = FinetuneModule(
        f"shortcuts.{name}", num_classes=data.num_classes, weights="none", init="kaiming", lr=options.lr, warmup_epochs=1
    )
    flow = GradientFlow(folder, every=5)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(max_epochs=options.epochs, callbacks=[flow], num_sanity_val_steps=0, **quiet)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        trainer.fit(model, data)
    warned = [line for line in said.getvalue().splitlines() if line.startswith("warning: ")]
    print("\n  ".join([f"{name}, seed {seed}: {folder}/gradients.csv", *warned]), flush=True)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def norms(folder: Path) -> dict[str, dict[int, float]]:
    """Read the gradient norms of stem and head by step."""
    with (folder / "gradients.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {stage: {int(r["step"]): float(r["grad_norm"]) for r in rows if r["stage"] == stage} for stage in (STEM, HEAD)}


def row(name: str, seed: int, flow: dict[str, dict[int, float]], metrics: dict[str, Any]) -> list[str]:
    """Return a row of the table."""
    stem, head = flow[STEM], flow[HEAD]
    values = [stem[0], stem[0] / head[0], statistics.median(stem.values())]
    spread = f"{min(stem.values()):.2g} to {max(stem.values()):.2g}"
    last = [f"{metrics[name]:.3f}" for name in ("train/loss", "val/acc")]
    return [name, str(seed), *(f"{value:.3g}" for value in values), spread, *last]


def draw(flows: dict[tuple[str, int], dict[str, dict[int, float]]], file: Path) -> None:
    """Draw the gradient norm at the stem by step, if matplotlib is there."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("For a picture: pip install matplotlib")
        return
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="gradient norm at the stem", yscale="log")
    styles = {
        "residual20": ("#0072B2", "--"),
        "plain20": ("#D55E00", "--"),
        "residual56": ("#0072B2", "-"),
        "plain56": ("#D55E00", "-"),
    }
    for (name, seed), flow in flows.items():
        colour, line = styles[name]
        axes.plot(list(flow[STEM]), list(flow[STEM].values()), line, color=colour, lw=1.5, label=name if seed == 0 else None)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)
    print(f"picture: {file}")


if __name__ == "__main__":
    main()
