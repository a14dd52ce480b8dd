"""What the benchmarks share: a folder of pictures, rounds that alternate, and a table with the ratio."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from tabulate import tabulate

from finetune import FolderDataModule


def arguments(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("root", nargs="?", default="digits", help="a folder of pictures (default: the built-in digits)")
    parser.add_argument("--train", type=int, default=400, help="pictures to train with, as many of each class (default: 400)")
    parser.add_argument("--val", type=int, default=100, help="pictures to validate with (default: 100)")
    parser.add_argument("--size", type=int, default=224, help="input size in pixels (default: 224)")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1, help="how often each side runs, in turn (default: 1)")
    return parser


@contextlib.contextmanager
def choice(root: str, train: int, val: int) -> Iterator[Path]:
    """Make a folder {train,val}/<class>/ of links to the first pictures of each class, and remove it afterwards."""
    data = FolderDataModule(root, workers=0)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        for split, number in (("train", train), ("val", val)):
            each = max(1, number // data.num_classes)
            by_class: dict[int, int] = {}
            for path, label in zip(data.files(split), data.labels(split), strict=True):
                if by_class.setdefault(label, 0) < each:
                    by_class[label] += 1
                    target = Path(folder, split, data.classes[label])
                    target.mkdir(parents=True, exist_ok=True)
                    (target / path.name).symlink_to(path.resolve())
        yield Path(folder)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep tables, warnings and hints of the libraries off the screen."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def alternate(sides: Mapping[str, Callable[[], float | None]], rounds: int) -> dict[str, list[float]]:
    """Run the sides in turn and return their seconds; a side that returns a number has timed itself."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            begin = time.perf_counter()
            with quiet():
                own = run()
            seconds[name].append(time.perf_counter() - begin if own is None else own)
            print(f"  {name}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
    return seconds


def table(title: str, seconds: Mapping[str, list[float]], reference: str, unit: str = "s") -> str:
    """Return a table of medians, spread and the ratio of the reference to each side."""
    base = statistics.median(seconds[reference])
    rows = [
        (
            name,
            f"{statistics.median(times):.3f}",
            f"{min(times):.3f} to {max(times):.3f}" if len(times) > 1 else "one run",
            f"{base / statistics.median(times):.2f}x",
        )
        for name, times in seconds.items()
    ]
    headers = ["side", f"median [{unit}]", "from to", f"against '{reference}'"]
    return f"\n{title}\n" + tabulate(rows, headers=headers, disable_numparse=True, colalign=("left", "right", "left", "right"))


def machine() -> str:
    """Say in one line on what the figures were measured."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{cores} cores, {torch.get_num_threads()} threads"
    return f"{platform.machine()}, {device}, torch {torch.__version__}, Python {platform.python_version()}"
