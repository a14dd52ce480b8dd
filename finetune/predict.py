"""Name the class of pictures: a checkpoint and pictures → a CSV file with label, probability and the runners-up."""

from __future__ import annotations

import contextlib
import csv
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from finetune import checkpoints, hardware
from finetune.backbones import import_path
from finetune.errors import CheckpointError, ConfigError, DataError
from finetune.folders import find_pictures
from finetune.images import read_image
from finetune.module import FinetuneModule
from finetune.runs import find_checkpoint
from finetune.transforms import InputSpec, eval_transform


class Prediction(NamedTuple):
    """What the model says of one picture; without labels where it could not be read."""

    file: str
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    error: str = ""


def load_model(checkpoint: str | os.PathLike[str]) -> FinetuneModule:
    """Load a trained model, ready for prediction, without running pickled code and without the network.

    Args:
        checkpoint: A .ckpt file, a run's folder (its best checkpoint), or `last`.

    Raises:
        CheckpointError: If it is missing, unreadable, or not from this toolkit.
    """
    path = find_checkpoint(os.fspath(checkpoint), Path("runs"))
    class_path = checkpoints.read_own(path)[checkpoints.KEY]["class_path"]
    own = class_path == f"{FinetuneModule.__module__}.{FinetuneModule.__qualname__}"
    try:
        kind = FinetuneModule if own else import_path(class_path)
    except ConfigError as error:
        raise CheckpointError(
            f"{path} was written by {class_path}, which cannot be imported here. Run this in the folder of its project."
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, FinetuneModule)):
        raise CheckpointError(f"{path} names the class {class_path}, which is no FinetuneModule.")
    return kind.load_from_checkpoint(path).eval()


def predict(
    model: FinetuneModule,
    pictures: Sequence[str | os.PathLike[str]],
    *,
    topk: int = 3,
    batch_size: int = 64,
    workers: int | None = None,
) -> Iterator[Prediction]:
    """Predict pictures one batch at a time, in the order of their names.

    Args:
        model: The model, on the device where it shall run.
        pictures: Folders, searched to the bottom, and files.
        topk: How many classes per picture.
        batch_size: Pictures at a time.
        workers: Processes that read pictures; from the cores if None.

    Yields:
        A prediction per picture; a picture that cannot be read has an error instead of labels.

    Raises:
        DataError: If there is no picture at all.
    """
    files = find_pictures(pictures)
    names = model.class_names or [str(index) for index in range(model.hparams["num_classes"])]
    topk = min(topk, len(names))
    if workers is None:
        workers = 0 if len(files) < batch_size else hardware.worker_count()
    loader = DataLoader(_Pictures(files, model.input_spec), batch_size, num_workers=workers, collate_fn=_collate)
    for indices, images, errors in loader:
        if images is not None:
            with torch.inference_mode():
                probabilities, classes = model(images.to(model.device)).float().softmax(1).topk(topk)
        rows = iter(zip(probabilities.tolist(), classes.tolist(), strict=True)) if images is not None else iter(())
        for index, error in zip(indices, errors, strict=True):
            if error:
                yield Prediction(str(files[index]), (), (), error)
            else:
                values, best = next(rows)
                yield Prediction(str(files[index]), tuple(names[i] for i in best), tuple(values))


def predict_to_csv(
    checkpoint: str,
    pictures: Sequence[str],
    out: str = "predictions.csv",
    topk: int = 3,
    batch_size: int = 64,
    workers: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> None:
    """Do what `resnet-finetune predict` does: predict pictures and write the table.

    Args:
        checkpoint: A .ckpt file, a run's folder, or `last`.
        pictures: Folders and files.
        out: Where to write; it appears when it is complete.
        topk: How many classes per picture.
        batch_size: Pictures at a time.
        workers: Processes that read pictures; from the cores if None.
        device: A torch device, or `auto`.
        overwrite: Replace the output if it exists.

    Raises:
        ConfigError: If the output exists, or an option is out of range.
    """
    target = Path(out)
    if target.exists() and not overwrite:
        raise ConfigError(f"{target} exists already and is not overwritten: give another --out, or --overwrite.")
    if topk < 1 or batch_size < 1:
        raise ConfigError(f"Expected --topk and --batch_size to be at least 1, found {topk} and {batch_size}.")
    model = load_model(checkpoint).to(_device(device))
    if not model.classifies:
        raise ConfigError(
            f"The head of {checkpoint} was not trained, so it names no classes: expected a run that was trained on classes, or "
            "distilled with --model.logits_weight above 0. Train a head on it with: fit --model.weights CHECKPOINT"
        )
    total = len(find_pictures(pictures))
    rows = predict(model, pictures, topk=topk, batch_size=batch_size, workers=workers)
    failed = _write(tqdm(rows, total=total, unit="picture", disable=None), target, min(topk, model.hparams["num_classes"]))
    print(
        f"{total} pictures, {failed} of them unreadable (see the column 'error'): {target}"
        if failed
        else f"{total} pictures: {target}"
    )


def _write(rows: Iterable[Prediction], target: Path, topk: int) -> int:
    """Write the table beside its place and move it there when it is complete; return how many rows have an error."""
    failed = 0
    header = ["file", "label", "probability"]
    header += [f"{column}_{rank}" for rank in range(2, topk + 1) for column in ("label", "probability")]
    partial = target.with_name(f"{target.name}.part")
    try:
        with partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as handle:
            writer = csv.writer(handle)
            writer.writerow([*header, "error"])
            for row in rows:
                failed += bool(row.error)
                pairs = zip(row.labels, row.probabilities, strict=True)
                cells = [cell for label, p in pairs for cell in (label, f"{p:.6f}")] or [""] * (2 * topk)
                writer.writerow([row.file, *cells, row.error])
        os.replace(partial, target)
    except OSError as error:
        raise ConfigError(f"{target} cannot be written: {error.strerror or error}. Give another --out.") from error
    finally:
        with contextlib.suppress(OSError):  # it was moved, or could not be made in the first place
            partial.unlink()
    return failed


def _device(name: str) -> torch.device:
    try:
        device = hardware.best_device() if name == "auto" else torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"The device '{name}' cannot be used: {str(error).splitlines()[0]} Give --device auto or cpu."
        ) from error
    return device


class _Pictures(Dataset[tuple[int, Tensor | None, str]]):
    def __init__(self, files: Sequence[Path], spec: InputSpec) -> None:
        self.files = files
        self.transform = eval_transform(spec)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, str]:
        try:
            return index, self.transform(read_image(self.files[index])), ""
        except DataError as error:
            return index, None, str(error)


def _collate(items: list[Any]) -> tuple[list[int], Tensor | None, list[str]]:
    images = [image for _, image, _ in items if image is not None]
    return [index for index, _, _ in items], torch.stack(images) if images else None, [error for _, _, error in items]
