"""The data of distillation: pictures without labels, cut out in views, each with what the teacher makes of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from finetune.console import say
from finetune.content import contents
from finetune.errors import ConfigError, DataError
from finetune.folders import Picture, Split
from finetune.hardware import best_device, worker_count
from finetune.hub import pretrained_cfg
from finetune.loading import PictureDataset, TrainSampler, seeded
from finetune.module import FinetuneModule
from finetune.randomness import global_seed, seed_of
from finetune.reuse import dataset_key, keep, weights_hash
from finetune.runs import find_checkpoint
from finetune.sample import BUILT_IN
from finetune.split_changes import Image, describe
from finetune.split_data import SplitDataModule
from finetune.store import Rows, Store
from finetune.trained import load_model
from finetune.transforms import Augmentation, InputSpec, change_look, eval_transform, random_crop
from finetune.walk import Pictures
from finetune.weight_files import sha256_of


class DistillDataModule(SplitDataModule):
    """Pictures without labels, in views, each with what the teacher makes of it.

    Batches hold `image` uint8 (N, 3, size, size), `target` float32 (N, C, grid, grid), the teacher's features, and `index`
    int64 (N,).

    Args:
        pictures: Folders, searched to the bottom, and files; or `digits`, which is built in.
        teacher: A timm model name, or a run of yours or its checkpoint.
        teacher_weights: Weights of a timm teacher: auto, hub, or a file.
        teacher_size: Height and width for the teacher in pixels; by default what its weights expect.
        grid: The teacher's features are averaged in grid x grid parts of the picture, so 2 gives four targets for each.
        views: How many views of each picture there are; an epoch takes one, and the next epoch the next.
        augment: How views are cut (light, medium, strong, as in training), and how they change for the student's eyes only.
        batch_size: Pictures per training step and device.
        image_size: Height and width for the student in pixels; by default what it expects. The teacher sees its own size.
        hflip: Whether mirror images count as views.
        val_fraction: Share of the pictures held out, to see how the student fares on new ones.
        workers: Processes that read pictures; one per core up to 8 if null.
    """

    def __init__(
        self,
        pictures: str | list[str] = "digits",
        teacher: str = "tf_efficientnet_lite0",
        teacher_weights: str = "auto",
        teacher_size: int | None = None,
        grid: int = 1,
        views: int = 4,
        augment: Augmentation = "medium",
        batch_size: int = 64,
        image_size: int | None = None,
        hflip: bool = True,
        val_fraction: float = 0.05,
        workers: int | None = None,
    ) -> None:
        super().__init__()
        pictures = [os.fspath(p) for p in ([pictures] if isinstance(pictures, str | os.PathLike) else pictures)]
        self.save_hyperparameters(logger=False)
        sizes = {"image_size": image_size or 1, "teacher_size": teacher_size or 1}
        for name, value in {"views": views, "grid": grid, "batch_size": batch_size, **sizes}.items():
            if value < 1:
                raise ConfigError(f"Expected data.{name} to be at least 1, found {value}.")
        if not 0 < val_fraction < 1:
            raise ConfigError(f"Expected data.val_fraction to be between 0 and 1, found {val_fraction}.")
        self.places: list[str | Path] = [BUILT_IN[p]() if p in BUILT_IN else p for p in pictures]
        self.teacher_name, self.teacher_weights = teacher, teacher_weights
        self.teacher_size, self.grid = teacher_size, grid
        self.views, self.augment, self.hflip = views, augment, hflip
        self.batch_size, self.image_size, self.val_fraction = batch_size, image_size, val_fraction
        self.workers = worker_count() if workers is None else workers
        self.input_spec = _resized(InputSpec.default(), image_size)

    @cached_property
    def teacher(self) -> FinetuneModule:
        """The teacher, in eval mode."""
        if self._teacher_file is not None:
            return load_model(self._teacher_file)
        number = int(pretrained_cfg(self.teacher_name).num_classes)
        return FinetuneModule(self.teacher_name, num_classes=number, weights=self.teacher_weights).eval()

    @property
    def _teacher_file(self) -> Path | None:
        """The checkpoint of a teacher that is a run."""
        return find_checkpoint(self.teacher_name, Path("runs")) if Path(self.teacher_name).exists() else None

    def teacher_origin(self) -> dict[str, Any]:
        """Return the teacher's name, and kind and sha256 of the file that holds its weights."""
        file, report = self._teacher_file, self.teacher.weights_report
        if file is not None:
            return {"name": self.teacher_name, "source": "checkpoint", "sha256": sha256_of(file)}
        return {"name": self.teacher_name, "source": report.source, "sha256": report.sha256}

    @property
    def num_classes(self) -> int:
        """Number of classes that the teacher tells apart."""
        return int(self.teacher.hparams["num_classes"])

    @property
    def classes(self) -> list[str] | None:
        """Names of the teacher's classes, if it knows them."""
        return self.teacher.class_names

    @cached_property
    def files(self) -> dict[str, list[Picture]]:
        """The pictures of `train` and `val`."""
        if self._known is None or self._known.says_nothing:
            return self._draw()
        roles = self.roles_of(self._known, self._images(self._draw()))
        if roles is None:
            return self._draw()
        found = {split: [p for p in self._found if roles[os.path.abspath(p.file)] == split] for split in ("train", "val")}
        if lost := [split for split in found if not found[split] and self.lost(split)]:
            raise DataError(f"None of the {lost[0]} images of the run is left: {describe(self.changes)}. Put them back.")
        return {"train": found["train"], "val": sorted(found["val"])}

    @property
    def split_root(self) -> Path:
        """The folder that names of images start from; as they may lie in several, these are whole paths."""
        return Path(os.sep)

    def forget_split(self) -> None:
        """Let `files` be found anew."""
        self.__dict__.pop("files", None)

    def split_images(self) -> list[Image]:
        """Return all images, and how they are used by this training."""
        return self._images(self.files)

    def _images(self, files: dict[str, list[Picture]]) -> list[Image]:
        paths = {os.path.abspath(p.file): "val" if split == "val" else "train" for split, found in files.items() for p in found}
        every = [os.path.abspath(picture.file) for picture in self._found]
        hashes = contents(self.split_root, every, self.workers)
        return [Image(file, "", cast(Split, paths.get(file)), False, *hashes[file]) for file in every]

    @cached_property
    def _found(self) -> list[Picture]:
        return [Picture(path, 0) for path in Pictures(self.places).all()]

    def _draw(self) -> dict[str, list[Picture]]:
        found = self._found
        order = sorted(found, key=lambda picture: seed_of("distill", picture.file))
        held_out = max(1, round(self.val_fraction * len(order)))
        if held_out == len(order):
            raise ConfigError(f"Expected at least two pictures to distill on, found {len(order)}.")
        val = set(order[:held_out])
        return {"train": [p for p in found if p not in val], "val": sorted(val)}

    @property
    def order_key(self) -> int:
        """A number that is equal where the order of an epoch is."""
        return self.order_of(self.batch_size)

    def order_of(self, batch_size: int) -> int:
        """Return what `order_key` would be with another batch size; the order of the pictures does not depend on it."""
        return seed_of(global_seed(), batch_size, *(picture.file for picture in self.files["train"]))

    @property
    def images_of_epoch(self) -> int | None:
        """How many pictures an epoch shows."""
        return len(self.files["train"])

    # ------------------------------------------------------------------------------------------ what the teacher says

    def _dataset(self, split: str, spec: InputSpec, varied: bool) -> PictureDataset:
        train = split == "train" and self.augment != "none"
        fixed = replace(spec, crop=self.teacher.input_spec.crop)  # the student must see as much as the teacher does
        transform: Any = random_crop(spec, self.augment, self.hflip) if train else eval_transform(fixed)
        seed = seed_of(global_seed(), "views") if train else None
        if not (varied and train):
            return PictureDataset(Path(), self.files[split], transform, seed)
        look = v2.Compose([v2.Identity(), *change_look(spec, self.augment)])
        return _Looks(Path(), self.files[split], transform, seed, look=look, views=self.views)

    def targets(self, split: str, view: int) -> Rows:
        """Return the teacher's features of each picture in a view, (number, C, grid, grid), computed on first use."""
        spec = _resized(self.teacher.input_spec, self.teacher_size)
        pictures = self._dataset(split, spec, varied=False)
        named = dict(self.teacher.named_buffers()) | dict(self.teacher.named_parameters())
        key = {
            **dataset_key(pictures, view),
            "weights": weights_hash(named),
            "stage": f"features in {self.grid} x {self.grid}",
        }
        about = {"what": f"features of {self.teacher_name}", "pictures": f"{split}, view {view + 1}"}
        width = int(cast(nn.Linear, self.teacher.head).in_features)
        store = Store(key, (len(pictures), width, self.grid, self.grid), "float16", about)
        device = best_device()
        teacher = self.teacher.to(device)
        return keep(
            store,
            lambda images: features_in(teacher, images, self.grid),
            pictures,
            view,
            device=device,
            workers=self.workers,
            what=f"teacher, {split} view {view + 1} of {self.views if split == 'train' else 1}",
        )

    @cached_property
    def scale(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each of the teacher's features, (C,) each."""
        kept = self.targets("train", 0)
        rows = torch.from_numpy(kept[:: 1 + len(kept) // 10_000].astype("float32"))  # enough to tell, and fits into memory
        std = rows.std((0, 2, 3))
        return rows.mean((0, 2, 3)), std.clamp_min(max(1e-6, float(std.median()) / 10))  # few features hardly ever stir

    # ---------------------------------------------------------------------------------------------- hooks of Lightning

    def prepare_data(self) -> None:
        """Let the teacher look at everything before training starts."""
        for view in range(self.views):
            self.targets("train", view)
        self.targets("val", 0)

    def setup(self, stage: str) -> None:
        """Ask the student for its input."""
        self._restored, self._written = None, False
        spec = getattr(self.trainer.lightning_module, "input_spec", None) if self.trainer else None
        self.input_spec = _resized(spec or InputSpec.default(), self.image_size)
        if self.trainer is None or self.trainer.is_global_zero:
            say(
                f"teacher {self.teacher_name}, {len(self.files['train'])} pictures in {self.views} views to learn from, "
                f"{len(self.files['val'])} held out"
            )

    def train_dataloader(self) -> DataLoader[Any]:
        """Return shuffled batches of the epoch's view."""
        self.write_split()
        views = [self.targets("train", view) for view in range(self.views)]
        pictures = _WithTargets(self._dataset("train", self.input_spec, varied=True), views)
        position = self.position if self.trainer else None
        sampler = TrainSampler(pictures, self.batch_size, global_seed(), position, *self.ranks(), shift=self.shifted_images)
        return self._loader(pictures, sampler=sampler, drop_last=len(sampler) > self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the batches of the pictures that were held out."""
        return self._loader(_WithTargets(self._dataset("val", self.input_spec, varied=False), [self.targets("val", 0)]))

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the batches of the images that were held out, as the student alone sees them."""
        spec = getattr(self.trainer.lightning_module, "input_spec", None) if self.trainer else None
        self.input_spec = _resized(spec or InputSpec.default(), self.image_size)
        return self._loader(PictureDataset(Path(), self.files["val"], eval_transform(self.input_spec)))

    def _loader(self, pictures: Dataset[Any], **options: Any) -> DataLoader[Any]:
        pin = torch.cuda.is_available()
        workers = self.workers
        return DataLoader(
            pictures, batch_size=self.batch_size, num_workers=workers, persistent_workers=workers > 0, pin_memory=pin, **options
        )


def _resized(spec: InputSpec, size: int | None) -> InputSpec:
    return spec if size is None else replace(spec, size=size)


def features_in(module: FinetuneModule, images: Tensor, grid: int) -> Tensor:
    """Return the features of pictures (N, 3, H, W), averaged in grid x grid parts: (N, C, grid, grid).

    Raises:
        ConfigError: If grid is above 1 and the backbone's features are no map.
    """
    if grid == 1:
        return module.features(images)[:, :, None, None]
    forward = getattr(module.backbone, "forward_features", None)
    found = forward(module.normalise(images)) if callable(forward) else None
    if found is None or found.ndim != 4 or found.shape[1] != cast(nn.Linear, module.head).in_features:
        raise ConfigError(f"{module.hparams['backbone']} has no map of features to average in parts: set data.grid to 1.")
    return F.adaptive_avg_pool2d(found, grid)


class _Looks(PictureDataset):
    """Views whose cut depends on (view, picture) and whose colours depend on (epoch, picture)."""

    def __init__(self, *args: Any, look: Any, views: int) -> None:
        super().__init__(*args)
        self.look, self.views = look, views

    def __getitem__(self, key: Any) -> dict[str, Any]:
        epoch, index = key
        item = super().__getitem__((epoch % self.views, index))
        with seeded(seed_of(self.seed or 0, "look", epoch, self.pictures[index].file)):
            item["image"] = self.look(item["image"])
        return item


class _WithTargets(Dataset[dict[str, Any]]):
    """Pictures with the teacher's features."""

    def __init__(self, pictures: PictureDataset, views: Sequence[Rows]) -> None:
        self.pictures, self.views = pictures, views

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, key: Any) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        item = self.pictures[key]
        target = torch.from_numpy(self.views[epoch % len(self.views)][index].astype("float32"))
        return {"image": item["image"], "target": target, "index": index}
