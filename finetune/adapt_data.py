"""The data of domain adaptation: a labelled source and an unlabelled target, side by side in every training batch.

A training batch is that of the source (`image`, `label`, `index`) with that of the target under `target` (`image`, `index`, and
`known`, which is -1 but for the few pictures whose labels are to be learned). The length of an epoch is fixed: the domain that
runs out begins anew, in another order. Which pictures meet is a function of (seed, epoch).
"""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch.utils.data import DataLoader

from finetune.console import say
from finetune.data import FolderDataModule, plain_root
from finetune.decoded import Decoded
from finetune.errors import ConfigError, DataError
from finetune.folders import SPLITS, Picture, Split
from finetune.left_out import require_readable, tell_left_out, unreadable
from finetune.loading import PictureDataset, Sampling
from finetune.pairs import TARGET, PairDataset, PairSampler, TargetDataset
from finetune.randomness import global_seed, seed_of
from finetune.sample import BUILT_IN
from finetune.target import UNKNOWN, TargetFolder, scan_target
from finetune.transforms import Augmentation, eval_transform, train_transform

_DIGITS = 32  # pixels of the built-in digits


class AdaptDataModule(FolderDataModule):
    """A source folder with labels and target folders without.

    Where the target has labels, they tell how well it is recognised (`oracle/target_acc`), and nothing else. A target with the
    splits train, val and test is adapted to on train, watched on val, and measured on test at the end; one without splits is
    adapted to and watched on all of its pictures.

    Example:
        >>> data = AdaptDataModule("digits", "digits_m", batch_size=8, workers=0)
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch["image"].shape == batch["target"]["image"].shape, batch["target"]["known"].tolist()
        (True, [-1, -1, -1, -1, -1, -1, -1, -1])

    Args:
        root: The source: a folder, arranged as <class>/<picture> or {train,val,test}/<class>/<picture>, or built-in data.
        target: The target: a folder or several, arranged like the source, or with pictures only; or `digits_m`, which is
            built in.
        target_labels: Whether folders in the target are classes; if false, it is searched to the bottom.
        target_shots: Train with the labels of so many target pictures of each class.
        steps_per_epoch: Training batches per epoch; if null, as many as show the larger domain once.
        batch_size: Pictures of each domain per training step and device.
        augment: How much training pictures vary: none, light, medium or strong, as in `FolderDataModule`.
        image_size: Height and width in pixels. By default what the weights expect, and 32 for the built-in digits.
        hflip: Whether mirror images are the same class. By default yes, and no for the built-in digits.
        val_fraction: Share of each class of the source to validate with, if it has no validation split.
        test_fraction: Share of each class of the source to test with, if it has no test split.
        split_seed: Another seed draws other pictures for these shares.
        shots: Train on so many images of each class of the source only; all if null.
        fraction: Train on this share of the images of each class of the source only.
        folds: Cross-validation on the source, as in `FolderDataModule`.
        fold: Train with this fold only, from 1.
        sampling: How often images of the source are seen: natural or balanced (each class equally often).
        workers: Processes that read pictures. By default one per core up to 8, and none for fewer than 64 pictures.
        eval_batch_size: Pictures per step and device in validation and test. By default twice the batch size.
        decoded: Keep the images of both domains decoded, with so many pixels on the shorter side.
        on_error: What happens where images of either domain cannot be read: raise or skip, as in `FolderDataModule`.
        max_errors: Share of the images of a domain that skip may leave out.
        scale: How grey values of 16 bits become 8: full, or auto, as in `FolderDataModule`.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] = "digits",
        target: str | list[str] = "digits_m",
        target_labels: bool = True,
        target_shots: int = 0,
        steps_per_epoch: int | None = None,
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
        on_error: Literal["raise", "skip"] = "raise",
        max_errors: float = 0.05,
        scale: Literal["full", "auto"] = "full",
    ) -> None:
        root = plain_root(root)
        target = os.fspath(target) if isinstance(target, str | os.PathLike) else [os.fspath(each) for each in target]
        super().__init__(
            root,
            batch_size=batch_size,
            augment=augment,
            image_size=_DIGITS if image_size is None and root in BUILT_IN else image_size,
            hflip=hflip,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            split_seed=split_seed,
            shots=shots,
            fraction=fraction,
            folds=folds,
            fold=fold,
            sampling=sampling,
            workers=workers,
            eval_batch_size=eval_batch_size,
            decoded=decoded,
            on_error=on_error,
            max_errors=max_errors,
            scale=scale,
        )
        self.targets = [target] if isinstance(target, str) else target
        self.target_labels, self.target_shots, self.steps_per_epoch = target_labels, target_shots, steps_per_epoch
        if target_shots < 0 or (steps_per_epoch or 1) < 1:
            raise ConfigError(
                "Expected data.target_shots to be 0 or more and data.steps_per_epoch at least 1, found "
                f"{target_shots} and {steps_per_epoch}."
            )
        if set(self.targets) & set(BUILT_IN) and self.root not in BUILT_IN:
            raise ConfigError(
                f"The source is {self.root}, but the target is still the built-in {', '.join(self.targets)}: name the folder "
                "of yours with --data.target FOLDER."
            )

    # -------------------------------------------------------------------------------------------------- what there is

    @cached_property
    def target(self) -> TargetFolder:
        """The pictures of the target; its folders are searched on first use."""
        found = scan_target(self.targets, self.folder.classes, self.folder.root, self.target_labels)
        return found.without(self._unreadable_targets(found)) if self.on_error == "skip" else found

    def _unreadable_targets(self, found: TargetFolder) -> dict[str, str]:
        """Return the images of the target that cannot be read, with what is wrong with them."""
        files = [picture.file for split in SPLITS for picture in found.splits[split]]
        return unreadable(found.root, files, self.max_errors, self.workers) if files else {}

    @cached_property
    def labelled_target(self) -> list[int]:
        """The labelled training pictures of the target: positions in their list."""
        return self.target.shots(self.target_shots)

    @property
    def watched(self) -> Split:
        """The split of the target that validation looks at: val, or train where there is no val."""
        return "val" if self.target.splits["val"] else "train"

    @property
    def has_test(self) -> bool:
        """Whether there are pictures to test on, of the source or of the target."""
        return super().has_test or bool(self.target.splits["test"])

    def files(self, split: Any) -> list[Path]:
        """Return the pictures of a split of the source; those of the target that validation looks at if it is `target`."""
        if split != TARGET:
            return super().files(split)
        return [self.target.root / picture.file for picture in self.target.splits[self.watched]]

    @property
    def _overfits(self) -> bool:
        """Never: validation is of images of its own, also with `overfit_batches`."""
        return False

    @property
    def steps(self) -> int:
        """Training batches of an epoch, in each of several processes."""
        if self.steps_per_epoch is not None:
            return self.steps_per_epoch
        larger = max(len(self.folder.splits["train"]), len(self.target.splits["train"]))
        return max(1, larger // (self.batch_size * self.ranks()[0]))

    @property
    def order_key(self) -> int:
        """A number that is equal where the order of an epoch is."""
        files = (picture.file for picture in self.target.splits["train"])
        return seed_of(super().order_key, self.target_shots, self.steps, *files)

    @property
    def images_of_epoch(self) -> int | None:
        """None, as pictures of the smaller domain come several times."""
        return None

    # ---------------------------------------------------------------------------------------------- hooks of Lightning

    def setup(self, stage: str) -> None:
        """Also look at the target before training, and print what was found there.

        Raises:
            DataError: If there are pictures that cannot be read.
        """
        super().setup(stage)
        if stage == "fit" and self.trainer and self.on_error == "raise" and not set(self.targets) <= set(BUILT_IN):
            files = [picture.file for split in SPLITS for picture in self.target.splits[split]]
            require_readable(self.target.root, files, self.workers, self.unreadable_remedy)
        if stage == "fit" and (self.trainer is None or self.trainer.is_global_zero):
            tell_left_out(self.target)
            number = len(self.labelled_target)
            drawn = f"\n{number} of the training pictures are trained with their labels" if number else ""
            say(self.target.summary() + drawn)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return shuffled, augmented training batches of both domains."""
        self.write_split()
        seed = global_seed()
        transform = train_transform(self.input_spec, self.augment, self.hflip)
        source, target = self.folder.splits["train"], self.target.splits["train"]
        labels, white = set(self.labelled_target), self.input_spec.white
        hidden = [Picture(p.file, p.label if place in labels else UNKNOWN) for place, p in enumerate(target)]
        pairs = PairDataset(
            PictureDataset(self.folder.root, source, transform, seed, self._decoded("train"), self._advice, white=white),
            PictureDataset(
                self.target.root,
                hidden,
                transform,
                seed_of(seed, TARGET),
                self._decoded_target("train"),
                self._advice,
                white=white,
            ),
        )
        position = self.position if self.trainer else None
        balanced = torch.tensor(self.labels("train")) if self.sampling == "balanced" else None
        sampler = PairSampler(
            pairs, self.batch_size, self.steps, self.labelled_target, seed, position, *self.ranks(), labels=balanced
        )
        return self._loader(cast(Any, pairs), self.batch_size, sampler, drop_last=True)

    def val_dataloader(self) -> list[Any]:
        """Return the validation batches of the source, if it has some, and the batches of the target that are watched."""
        source = [self.eval_loader("val")] if self.folder.splits["val"] else []
        return [*source, self.target_loader(self.watched)]

    def test_dataloader(self) -> list[Any]:  # type: ignore[override]
        """Return the test batches of both domains, as far as there are any.

        Raises:
            DataError: If neither has a test split.
        """
        if not self.has_test:
            raise DataError(f"Neither {self.folder.root} nor {self.target.root} has a test split: expected a folder 'test'.")
        source = [super().test_dataloader()] if super().has_test else []
        return [*source, *([self.target_loader("test")] if self.target.splits["test"] else [])]

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return the images of the target: its test split, or else those that validation looks at."""
        self._follow_module()
        split: Split = "test" if self.target.splits["test"] else self.watched
        pictures = PictureDataset(self.target.root, self.target.splits[split], eval_transform(self.input_spec))
        return self._in_order(pictures, f"{split} split of {self.target.root}")

    def target_loader(self, split: Split) -> DataLoader[dict[str, Any]]:
        """Return the pictures of a split of the target once each, in order, under the key `target` of each batch."""
        decoded, transform, white = self._decoded_target(split), eval_transform(self.input_spec), self.input_spec.white
        images = self.target.splits[split]
        pictures = PictureDataset(self.target.root, images, transform, None, decoded, self._advice, white=white)
        return self._in_order(cast(Any, TargetDataset(pictures)), f"{split} split of {self.target.root}")

    def _decoded_target(self, split: Split) -> Decoded | None:
        return self._decode([self.target.root / picture.file for picture in self.target.splits[split]])

    def describe_target(self) -> dict[str, Any]:
        """Return where the target is and how many pictures it has, for the record of a run."""
        counts = {split: len(self.target.splits[split]) for split in SPLITS}
        return {"root": str(self.target.root.absolute()), "counts": counts, "shots": len(self.labelled_target)}
