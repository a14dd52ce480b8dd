"""Pictures of a source and of a target domain, side by side: the dataset, and the sampler that says which of them meet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from finetune.loading import PictureDataset, Position, balanced_order, with_repeats
from finetune.randomness import seed_of

TARGET = "target"
"""The key of a batch under which pictures of the target stand."""

KNOWN = "known"
"""The key among them for the labels to be learned, -1 where there is none to learn; one under `label` is never learned."""

_SHARE_OF_SHOTS = 4  # one in so many pictures of a target batch is a labelled one, where there are some


class PairDataset(Dataset[dict[str, Any]]):
    """Pictures of the source, each with one of the target; an item is asked for by (epoch, index in source, in target).

    A fourth number, that of the repeat, lets an image of the source that stands in an epoch several times look different.
    """

    def __init__(self, source: PictureDataset, target: PictureDataset) -> None:
        self.source, self.target = source, target

    def __len__(self) -> int:
        return max(len(self.source), len(self.target))

    def __getitem__(self, key: tuple[int, ...] | int) -> dict[str, Any]:
        if isinstance(key, int):  # by a sampler that is not ours: trainer.overfit_batches puts one in its place
            key = (0, key % len(self.source), key % len(self.target))
        epoch, source, target, *repeat = key
        found = self.target[(epoch, target)]
        found[KNOWN] = found.pop("label")
        return {**self.source[(epoch, source, *repeat)], TARGET: found}


class TargetDataset(Dataset[dict[str, Any]]):
    """Pictures of the target, marked as such."""

    def __init__(self, pictures: PictureDataset) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {TARGET: self.pictures[index]}


class PairSampler(DistributedSampler[Any]):
    """Which pictures of both domains meet in an epoch of fixed length: a function of (seed, epoch).

    Either domain is gone through in a random order, then in another one, as often as it takes. Lightning leaves samplers of
    this base class as they are.

    Args:
        pairs: Both domains.
        batch_size: Pictures of each domain per batch and process.
        steps: Batches of an epoch and process.
        shots: Labelled pictures of the target; they are a quarter of each batch.
        seed: Seed of the order.
        position: Returns the epoch and how many batches of it are done; if None, the epoch is that of `set_epoch`.
        world: Number of processes.
        rank: Number of this process.
        labels: Labels of the source, (N,), to show each of its classes equally often; None to show each image once.
    """

    def __init__(
        self,
        pairs: PairDataset,
        batch_size: int,
        steps: int,
        shots: Sequence[int] = (),
        seed: int = 0,
        position: Position | None = None,
        world: int = 1,
        rank: int = 0,
        labels: Tensor | None = None,
    ) -> None:
        super().__init__(pairs, num_replicas=world, rank=rank, seed=seed)
        self.sizes = len(pairs.source), len(pairs.target)
        self.batch_size, self.steps, self.shots, self.position = batch_size, steps, list(shots), position
        self.labels = labels
        self.num_samples = steps * batch_size
        self.total_size = self.num_samples * world

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        epoch, done = self.position() if self.position else (self.epoch, 0)
        turn, skip = divmod(done, self.steps)
        source = self._source(epoch, turn)
        target = self._target(epoch, turn)
        pairs = [(epoch, which[0], other, *which[1:]) for which, other in zip(source, target, strict=True)]
        return iter(pairs[skip * self.batch_size :])

    def _source(self, epoch: int, turn: int) -> list[tuple[int, ...]]:
        """Return the images of the source for this process, with the number of the repeat where classes are balanced."""
        if self.labels is None:
            return [(index,) for index in self._stream(range(self.sizes[0]), self.num_samples, epoch, turn, "source")]
        order: list[int] = []
        while len(order) < self.total_size:
            parts = (self.seed, "order", "source", epoch, turn, len(order))
            generator = torch.Generator().manual_seed(seed_of(*parts))
            order += balanced_order(self.labels, generator).tolist()
        return with_repeats(order)[self.rank : self.total_size : self.num_replicas]

    def _target(self, epoch: int, turn: int) -> list[int]:
        labelled = set(self.shots)
        others = [index for index in range(self.sizes[1]) if index not in labelled] or self.shots
        few = max(1, self.batch_size // _SHARE_OF_SHOTS) if labelled else 0
        known = self._stream(self.shots, self.steps * few, epoch, turn, "shots")
        rest = self._stream(others, self.steps * (self.batch_size - few), epoch, turn, TARGET)
        size = self.batch_size - few
        return [i for n in range(self.steps) for i in (*known[n * few : (n + 1) * few], *rest[n * size : (n + 1) * size])]

    def _stream(self, places: Sequence[int], number: int, epoch: int, turn: int, name: str) -> list[int]:
        """Return so many of the places for this process: random orders of all of them, one after the other."""
        found: list[int] = []
        while places and len(found) < number * self.num_replicas:
            parts = (self.seed, "order", name, epoch, turn, len(found))
            order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed_of(*parts)))
            found += [places[index] for index in order.tolist()]
        return found[self.rank : number * self.num_replicas : self.num_replicas]
