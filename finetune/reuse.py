"""What a frozen network makes of pictures is computed once, kept in a `Store`, and served from there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from finetune.loading import PictureDataset
from finetune.store import BLOCK, Rows, Store, file_identity

_VERSION = 1  # of the way from a file to a row; a change makes all that is kept void


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """Hash named tensors, values and all."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors.items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def pictures_key(dataset: PictureDataset, view: int) -> dict[str, Any]:
    """Return what pictures depend on when they come out of a dataset: the files, the transform and what varies it.

    Args:
        dataset: Pictures and their transform.
        view: Which of the transform's random results is meant, if it is random.
    """
    files = hashlib.blake2b(digest_size=16)
    for path in dataset.paths():
        files.update(f"{file_identity(path)}\n".encode("utf-8", "surrogateescape"))
    random = None if dataset.seed is None else [dataset.seed, view]
    versions = [_VERSION, torch.__version__, torchvision.__version__]
    return {"files": files.hexdigest(), "transform": repr(dataset.transform), "random": random, "versions": versions}


def keep(
    store: Store,
    compute: Callable[[Tensor], Tensor],
    dataset: PictureDataset,
    view: int = 0,
    *,
    device: torch.device | str = "cpu",
    workers: int = 0,
    what: str = "",
    first: float = 0.0,
) -> Rows:
    """Make a store with the output of a frozen network for each picture, unless it is there, and return its rows.

    Args:
        store: The store, whose key holds all that the output depends on.
        compute: The network: uint8 pictures (N, 3, height, width) on `device` → (N, …).
        dataset: The pictures; row i is that of picture i.
        view: Which of the transform's random results to take.
        device: Where the network is.
        workers: Processes that read pictures.
        what: Said beside the progress bar.
        first: Where to begin, see `Store.make`.

    Raises:
        DataError: If a picture cannot be read, or the rows cannot be written.
    """
    if store.complete:
        return store.rows()
    with tqdm(total=store.shape[0], unit="picture", desc=what, leave=False, disable=None) as bar:

        def load(ranges: Sequence[range]) -> Iterator[Tensor]:
            batches = [[(view, index) for index in numbers] for numbers in ranges]
            bar.update(store.shape[0] - sum(map(len, ranges)) - bar.n)
            few = len(ranges) * BLOCK <= 2 * BLOCK
            for batch in DataLoader(dataset, batch_sampler=batches, num_workers=0 if few else workers):
                yield batch["image"]

        def outputs(images: Tensor) -> Rows:
            with torch.inference_mode():
                rows = compute(images.to(device, non_blocking=True))
            bar.update(len(images))
            return rows.float().cpu().numpy().astype(store.dtype)

        store.make(load, outputs, first)
    return store.rows()


def frozen_copy(module: nn.Module) -> dict[str, Tensor]:
    """Return the named tensors of a network, BatchNorm counters aside, which nothing is computed from."""
    return {name: tensor for name, tensor in module.state_dict().items() if not name.endswith("num_batches_tracked")}
