"""What stands between pictures and batches: the dataset that reads and transforms, and the samplers that order.

Randomness is a function here: an item's transform of (seed, epoch, path), an epoch's order of (seed, epoch).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, SequentialSampler

from finetune.decoded import Decoded
from finetune.errors import DataError
from finetune.folders import Picture
from finetune.images import FULL, read_image
from finetune.randomness import seed_of
from finetune.transforms import Transform
from finetune.walk import Pictures

Position = Callable[[], tuple[int, int]]
Sampling = Literal["natural", "balanced"]


class PictureDataset(Dataset[dict[str, Any]]):
    """Pictures, read and transformed; an item is asked for by its index, or by (epoch, index) if the transform is random.

    A third number, that of the repeat, lets a picture that stands in an epoch several times look different each time.

    Args:
        root: The folder that the paths start from.
        pictures: Paths and labels.
        transform: uint8 (3, height, width) -> uint8 (3, size, size).
        seed: Seed of a random transform, which then depends on (seed, epoch, path, repeat) alone; None for one without
            randomness.
        decoded: The pictures by their index where they were decoded before; they are read from their files if None.
        advice: Said when a picture cannot be read.
        white: See `images.read_image`.
    """

    def __init__(
        self,
        root: Path,
        pictures: Sequence[Picture],
        transform: Transform,
        seed: int | None = None,
        decoded: Decoded | None = None,
        advice: str = "",
        white: int = FULL,
    ) -> None:
        self.root = str(root)
        self.pictures = pictures
        self.transform = transform
        self.seed = seed
        self.decoded = decoded
        self.advice = advice
        self.white = white

    def __len__(self) -> int:
        return len(self.pictures)

    def paths(self) -> list[str]:
        """Return the paths of the pictures, in order."""
        return [os.path.join(self.root, picture.file) for picture in self.pictures]

    def __getitem__(self, key: int | tuple[int, ...]) -> dict[str, Any]:
        epoch, index, *repeat = key if isinstance(key, tuple) else (0, key)
        file, label = self.pictures[index]
        try:
            image = self.decoded[index] if self.decoded is not None else read_image(os.path.join(self.root, file), self.white)
        except DataError as error:
            raise PictureError(f"{error} {self.advice}") from None
        if self.seed is None:
            image = self.transform(image)
        else:
            with seeded(seed_of(self.seed, epoch, file, *repeat)):
                image = self.transform(image)
        return {"image": image, "label": label, "index": index}


class UnlabelledDataset(PictureDataset):
    """All images below a folder, without labels.

    Args:
        root: The folder.
        transform: uint8 (3, height, width) -> uint8 (3, size, size).

    Raises:
        DataError: If there are none.
    """

    def __init__(self, root: Path, transform: Transform) -> None:
        files = [os.path.relpath(path, root) for path in Pictures([root]).all()]
        super().__init__(root, [Picture(file, -1) for file in files], transform)

    def __getitem__(self, key: int | tuple[int, ...]) -> dict[str, Any]:
        item = super().__getitem__(key)
        return {"image": item["image"], "index": item["index"]}


class PictureError(DataError):
    """A picture that cannot be read; also when it was a worker process that tried, whose traceback is left out."""

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].rstrip())


class TrainSampler(DistributedSampler[Any]):
    """The order of an epoch as a function of (seed, epoch), from the batch on where the epoch stands.

    It yields (epoch, index), and (epoch, index, n) for the n-th repeat of a picture where classes are shown equally often.
    Lightning leaves samplers of this base class as they are. The length is that of a whole epoch,
    equal on all processes; a remainder waits for another epoch. Iterating again within an epoch, as loaders that are combined
    with a longer one do, gives another order.

    Args:
        dataset: The pictures.
        batch_size: Pictures per batch and process.
        seed: Seed of the order.
        position: Returns the epoch and how many batches of it are done; if None, the epoch is that of `set_epoch`.
        world: Number of processes.
        rank: Number of this process.
        labels: Labels of the pictures, (N,), to show each class equally often; None to show each picture once.
        shift: Returns how many pictures an epoch is further than its batches say, on all processes together.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        seed: int,
        position: Position | None = None,
        world: int = 1,
        rank: int = 0,
        labels: Tensor | None = None,
        shift: Callable[[int], int] | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas=world, rank=rank, seed=seed)
        self.batch_size = batch_size
        self.position = position
        self.shift = shift
        self.labels = labels
        self.pictures: int = len(dataset)  # type: ignore[arg-type]
        self.num_samples = max(1, self.pictures // world)
        self.total_size = self.num_samples * world

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        epoch, done = self.position() if self.position else (self.epoch, 0)
        turn, skip = divmod(done, max(1, self.num_samples // self.batch_size))
        generator = torch.Generator().manual_seed(seed_of(self.seed, "order", epoch, turn))
        if self.labels is None:
            order: list[tuple[int, ...]] = [(index,) for index in torch.randperm(self.pictures, generator=generator).tolist()]
        else:
            order = with_repeats(balanced_order(self.labels, generator).tolist())
        order *= -(-self.total_size // self.pictures)  # fewer pictures than processes
        begin = skip * self.batch_size * self.num_replicas + (self.shift(epoch) if self.shift and not turn else 0)
        mine = order[begin + self.rank : self.total_size : self.num_replicas]
        return iter([(epoch, *which) for which in mine])


def balanced_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Return a shuffled order of as many pictures as there are, in which each class stands equally often, give or take one.

    Pictures of small classes stand there several times, each as often as the others of its class, give or take one; of large
    classes a part is drawn.

    Args:
        labels: Labels of all pictures, (N,).
        generator: Source of the randomness.
    """
    classes: Tensor = torch.unique(labels)
    quota, more = divmod(len(labels), len(classes))
    lucky = torch.randperm(len(classes), generator=generator)[:more].tolist()
    parts = []
    for place, label in enumerate(classes):
        members = (labels == label).nonzero().flatten()
        wanted = quota + (place in lucky)
        turns = [members[torch.randperm(len(members), generator=generator)] for _ in range(-(-wanted // len(members)))]
        parts.append(torch.cat([*turns, members[:0]])[:wanted])
    order = torch.cat(parts)
    return order[torch.randperm(len(order), generator=generator)]


def with_repeats(order: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the pictures of an order, with the number of the repeat behind those that stood there before.

    >>> with_repeats([4, 7, 4, 4])
    [(4,), (7,), (4, 1), (4, 2)]
    """
    seen: Counter[int] = Counter()
    found: list[tuple[int, ...]] = []
    for index in order:
        found.append((index, seen[index]) if seen[index] else (index,))
        seen[index] += 1
    return found


class EvalSampler(DistributedSampler[Any], SequentialSampler):
    """Every picture once, always in the same order: a process takes each `world`-th.

    Lightning leaves samplers of the one base class as they are among several processes, and of the other with
    `overfit_batches`.

    Args:
        dataset: The pictures.
        world: Number of processes.
        rank: Number of this process.
        order: The order; that of the dataset if None.
    """

    def __init__(self, dataset: Dataset[Any], world: int, rank: int, order: Sequence[int] | None = None) -> None:
        DistributedSampler.__init__(self, dataset, num_replicas=world, rank=rank, shuffle=False)
        whole: Sequence[int] = range(len(dataset)) if order is None else order  # type: ignore[arg-type]
        self.mine = whole[rank::world]

    def __iter__(self) -> Iterator[int]:
        return iter(self.mine)

    def __len__(self) -> int:
        return len(self.mine)


def stratified_order(labels: Sequence[int], seed: int) -> list[int]:
    """Return an order of all images of which each beginning holds the classes in their shares, as nearly as whole images allow.

    So the first batches are a fair subset, where images in the order of their folders begin with the first class alone. The
    next image is always of the class that lacks most; which one of the class, and the order among equals, are drawn.

    Args:
        labels: Labels of the images.
        seed: Seed of what is drawn.

    >>> order = stratified_order([0, 0, 0, 0, 1, 1, 2, 2], seed=0)
    >>> sorted([0, 0, 0, 0, 1, 1, 2, 2][index] for index in order[:4])
    [0, 0, 1, 2]
    """
    generator = torch.Generator().manual_seed(seed)
    classes, which = torch.unique(torch.tensor(labels, dtype=torch.int64), return_inverse=True)
    members = [(which == place).nonzero().flatten() for place in torch.randperm(len(classes), generator=generator)]
    waiting = [each[torch.randperm(len(each), generator=generator)].tolist() for each in members]
    counts = np.array([len(each) for each in waiting], np.int64)
    lacks = np.zeros(len(counts), np.int64)  # times the number of images, so that all numbers are whole
    order: list[int] = []
    for _ in range(len(labels)):
        lacks += counts
        chosen = int(lacks.argmax())
        lacks[chosen] -= len(labels)
        order.append(waiting[chosen].pop())
    return order


def even_batch_size(pictures: int, world: int, batch_size: int) -> int:
    """Enlarge the batch size so far that all processes have as many batches.

    DistributedDataParallel exchanges buffers in every forward pass, so a process with fewer of them would fall out of step.

    >>> even_batch_size(9, world=2, batch_size=4)  # 5 and 4 pictures
    5
    """
    most = -(-pictures // world)
    while pictures % world and most % batch_size == 1 % batch_size:
        batch_size += 1
    return batch_size


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's generator on the CPU for a while; unlike `torch.manual_seed` it leaves those of the GPUs alone."""
    state = torch.get_rng_state()
    try:
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        torch.set_rng_state(state)
