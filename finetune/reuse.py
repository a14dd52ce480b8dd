"""What a frozen network makes of pictures is computed once, kept in a `Store`, and served from there.

Below the lowest stage that trains nothing changes from epoch to epoch. What the frozen stages make of each picture is a
function of their weights, the arithmetic, the transform and the file, which together are the key of a store; so it is found
again in the next epoch, in the next phase that freezes as much, and in the next run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from finetune.console import tell
from finetune.errors import ConfigError, did_you_mean
from finetune.images import white_text
from finetune.loading import PictureDataset
from finetune.store import Rows, Store, format_bytes, pictures_key, take

ReuseType = Literal["float32", "float16"]


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """Hash named tensors, values and all."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors.items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def dataset_key(dataset: PictureDataset, view: int) -> dict[str, Any]:
    """Return what pictures depend on when they come out of a dataset.

    Args:
        dataset: Pictures and their transform.
        view: Which of the transform's random results is meant, if it is random.
    """
    random = None if dataset.seed is None else [dataset.seed, view]
    kept = f"{dataset.decoded.side} pixels, " if dataset.decoded else ""
    return pictures_key(dataset.paths(), f"{kept}{dataset.transform!r}{white_text(dataset.white)}", random)


def keep(
    store: Store,
    compute: Callable[[Tensor], Tensor],
    dataset: PictureDataset,
    view: int = 0,
    *,
    device: torch.device | str = "cpu",
    workers: int = 0,
    at_once: int = 64,
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
        at_once: How many pictures pass the network together, on which its memory depends.
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
            for batch in DataLoader(dataset, batch_sampler=batches, num_workers=workers if len(ranges) > 2 else 0):
                yield batch["image"]

        def outputs(images: Tensor) -> Rows:
            with torch.inference_mode():
                parts = torch.split(images.to(device, non_blocking=True), at_once)
                rows = [compute(part).float().cpu() for part in parts]
            bar.update(len(images))
            return torch.cat(rows).numpy().astype(store.dtype, copy=False)

        store.make(load, outputs, first)
    return store.rows()


@dataclass(frozen=True)
class Reuse:
    """What the user wants of reuse.

    Attributes:
        views: How many versions of each training picture are kept; 0 for exact, which allows no random transform.
        dtype: Kind of number that is kept.
        budget: Bytes that what is kept for one phase may take.
    """

    views: int
    dtype: ReuseType
    budget: float

    @classmethod
    def parse(cls, option: str | bool, dtype: ReuseType, gigabytes: float, random: bool) -> Reuse | None:
        """Read the option `reuse`: off, exact or views:K.

        Args:
            option: The option.
            dtype: See the attributes.
            gigabytes: The budget.
            random: Whether training pictures vary at random.

        Raises:
            ConfigError: If it is none of these, or exact where pictures vary.
        """
        text = str(option)
        name, _, number = text.partition(":")
        if text == "off":
            return None
        if text == "exact" and random:
            raise ConfigError(
                "data.reuse exact keeps one result per picture, but data.augment varies the pictures. Set data.augment "
                "none, or data.reuse views:8 to keep 8 versions of each picture."
            )
        if text == "exact":
            return cls(0, dtype, gigabytes * 1e9)
        if name == "views" and number.isdigit() and int(number) > 0:
            return cls(int(number) if random else 0, dtype, gigabytes * 1e9)
        hint = did_you_mean(name, ["off", "exact", "views"])
        raise ConfigError(f"Unknown data.reuse '{text}'.{hint} Expected off, exact or views:K, such as views:8.")


class Kept(NamedTuple):
    """What the stages up to and including `stage` made of pictures, in the place of the pictures.

    Attributes:
        activation: (N, …).
        stage: The last stage that it went through.
    """

    activation: Tensor
    stage: str


class ReuseLoader:
    """Batches of pictures where something below changes, and of what was kept where nothing does.

    Which of the two is decided when an epoch begins, by the module's freezing phase. The batches hold the same pictures in the
    same order either way: `image`, or `kept` and `stage`, beside `label` and `index`.

    Args:
        pictures: The loader of pictures, with a `PictureDataset`.
        reuse: What the user wants.
        trainer: The trainer, whose module says what is frozen.
        split: Said in messages.
    """

    def __init__(self, pictures: DataLoader[dict[str, Any]], reuse: Reuse, trainer: Any, split: str) -> None:
        self.pictures, self.reuse, self.trainer, self.split = pictures, reuse, trainer, split
        self.dataset = cast(PictureDataset, pictures.dataset)
        self._labels = torch.tensor([picture.label for picture in self.dataset.pictures])
        self._served: tuple[Any, Rows] | None = None

    def __len__(self) -> int:
        return len(self.pictures)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        stage = frozen_line_now(self.trainer)
        keys: list[Any] = list(self.pictures.sampler)
        epoch = keys[0][0] if keys and isinstance(keys[0], tuple) else 0
        rows = self._rows(stage, epoch) if stage else None
        if rows is None or stage is None:
            yield from self.pictures
            return
        size = self.pictures.batch_size or 1
        last = len(keys) - len(keys) % size if self.pictures.drop_last else len(keys)
        for start in range(0, last, size):
            indices = [key[1] if isinstance(key, tuple) else key for key in keys[start : min(start + size, last)]]
            kept = activations(rows, indices)
            yield {"kept": pinned(kept), "stage": stage, "label": pinned(self._labels[indices]), "index": torch.tensor(indices)}

    def _rows(self, stage: str, epoch: int) -> Rows | None:
        views = self.reuse.views if self.dataset.seed is not None else 0
        view = epoch % views if views else 0
        now = self.trainer.lightning_module.phase, stage, view  # a later phase may freeze what was trained meanwhile
        if self._served is None or self._served[0] != now:
            rows = frozen_rows(self.trainer, self.pictures, stage, view, self.reuse, self.split)
            if rows is None:
                return None
            self._served = now, rows
        return self._served[1]


def activations(rows: Rows, indices: Sequence[int]) -> Tensor:
    """Return what was kept of some pictures, (N, C) or (N, C, height, width)."""
    kept = torch.from_numpy(take(rows, indices))
    return kept.movedim(-1, 1) if kept.ndim == 4 else kept


def pinned(tensor: Tensor) -> Tensor:
    """Return the tensor in pinned memory where there is a CUDA device, from which the copy there is faster."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def frozen_line_now(trainer: Any) -> str | None:
    """Return the last stage below which nothing changes in the present phase.

    Raises:
        ConfigError: If the module knows no stages, or no phase of the run has such a stage.
    """
    module = trainer.lightning_module
    timetable = getattr(module, "timetable", None)
    if not hasattr(module, "frozen_line"):
        raise ConfigError(f"data.reuse needs a FinetuneModule, found {type(module).__name__}. Set data.reuse off.")
    if timetable is None or module.phase is None:  # before training, as in a sanity check
        return None
    if not any(module.frozen_line(phase) for phase in timetable.phases):
        raise ConfigError(f"data.reuse has nothing to keep: {module.why_nothing_is_frozen()}. Set data.reuse off.")
    if any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):
        _refuse_refreezing(module, timetable.phases)
    found: str | None = module.frozen_line(module.phase)
    return found


def _refuse_refreezing(module: Any, phases: Sequence[Any]) -> None:
    """Refuse to keep what stages compute that are frozen after they were trained: an average of the weights changes them still.

    Raises:
        ConfigError: If there are such stages.
    """
    trained: set[str] = set()
    for phase in phases:
        line = module.frozen_line(phase)
        below = module.stage_names[: module.stage_names.index(line) + 1] if line else []
        if again := [stage for stage in below if stage in trained]:
            raise ConfigError(
                f"data.reuse cannot keep what {again[0]} computes: it is frozen after it was trained, and run.ema and "
                "run.wise_ft still change it. Set data.reuse off, or leave the average out."
            )
        trained |= set(module.stage_names) if phase.norms else set(phase.train)


def frozen_rows(
    trainer: Any, pictures: DataLoader[dict[str, Any]], stage: str, view: int, reuse: Reuse, split: str
) -> Rows | None:
    """Return what the stages up to `stage` make of each picture, computed unless it is kept; None if it is over the budget.

    Activations with height and width are kept channels last: (number, height, width, C).
    """
    module, dataset = trainer.lightning_module, cast(PictureDataset, pictures.dataset)
    arithmetic = [trainer.precision, str(module.device.type), str(module.memory_layout)]
    with torch.inference_mode():
        blank = torch.zeros(1, 3, *2 * [trainer.datamodule.input_spec.size], dtype=torch.uint8, device=module.device)
        shape = _channels_last(module.lower(blank, stage)).shape[1:]
    key = {**dataset_key(dataset, view), "weights": module.frozen_hash(stage), "stage": stage, "arithmetic": arithmetic}
    about = {"what": f"{module.hparams['backbone']} up to {stage}", "pictures": f"{split} of {dataset.root}, view {view + 1}"}
    store = Store(key, (len(dataset), *shape), reuse.dtype, about)
    whole = store.bytes * max(1, reuse.views if dataset.seed is not None else 1)
    if whole > reuse.budget:
        if view == 0:
            tell(
                module,
                f"reuse: {about['what']} of {len(dataset)} pictures ({split}) would take {format_bytes(whole)}, above "
                f"data.reuse_budget ({format_bytes(reuse.budget)}): in this phase pictures are read instead",
            )
        return None
    if store.complete:
        return store.rows()
    tell(module, f"reuse: {about['what']} is computed once for {len(dataset)} pictures ({split}): {format_bytes(store.bytes)}")
    lower = module.lower if reuse.dtype == "float32" else module.folded_lower()  # float16 rounds anyway

    def compute(images: Tensor) -> Tensor:
        with trainer.precision_plugin.forward_context():
            return _channels_last(lower(images, stage))

    first = trainer.global_rank / trainer.world_size
    options: dict[str, Any] = {"workers": pictures.num_workers, "at_once": pictures.batch_size or 1, "first": first}
    return keep(store, compute, dataset, view, device=module.device, what=f"up to {stage}", **options)


def _channels_last(activation: Tensor) -> Tensor:
    return activation.movedim(1, -1) if activation.ndim == 4 else activation
