"""A folder of pictures as a Lightning data module: classes, splits and loaders.

Batches are dictionaries: `image` uint8 (N, 3, size, size), `label` int64 (N,) and `index` int64 (N,), the position in
`files(split)`.

The order of an epoch and what augmentation does to a picture are functions of (seed, epoch, picture), not of a stream of random
numbers: the sampler reads from the trainer's loops in which epoch and at which batch it is. A run that is resumed in the middle
of an epoch, or has another number of workers, therefore sees the batches that the plain run sees.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch.utils.data import DataLoader, DistributedSampler

from finetune.console import say
from finetune.decoded import Decoded, keep_decoded
from finetune.depth import depth_text, sampled_depth
from finetune.errors import ConfigError, DataError, did_you_mean
from finetune.folder_split import images_of, with_roles
from finetune.folders import PictureFolder, Split, scan, summary
from finetune.hardware import worker_count
from finetune.images import FULL
from finetune.left_out import SKIP, leaving_out, look_before_training, tell_left_out, write_left_out
from finetune.loading import (
    EvalSampler,
    PictureDataset,
    Sampling,
    TrainSampler,
    UnlabelledDataset,
    even_batch_size,
    stratified_order,
)
from finetune.randomness import global_seed, seed_of
from finetune.reuse import Reuse, ReuseLoader, ReuseType
from finetune.run_split import RunSplit
from finetune.sample import BUILT_IN
from finetune.split_changes import Image, describe
from finetune.split_data import SplitDataModule
from finetune.subsets import check_subset, fewer, fold_of
from finetune.transforms import Augmentation, InputSpec, eval_transform, train_transform

_FEW = 64  # below this number of pictures, starting processes takes longer than reading
_BUILT_IN_SIZE = 64
_NOT_TRUE_HERE = (
    r"The '\w+_dataloader' does not have many workers",  # their number follows from cores and pictures, or was asked for
    r"You're resuming from a checkpoint that ended before the epoch ended",  # the sampler goes on where it ended
    r"Total length of `list` across ranks is zero",  # no validation was asked for
)


class FolderDataModule(SplitDataModule):
    """Train, validate and test on a folder of pictures, or on built-in data.

    Example:
        >>> data = FolderDataModule("digits", batch_size=8, workers=0)
        >>> data.num_classes
        10
        >>> batch = next(iter(data.val_dataloader()))
        >>> batch["image"].shape, batch["image"].dtype
        (torch.Size([16, 3, 64, 64]), torch.uint8)

    Args:
        root: A folder, arranged as <class>/<picture> or {train,val,test}/<class>/<picture>, or `digits`, which is built in
            (for a folder of that name write ./digits).
        batch_size: Pictures per training step and device.
        augment: How much training pictures vary: none, light (crops of 60 to 100 %), medium (30 to 100 %, colours) or strong
            (20 to 100 %, TrivialAugment, erased rectangles).
        image_size: Height and width in pixels. By default what the weights expect, and 64 for the built-in digits.
        hflip: Whether mirror images are the same class. By default yes, and no for the built-in digits.
        val_fraction: Share of each class to validate with, if the folder has no validation split.
        test_fraction: Share of each class to test with, if the folder has no test split.
        split_seed: Another seed draws other pictures for these shares, and for shots, fraction and folds.
        shots: Train on so many pictures of each class only; all if null. Validation and test stay as they are.
        fraction: Train on this share of the pictures of each class only.
        folds: Cross-validation: fit trains so many times, each time with another part of the pictures to validate with, and
            prints all results with their mean and spread.
        fold: Train with this fold only, from 1.
        sampling: How often training pictures are seen: natural (each once per epoch) or balanced (each class equally often:
            pictures of small classes several times, some of large classes in another epoch).
        workers: Processes that read pictures. By default one per core up to 8, and none for fewer than 64 pictures.
        eval_batch_size: Pictures per step and device in validation and test. By default twice the batch size.
        decoded: Keep the pictures decoded, with so many pixels on the shorter side, also for later runs; worth it where they
            are much larger than the input. Pictures are read from their files if null.
        reuse: Whether what the frozen stages make of a picture is computed once and kept, also for later runs: off, exact
            (needs augment none), or views:K (each training picture is kept in K augmented versions, which take turns).
        reuse_dtype: Kind of number that is kept; float16 takes half the room and rounds.
        reuse_budget: Gigabytes that what is kept for one phase may take; a phase that needs more reads pictures instead.
        on_error: What happens where pictures cannot be read. raise: training does not start, or stops, and names them; skip:
            all are decoded once before training, and those that cannot be are left out and named.
        max_errors: Share of the pictures that skip may leave out.
        scale: How grey values of 16 bits become 8: full (65535 is white), or auto (white is the largest value of the 8, 10,
            12, 14 or 16 bits that a sample of the training images needs). The model keeps it for prediction.

    Attributes:
        input_spec: The input that the loaders deliver; `setup` asks the model for it.
    """

    unreadable_remedy = SKIP  # what can be done about pictures that cannot be read, beside replacing them

    def __init__(
        self,
        root: str | os.PathLike[str] = "digits",
        batch_size: int = 32,
        augment: Augmentation = "light",
        image_size: int | None = None,
        hflip: bool | None = None,
        val_fraction: float = 0.2,
        test_fraction: float = 0.0,
        split_seed: int = 0,
        shots: int | None = None,
        fraction: float = 1.0,
        folds: int | None = None,
        fold: int | None = None,
        sampling: Sampling = "natural",
        workers: int | None = None,
        eval_batch_size: int | None = None,
        decoded: int | None = None,
        reuse: str | bool = "off",
        reuse_dtype: ReuseType = "float32",
        reuse_budget: float = 20.0,
        on_error: Literal["raise", "skip"] = "raise",
        max_errors: float = 0.05,
        scale: Literal["full", "auto"] = "full",
    ) -> None:
        super().__init__()
        root = plain_root(root)
        self.save_hyperparameters(logger=False)  # the model may have an option of the same name
        self.root = root
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size or 2 * batch_size
        self.augment = augment
        self.image_size = _BUILT_IN_SIZE if image_size is None and root in BUILT_IN else image_size
        self.hflip = root not in BUILT_IN if hflip is None else hflip
        self.val_fraction, self.test_fraction, self.split_seed = val_fraction, test_fraction, split_seed
        self.shots, self.fraction, self.folds, self.fold = shots, fraction, folds, fold
        self.sampling = sampling
        self.workers = workers
        self.decoded = decoded
        self.on_error, self.max_errors, self.scale = on_error, max_errors, scale
        self._check_options(eval_batch_size)
        off = reuse is False  # how YAML reads the word
        self.reuse = Reuse.parse("off" if off else reuse, reuse_dtype, reuse_budget, random=augment != "none")
        self.input_spec = self._resized(InputSpec.default())

    def _check_options(self, eval_batch_size: int | None) -> None:
        sizes = {
            "batch_size": self.batch_size,
            "eval_batch_size": eval_batch_size,
            "image_size": self.image_size,
            "decoded": self.decoded,
        }
        for name, value in sizes.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                square = ", as images are square" * (name == "image_size")
                raise ConfigError(f"Expected data.{name} to be one whole number{square}; found {value!r}.")
            if value is not None and value < 1:
                raise ConfigError(f"Expected data.{name} to be at least 1, found {value}.")
        if self.on_error not in ("raise", "skip"):
            raise ConfigError(f"Expected data.on_error to be raise or skip, found '{self.on_error}'.")
        if self.scale not in ("full", "auto"):
            raise ConfigError(f"Expected data.scale to be full or auto, found '{self.scale}'.")
        if not 0 <= self.max_errors <= 1:
            raise ConfigError(f"Expected data.max_errors to be between 0 and 1, found {self.max_errors}.")
        if self.workers is not None and self.workers < 0:
            raise ConfigError(f"Expected data.workers to be 0 or more, found {self.workers}.")
        levels = get_args(Augmentation)
        if self.augment not in levels:
            hint = did_you_mean(str(self.augment), levels)
            raise ConfigError(f"Unknown data.augment '{self.augment}'.{hint} Expected {', '.join(levels)}.")
        check_subset(self.shots, self.fraction, self.folds, self.fold)
        val, test = self.val_fraction, self.test_fraction
        if not (0 <= val < 1 and 0 <= test < 1 and val + test < 1):
            raise ConfigError(
                "Expected data.val_fraction and data.test_fraction to be 0 or more and together below 1, "
                f"found {val} and {test}."
            )

    # -------------------------------------------------------------------------------------------------- what there is

    @cached_property
    def folder(self) -> PictureFolder:
        """The classes and pictures; the folder is searched on first use, so no `setup` is needed."""
        return self._fresh() if self._known is None else self._continued(self._known)

    @cached_property
    def _found(self) -> PictureFolder:
        return self._scan()

    def _fresh(self) -> PictureFolder:
        """Return the split of a run that starts now."""
        found = self._found
        if self.folds:
            found = fold_of(found, self.folds, self.fold or 1, self.split_seed)
        return fewer(found, self.shots, self.fraction, self.split_seed)

    def _scan(self) -> PictureFolder:
        if make := BUILT_IN.get(self.root):
            return scan(make())
        try:
            choose = leaving_out(self.max_errors, self.workers) if self.on_error == "skip" else None
            return scan(self.root, self.val_fraction, self.test_fraction, self.split_seed, choose)
        except DataError as error:
            if Path(self.root).expanduser().exists():
                raise
            hint = did_you_mean(self.root, BUILT_IN)
            raise DataError(f"{error}{hint} Expected a folder, or built-in data: {', '.join(BUILT_IN)}.") from None

    @property
    def classes(self) -> list[str]:
        """Names of the classes; the position is the label."""
        return list(self._found.classes)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self._found.classes)

    @property
    def has_test(self) -> bool:
        """Whether there are pictures to test on."""
        return bool(self.folder.splits["test"])

    def files(self, split: Split) -> list[Path]:
        """Return the pictures of a split; `index` in a batch is the position here."""
        return [self.folder.root / picture.file for picture in self.folder.splits[split]]

    def measured_files(self, split: Split) -> list[Path]:
        """Return the pictures that `index` in a batch of an evaluation means.

        They are those of the split; in a validation with `overfit_batches`, those of the training split.
        """
        return self.files("train" if split == "val" and self._overfits else split)

    def labels(self, split: Split) -> list[int]:
        """Return the labels of a split, in the order of `files`."""
        return [picture.label for picture in self.folder.splits[split]]

    def folder_options(self) -> dict[str, Any]:
        """Return the options with which `FolderDataModule` finds the labelled images of this data module again.

        A checkpoint keeps them, so that `evaluate`, `explain` and `export` find the images of its run. A subclass whose images
        are found in another way returns other options, or sets this to None where they lie in no folder.
        """
        known = inspect.signature(FolderDataModule.__init__).parameters
        return {name: value for name, value in self.hparams.items() if name in known}

    # ------------------------------------------------------------------------------------- the split of a run that goes on

    @property
    def split_root(self) -> Path:
        """The folder that names of images start from."""
        return self._found.root

    def forget_split(self) -> None:
        """Let `folder` be found anew."""
        self.__dict__.pop("folder", None)

    def split_images(self) -> list[Image]:
        """Return all images, and how they are used by this training."""
        return self._images(self.folder)

    def _continued(self, known: RunSplit) -> PictureFolder:
        """Return the split of a run that goes on."""
        found = self._found
        if known.says_nothing:
            return self._fresh()
        fresh = self._fresh() if known.table is None or known.is_elsewhere(found.root) else found
        images = self._images(fresh)
        bounded = self.shots is not None or self.fraction < 1
        roles = self.roles_of(known, images, bounded=bounded, unusable=[*found.left_out])
        if roles is None:
            return fresh
        return with_roles(found, images, roles, self._drawn)

    @property
    def _drawn(self) -> set[Split]:
        return {*self._found.drawn, *(("val",) if self.folds else ())}

    def _images(self, folder: PictureFolder) -> list[Image]:
        return images_of(self._found, folder, self._drawn, self.root not in BUILT_IN, self.workers)

    def write_split(self) -> Path | None:
        """Write down how images are used, and which are left out."""
        run = super().write_split()
        if run is not None:
            write_left_out(self.folder, run / "left_out.csv")
        return run

    def _require(self, split: Split) -> None:
        if not self.folder.splits[split] and self.lost(split):
            raise DataError(
                f"None of the {split} images of the run is left in {self.folder.root}: {describe(self.changes)}. Put them "
                "back, or start a new run."
            )

    # ---------------------------------------------------------------------------------------------- hooks of Lightning

    def setup(self, stage: str) -> None:
        """Ask the model for its input; before training, look at the pictures, print what was found and write it down.

        Raises:
            DataError: If there are pictures that cannot be read, and they are not to be left out.
        """
        for message in _NOT_TRUE_HERE:
            warnings.filterwarnings("ignore", message=message)
        trainer = self.trainer
        self._follow_module()
        if stage != "fit":
            return
        if self._known is None:
            self.input_spec = replace(self.input_spec, white=self._white())
        self._restored = None
        self._written = False
        first = trainer is None or trainer.is_global_zero
        if trainer and self.on_error == "raise" and self.root not in BUILT_IN:
            look_before_training(self.folder, self.workers, first, self.unreadable_remedy)
        if first:
            say(summary(self.folder))
            tell_left_out(self.folder)

    def teardown(self, stage: str) -> None:
        """After training, name again the pictures that were left out."""
        if stage == "fit" and (self.trainer is None or self.trainer.is_global_zero):
            tell_left_out(self.folder)

    def train_dataloader(self) -> DataLoader[dict[str, Any]] | ReuseLoader:
        """Return shuffled, augmented training batches; the pictures of an incomplete last batch wait for another epoch."""
        self._require("train")
        self.write_split()
        seed = global_seed()
        trainer: Any = self.trainer
        pictures = self.folder.splits["train"]
        transform = train_transform(self.input_spec, self.augment, self.hflip)
        random = None if self.augment == "none" else seed
        dataset = PictureDataset(
            self.folder.root, pictures, transform, random, self._decoded("train"), self._advice, self.input_spec.white
        )
        if trainer and trainer.overfit_batches:
            return self._overfit_loader(dataset)
        position = self.position if trainer else None
        labels = torch.tensor(self.labels("train")) if self.sampling == "balanced" else None
        sampler = TrainSampler(dataset, self.batch_size, seed, position, *self.ranks(), labels, self.shifted_images)
        loader = self._loader(dataset, self.batch_size, sampler, drop_last=len(sampler) > self.batch_size)
        return self._reusing(loader, "train")

    def val_dataloader(self) -> DataLoader[dict[str, Any]] | ReuseLoader | list[Any]:
        """Return the validation batches in the order of `files`; an empty list if there are no pictures to validate with.

        With `overfit_batches` they are the images that are trained on, see `measured_files`.
        """
        self._require("val")
        if self._overfits and self.folder.splits["val"]:
            pictures, transform = self.folder.splits["train"], eval_transform(self.input_spec)
            return self._overfit_loader(PictureDataset(self.folder.root, pictures, transform, None, self._decoded("train")))
        return self._reusing(self.eval_loader("val"), "val") if self.folder.splits["val"] else []

    @property
    def _advice(self) -> str:
        """What to do about a picture that cannot be read, if that is noticed only now."""
        if self.on_error == "skip":
            return "It could be read before training; mend it and go on with: fit --ckpt_path last"
        return "To train without such pictures: --data.on_error skip"

    def _decoded(self, split: Split) -> Decoded | None:
        return self._decode(self.files(split)) if self.decoded is not None else None

    def _decode(self, files: Sequence[Path]) -> Decoded | None:
        if self.decoded is None or not files:
            return None
        workers = worker_count() if self.workers is None else self.workers
        return keep_decoded([str(path) for path in files], self.decoded, workers, self.input_spec.white)

    def _reusing(self, loader: DataLoader[dict[str, Any]], split: Split) -> DataLoader[dict[str, Any]] | ReuseLoader:
        fits = self.reuse is not None and self.trainer is not None and self.trainer.state.fn == "fit"
        return ReuseLoader(loader, self.reuse, self.trainer, split) if fits and self.reuse else loader

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return the test batches in the order of `files`.

        Raises:
            DataError: If there is no test split.
        """
        if not self.has_test:
            raise DataError(
                f"{self.folder.root} has no test split: expected a folder {self.folder.root / 'test'}/<class>/, or "
                "data.test_fraction above 0 to draw one."
            )
        return self.eval_loader("test")

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return the images to predict, in order: the test split, or else the validation split.

        A folder that is not arranged in classes is searched to the bottom, and batches hold `image` and `index` alone.

        Raises:
            DataError: If there are none.
        """
        self._follow_module()
        try:
            split: Split = "test" if self.has_test else "val"
        except DataError:
            if self.root in BUILT_IN or not Path(self.root).expanduser().is_dir():
                raise
            return self._in_order(UnlabelledDataset(Path(self.root).expanduser(), eval_transform(self.input_spec)), self.root)
        if not self.folder.splits[split]:
            raise DataError(
                f"{self.folder.root} has no images for Trainer.predict: expected a test or a validation split, or a folder of "
                "images without classes. Draw one with data.val_fraction, or give dataloaders of your own."
            )
        return self.eval_loader(split)

    def _follow_module(self) -> None:
        """Take over the input of the trainer's module, which a checkpoint may have changed since `setup`."""
        module = getattr(self.trainer, "lightning_module", None)
        self.input_spec = self._resized(getattr(module, "input_spec", None) or InputSpec.default())

    def eval_loader(self, split: Split) -> DataLoader[dict[str, Any]]:
        """Return the pictures of a split once each, in the order of `files` and without augmentation.

        Several processes share them. Where the trainer limits the batches, the order is one of which each beginning holds all
        classes in their shares, the same in every epoch and run.

        Raises:
            DataError: If there are fewer pictures than processes.
        """
        pictures = self.folder.splits[split]
        dataset = PictureDataset(
            self.folder.root,
            pictures,
            eval_transform(self.input_spec),
            None,
            self._decoded(split),
            self._advice,
            self.input_spec.white,
        )
        return self._in_order(dataset, f"{split} split of {self.folder.root}")

    # ------------------------------------------------------------------------------------------------------- private

    @property
    def order_key(self) -> int:
        """A number that is equal where the order of an epoch is."""
        return self._order(self.batch_size)

    def _order(self, batch_size: int) -> int:
        return seed_of(global_seed(), batch_size, self.sampling, *(picture.file for picture in self.folder.splits["train"]))

    def order_of(self, batch_size: int) -> int:
        """Return what `order_key` would be with another batch size; the order of the pictures does not depend on it."""
        return self._order(batch_size)

    @property
    def images_of_epoch(self) -> int | None:
        """How many pictures an epoch shows."""
        return None if self.trainer and cast(Any, self.trainer).overfit_batches else len(self.folder.splits["train"])

    def _in_order(self, dataset: PictureDataset, name: str) -> DataLoader[dict[str, Any]]:
        world, rank = self.ranks()
        order = self._fair_order(dataset) if _is_limited(self.trainer) else None
        if world == 1:
            sampler = None if order is None else EvalSampler(dataset, 1, 0, order)
            return self._loader(dataset, self.eval_batch_size, sampler)
        if len(dataset) < world:
            raise DataError(
                f"The {name} has {len(dataset)} pictures, expected at least one for each of the {world} processes. Add "
                "pictures or use fewer devices."
            )
        return self._loader(
            dataset, even_batch_size(len(dataset), world, self.eval_batch_size), EvalSampler(dataset, world, rank, order)
        )

    def _white(self) -> int:
        """Return the grey value of 16 bits that is white, and say so where there are such files."""
        if self.root in BUILT_IN:
            return FULL
        depth = sampled_depth(self.folder.root, [picture.file for picture in self.folder.splits["train"]])
        if (text := depth_text(depth, self.scale)) and (self.trainer is None or self.trainer.is_global_zero):
            say(text)
        return depth.white if self.scale == "auto" else FULL

    def _overfit_loader(self, dataset: PictureDataset) -> DataLoader[dict[str, Any]]:
        """Return batches of which the first ones, which `overfit_batches` trains and validates with, hold all classes."""
        return self._loader(dataset, self.batch_size, EvalSampler(dataset, *self.ranks(), self._fair_order(dataset)))

    def _fair_order(self, dataset: Any) -> list[int]:
        pictures = getattr(dataset.pictures, "pictures", dataset.pictures)  # of a target, whose dataset is one of a dataset
        return stratified_order([picture.label for picture in pictures], seed_of(self.split_seed, "subset"))

    @property
    def _overfits(self) -> bool:
        trainer: Any = self.trainer
        return bool(trainer and trainer.state.fn == "fit" and trainer.overfit_batches)

    def _resized(self, spec: InputSpec) -> InputSpec:
        return spec if self.image_size is None else replace(spec, size=self.image_size)

    def _loader(
        self,
        dataset: PictureDataset,
        batch_size: int,
        sampler: DistributedSampler[Any] | None = None,
        drop_last: bool = False,
    ) -> DataLoader[dict[str, Any]]:
        workers, trainer = self.workers, cast(Any, self.trainer)
        if workers is None:
            nearby = trainer.num_devices if trainer else 1
            workers = 0 if len(dataset) < _FEW else max(1, worker_count() // nearby)
        pin = torch.cuda.is_available()
        reloads = bool(trainer and trainer.reload_dataloaders_every_n_epochs)
        return DataLoader(
            dataset,
            batch_size=batch_size,  # by name, so that Lightning can make the loader anew for Trainer.predict
            sampler=sampler,
            drop_last=drop_last,
            num_workers=workers,
            persistent_workers=workers > 0 and not (pin and reloads),  # https://github.com/pytorch/pytorch/issues/91252
            pin_memory=pin,
        )


def _is_limited(trainer: Any) -> bool:
    """Say whether a trainer evaluates a part of the batches: a number of them (an int), or a share below 1.0."""
    limit = 1.0 if not trainer else trainer.limit_test_batches if trainer.testing else trainer.limit_val_batches
    return isinstance(limit, int) or limit < 1


def plain_root(root: str | os.PathLike[str]) -> str:
    """Return the folder as a string; a path object always means a folder, also if built-in data have that name."""
    text = os.fspath(root)
    return os.path.join(os.curdir, text) if text in BUILT_IN and not isinstance(root, str) else text
