"""Predictor: name the classes of pictures with a trained model, from memory or streamed from files without end."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchvision.transforms import v2

from finetune import hardware
from finetune.errors import CheckpointError, ConfigError, DataError, did_you_mean
from finetune.images import decode_image, image_to_tensor, read_image
from finetune.trained import Trained, open_trained
from finetune.transforms import InputSpec, Transform, eval_transform

Augmentations = Literal["none", "flip", "crops"]
Picture: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | npt.NDArray[Any] | Tensor"
Values: TypeAlias = npt.NDArray[np.float32]

_ZOOM = 8 / 7  # of the picture that crops are cut from, for an input that asks for no margin itself


class Prediction(NamedTuple):
    """What the model says of one picture; without labels where it could not be read.

    Attributes:
        file: Its path; empty if it came from memory.
        labels: Classes, the most probable first.
        probabilities: Their probabilities.
        error: Why it could not be read; empty if it could.
    """

    file: str
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    error: str = ""


class Answer(NamedTuple):
    """All numbers of one picture: probabilities (C,) or features (D,); None where it could not be read."""

    file: str
    values: Values | None
    error: str


class Predictor:
    """Name the classes of pictures.

        predictor = Predictor("runs/small/2026-01-31_12-00-00")
        predictor(["a.jpg", Image.open("b.png")])[0].labels

    Args:
        model: A checkpoint, a run's folder (its best checkpoint), an exported .onnx file or an exported timm folder;
            or what `open_trained` made of one of them.
        device: A torch device, or `auto`.
        tta: Test-time augmentation, of which probabilities are averaged: none; flip (the picture and its mirror image); crops
            (four corners and the centre of a larger picture, each mirrored too: Krizhevsky et al. 2012), ten times the work.
        temperature: What logits are divided by; if None, what calibration stored with the model, or 1.
        batch_size: Pictures at a time.

    Attributes:
        classes: Names of the classes, in the order of `probabilities`.
        trained: The model.

    Raises:
        CheckpointError: If the model is missing, unreadable, or of another kind.
        ConfigError: If an option is out of range.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | Trained,
        *,
        device: str = "auto",
        tta: Augmentations = "none",
        temperature: float | None = None,
        batch_size: int = 64,
    ) -> None:
        if tta not in get_args(Augmentations):
            kinds = get_args(Augmentations)
            raise ConfigError(f"Unknown test-time augmentation '{tta}'.{did_you_mean(tta, kinds)} Expected {', '.join(kinds)}.")
        if batch_size < 1:
            raise ConfigError(f"Expected a batch size of at least 1, found {batch_size}.")
        self.trained = model if isinstance(model, Trained) else open_trained(model, device, temperature)
        self.tta = tta
        self.batch_size = batch_size
        self.classes = self.trained.classes
        self._size = self.trained.input_spec.size
        self.transform = eval_transform(_zoomed(self.trained.input_spec) if tta == "crops" else self.trained.input_spec)

    def __call__(self, pictures: Picture | Sequence[Picture], topk: int = 1) -> list[Prediction]:
        """Name the classes of pictures in memory or in files.

        Args:
            pictures: One picture or several, of any mix of: paths; bytes of a file; Pillow images; arrays (height, width) or
                (height, width, 3), uint8; tensors (3, height, width), uint8, or float between 0 and 1.
            topk: How many classes for each.

        Raises:
            DataError: If a picture cannot be read.
        """
        several = _as_list(pictures)
        files = [os.fspath(each) if isinstance(each, str | os.PathLike) else "" for each in several]
        return [self.top(Answer(file, row, ""), topk) for file, row in zip(files, self.probabilities(several), strict=True)]

    def inputs(self, pictures: Picture | Sequence[Picture]) -> Tensor:
        """Return images as the network gets them, uint8 (N, 3, size, size); for the pictures see `__call__`.

        These are resized and cropped: what is given back to the predictor would be so twice.
        """
        white = self.trained.input_spec.white
        return torch.stack([self.transform(_read(each, white)) for each in _as_list(pictures)])

    def probabilities(self, pictures: Picture | Sequence[Picture]) -> Values:
        """Return the probabilities of all classes, (N, C); for the pictures see `__call__`."""
        return self._in_batches(pictures, self._probabilities, len(self.classes))

    def features(self, pictures: Picture | Sequence[Picture]) -> Values:
        """Return what the head sees of pictures, (N, D); for the pictures see `__call__`."""
        return self._in_batches(pictures, self._features, self.feature_width)

    @property
    def feature_width(self) -> int:
        """How many features a picture has."""
        return len(self._features(torch.zeros(1, 3, self._size, self._size, dtype=torch.uint8))[0])

    def top(self, answer: Answer, topk: int) -> Prediction:
        """Return the most probable classes of an answer."""
        if answer.values is None:
            return Prediction(answer.file, (), (), answer.error)
        best = np.argsort(-answer.values, kind="stable")[:topk]
        return Prediction(answer.file, tuple(self.classes[i] for i in best), tuple(answer.values[best].tolist()))

    def stream(
        self, files: Iterable[str], *, start: int = 0, embed: bool = False, workers: int | None = None
    ) -> Iterator[list[Answer]]:
        """Answer pictures in files batch by batch, in their order; memory does not grow with their number.

        Args:
            files: Paths; each process that reads walks through all of them, so they must be iterable more than once.
            start: How many to leave out at the beginning.
            embed: Answer with features instead of probabilities.
            workers: Processes that read pictures; one per core if None.

        Yields:
            The answers of a batch; a picture that cannot be read has an error instead of numbers.
        """
        workers = hardware.worker_count() if workers is None else workers
        dataset = _Files(files, self.transform, self.batch_size, start, self.trained.input_spec.white)
        compute = self._features if embed else self._probabilities
        for batch, images, errors in DataLoader(dataset, batch_size=None, num_workers=workers):
            read = [file for file, error in zip(batch, errors, strict=True) if not error]
            rows = iter(self._finite(compute(images), read) if images is not None else ())
            yield [Answer(file, None if error else next(rows), error) for file, error in zip(batch, errors, strict=True)]

    def _in_batches(self, pictures: Picture | Sequence[Picture], compute: Callable[[Tensor], Values], width: int) -> Values:
        several = _as_list(pictures)
        found = []
        for at in range(0, len(several), self.batch_size):
            batch = several[at : at + self.batch_size]
            names = [os.fspath(p) if isinstance(p, str | os.PathLike) else f"image {at + i}" for i, p in enumerate(batch)]
            found.append(self._finite(compute(self.inputs(batch)), names))
        return np.concatenate(found) if found else np.zeros((0, width), np.float32)

    def _finite(self, values: Values, names: Sequence[str]) -> Values:
        """Return what was computed of images, (N, ...), if all of it is finite.

        Raises:
            CheckpointError: If it is not; the message names the first such image.
        """
        odd = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(1))
        if len(odd):
            raise CheckpointError(
                f"{self.trained.path} computes NaN or infinity for {names[odd[0]]}, so it says nothing of the image. Its "
                "weights are damaged, or too large for the kind of number that it computes in."
            )
        return values

    @torch.inference_mode()
    def _probabilities(self, images: Tensor) -> Values:
        views = self._views(images)
        mean = sum((self.trained.probabilities(view).float() for view in views), torch.zeros(())) / len(views)
        return mean.numpy(force=True)

    @torch.inference_mode()
    def _features(self, images: Tensor) -> Values:
        if self.trained.features is None:
            raise ConfigError(
                f"{self.trained.path} does not hold features, as its model computes logits in a way of its own. Embed with the "
                "checkpoint it was exported from."
            )
        views = self._views(images)
        mean = sum((self.trained.features(view).float() for view in views), torch.zeros(())) / len(views)
        return mean.numpy(force=True)

    def _views(self, images: Tensor) -> Sequence[Tensor]:
        if self.tta == "none":
            return [images]
        if self.tta == "flip":
            return [images, images.flip(-1)]
        views: Sequence[Tensor] = v2.TenCrop(self._size)(images)
        return views


def _zoomed(spec: InputSpec) -> InputSpec:
    """Return the larger square that crops are cut from: what evaluation resizes the shorter side to."""
    larger = max(round(spec.size / spec.crop), round(spec.size * _ZOOM))
    return replace(spec, size=larger, crop=1.0)


def _as_list(pictures: Picture | Sequence[Picture]) -> list[Any]:
    """Return the pictures one by one; a batch (N, 3, height, width) is as many."""
    if isinstance(pictures, Tensor | np.ndarray):
        return list(pictures) if pictures.ndim == 4 else [pictures]
    if isinstance(pictures, str | bytes | os.PathLike | Image.Image):
        return [pictures]
    return list(pictures)


def _read(picture: Any, white: int) -> Tensor:
    """Return a picture as uint8 (3, height, width)."""
    if isinstance(picture, str | os.PathLike):
        return read_image(picture, white)
    if isinstance(picture, bytes | bytearray | memoryview):
        return decode_image(bytearray(picture), f"a picture of {len(picture)} bytes", white)
    if isinstance(picture, Image.Image):
        return _from_pillow(picture, white)
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.ndim in (2, 3):
        try:
            return _from_pillow(Image.fromarray(picture), white)
        except TypeError:
            pass  # the message below says what was expected
    if isinstance(picture, Tensor) and picture.ndim == 3 and len(picture) == 3:
        if picture.dtype == torch.uint8:
            return picture.cpu()
        if picture.is_floating_point() and float(picture.min()) >= 0 and float(picture.max()) <= 1:
            return picture.detach().cpu().mul(255).round().to(torch.uint8)
    found = type(picture).__name__
    if isinstance(picture, Tensor | np.ndarray):
        found += f" of shape {tuple(picture.shape)} and {picture.dtype}"
    raise DataError(
        "Expected a path, the bytes of a file, a Pillow image, a uint8 array (height, width[, 3]), or a tensor (3, height, "
        f"width) that is uint8 or float between 0 and 1; found {found}."
    )


def _from_pillow(image: Image.Image, white: int) -> Tensor:
    try:
        return image_to_tensor(image, white)
    except (ValueError, OSError) as error:
        raise DataError(f"The picture cannot be used: {error}.") from error


class _Files(IterableDataset[tuple[list[str], Tensor | None, list[str]]]):
    """Batches of pictures that are read as they come; of several processes each takes the batches whose turn it is."""

    def __init__(self, files: Iterable[str], transform: Transform, batch_size: int, start: int, white: int) -> None:
        self.files = files
        self.transform = transform
        self.batch_size = batch_size
        self.start = start
        self.white = white

    def __iter__(self) -> Iterator[tuple[list[str], Tensor | None, list[str]]]:
        worker = get_worker_info()
        mine, world = (worker.id, worker.num_workers) if worker else (0, 1)
        paths = itertools.islice(self.files, self.start, None)
        for turn in itertools.count():
            batch = list(itertools.islice(paths, self.batch_size))
            if not batch:
                return
            if turn % world == mine:
                yield self._read(batch)

    def _read(self, batch: list[str]) -> tuple[list[str], Tensor | None, list[str]]:
        images, errors = [], []
        for file in batch:
            try:
                images.append(self.transform(read_image(file, self.white)))
                errors.append("")
            except DataError as error:
                errors.append(str(error))
            except (MemoryError, RuntimeError) as error:  # torch has no class of its own for want of memory
                if isinstance(error, RuntimeError) and "memory" not in str(error):
                    raise
                errors.append(f"{file} cannot be resized: there is no memory for it.")
        return batch, torch.stack(images) if images else None, errors
