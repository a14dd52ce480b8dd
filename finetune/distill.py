"""Distillation: a student backbone learns to reproduce what a teacher says of pictures that need no labels.

Each picture is cut out in a fixed number of views. Teacher and student see the same views, so what the teacher makes of them
is computed once and kept. The student's features, through a linear map, are drawn to the teacher's standardised features; its
head, if wanted, to the teacher's softened class probabilities (Hinton et al. 2015).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from finetune import checkpoints
from finetune.card import write_weights
from finetune.errors import ConfigError
from finetune.folders import Picture, find_pictures
from finetune.hardware import best_device, worker_count
from finetune.hub import pretrained_cfg
from finetune.loading import PictureDataset, TrainSampler, seeded
from finetune.module import FinetuneModule
from finetune.positioned import PositionedDataModule
from finetune.predict import load_model
from finetune.randomness import global_seed, seed_of
from finetune.reuse import keep, pictures_key, weights_hash
from finetune.runs import find_checkpoint
from finetune.sample import BUILT_IN
from finetune.store import Rows, Store, format_bytes
from finetune.transforms import Augmentation, InputSpec, change_look, eval_transform, random_crop
from finetune.version import __version__
from finetune.weight_files import sha256_of


class DistillDataModule(PositionedDataModule):
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
        found = [Picture(str(path), 0) for path in find_pictures(self.places)]
        order = sorted(found, key=lambda picture: seed_of("distill", picture.file))
        held_out = max(1, round(self.val_fraction * len(order)))
        if held_out == len(order):
            raise ConfigError(f"Expected at least two pictures to distill on, found {len(order)}.")
        val = set(order[:held_out])
        return {"train": [p for p in found if p not in val], "val": sorted(val)}

    @property
    def order_key(self) -> int:
        """A number that is equal where the order of an epoch is."""
        return seed_of(global_seed(), self.batch_size, *(picture.file for picture in self.files["train"]))

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
            **pictures_key(pictures, view),
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
        rows = torch.from_numpy(self.targets("train", 0).astype("float32"))
        return rows.mean((0, 2, 3)), rows.std((0, 2, 3)).clamp_min(1e-4)

    # ---------------------------------------------------------------------------------------------- hooks of Lightning

    def prepare_data(self) -> None:
        """Let the teacher look at everything before training starts."""
        for view in range(self.views):
            self.targets("train", view)
        self.targets("val", 0)

    def setup(self, stage: str) -> None:
        """Ask the student for its input."""
        self._restored = None
        spec = getattr(self.trainer.lightning_module, "input_spec", None) if self.trainer else None
        self.input_spec = _resized(spec or InputSpec.default(), self.image_size)
        if self.trainer is None or self.trainer.is_global_zero:
            print(
                f"teacher {self.teacher_name}, {len(self.files['train'])} pictures in {self.views} views to learn from, "
                f"{len(self.files['val'])} held out"
            )

    def train_dataloader(self) -> DataLoader[Any]:
        """Return shuffled batches of the epoch's view."""
        views = [self.targets("train", view) for view in range(self.views)]
        pictures = _WithTargets(self._dataset("train", self.input_spec, varied=True), views)
        position = self.position if self.trainer else None
        sampler = TrainSampler(pictures, self.batch_size, global_seed(), position, *self.ranks())
        return self._loader(pictures, sampler=sampler, drop_last=len(sampler) > self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return the batches of the pictures that were held out."""
        return self._loader(_WithTargets(self._dataset("val", self.input_spec, varied=False), [self.targets("val", 0)]))

    def _loader(self, pictures: Dataset[Any], **options: Any) -> DataLoader[Any]:
        pin = torch.cuda.is_available()
        workers = self.workers
        return DataLoader(
            pictures, self.batch_size, num_workers=workers, persistent_workers=workers > 0, pin_memory=pin, **options
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


class DistillModule(FinetuneModule):
    """A student that learns from a teacher; its checkpoints and its exported file are weights like any other.

    Args:
        features_weight: Weight of the distance between the student's and the teacher's standardised features.
        mse: Share of the mean squared error in that distance, beside 1 - cosine.
        logits_weight: Weight of the divergence between the student's and the teacher's class probabilities; 0 leaves the
            student without a head.
        temperature: What both sides' logits are divided by before their probabilities are compared.
        export_dtype: Kind of number in the exported file; float16 halves it.
        **options: Options of `FinetuneModule`.

    Raises:
        ConfigError: If there is nothing to learn.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(
        self,
        features_weight: float = 1.0,
        mse: float = 0.1,
        logits_weight: float = 0.0,
        temperature: float = 2.0,
        export_dtype: Literal["float32", "float16"] = "float32",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if features_weight <= 0 and logits_weight <= 0:
            raise ConfigError("Expected model.features_weight or model.logits_weight to be above 0: there is nothing to learn.")
        self.projector: nn.Linear | None = None
        if logits_weight <= 0:
            self.head.requires_grad_(False)
            self._never_trained |= {f"head.{name}" for name, _ in self.head.named_parameters()}

    @property
    def classifies(self) -> bool:
        """Whether the head learns, too."""
        return bool(self.hparams["logits_weight"] > 0)

    def setup(self, stage: str) -> None:
        """Take the teacher's width, scale and classifier from the data."""
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, DistillDataModule):
            raise ConfigError(f"Expected a DistillDataModule, found {type(data).__name__}: the student needs a teacher.")
        mean, std = data.scale
        self._project_to(len(mean))
        for name, value in {"feature_mean": mean, "feature_std": std}.items():
            self.register_buffer(name, value.to(self.device), persistent=False)
        self._classify = [data.teacher.head]  # in a list, so that it is no part of this module

    def _project_to(self, width: int) -> None:
        if self.hparams["features_weight"] > 0 and self.projector is None:
            with seeded(seed_of(global_seed(), "projector")):  # whether the teacher had to work before, or not
                self.projector = nn.Linear(cast(nn.Linear, self.head).in_features, width)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make room for the projector of a checkpoint that is loaded without its data."""
        weight = checkpoint["state_dict"].get("projector.weight")
        if weight is not None:
            self._project_to(len(weight))
        super().on_load_checkpoint(checkpoint)

    def distance(self, features: Tensor, target: Tensor) -> Tensor:
        """Return the loss.

        Args:
            features: The student's, (N, C, grid, grid).
            target: The teacher's, (N, C', grid, grid).
        """
        loss = features.new_zeros(())
        options = self.hparams
        if self.projector is not None:
            wanted = (target.movedim(1, -1) - self.feature_mean) / self.feature_std
            found = self.projector(features.movedim(1, -1))
            cosine = 1 - F.cosine_similarity(found, wanted, dim=-1).mean()
            loss = loss + options["features_weight"] * (cosine + options["mse"] * F.mse_loss(found, wanted))
        if options["logits_weight"] > 0:
            heat = options["temperature"]
            wanted = F.log_softmax(self._classify[0].to(target.device)(target.mean((2, 3))) / heat, 1)
            found = F.log_softmax(self.head(features.mean((2, 3))) / heat, 1)
            divergence = F.kl_div(found, wanted, reduction="batchmean", log_target=True)
            loss = loss + options["logits_weight"] * heat**2 * divergence
        return loss

    def _step(self, batch: Any, split: str) -> Tensor:
        target = batch["target"]
        loss = self.distance(features_in(self, batch["image"], target.shape[-1]), target)
        self.log(
            f"{split}/loss", loss, on_step=False, on_epoch=True, batch_size=len(batch["index"]), prog_bar=True, sync_dist=True
        )
        return loss

    def _log_metrics(self, split: str) -> None:
        """Nothing is classified."""

    @rank_zero_only
    def on_fit_end(self) -> None:
        """Write the student of the best checkpoint as weights for others, with a card, into the run's folder."""
        kept: Any = self.trainer.checkpoint_callbacks
        chosen = next((callback for callback in kept if callback.best_model_path), None)
        if chosen is None:
            return
        best = chosen.best_model_path
        checkpoint = checkpoints.read_own(best)
        state = checkpoint["state_dict"]
        tensors = {name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone.")}
        if self.classifies:
            tensors |= {f"{self.classifier_name}.{part}": state[f"head.{part}"] for part in ("weight", "bias")}
        path = Path(best).parent.parent / "student.safetensors"
        card = write_weights(path, tensors, self._card(checkpoint, chosen), getattr(torch, self.hparams["export_dtype"]))
        self.print(f"student {path} ({format_bytes(card['bytes'])}, sha256 {card['sha256'][:12]}), its card beside it")

    def _card(self, checkpoint: Mapping[str, Any], chosen: Any) -> dict[str, Any]:
        """Describe the student of a checkpoint that a callback chose."""
        data = cast(DistillDataModule, getattr(self.trainer, "datamodule", None))
        score = chosen.best_model_score
        return {
            "architecture": self.hparams["backbone"],
            "input": checkpoints.plain(asdict(self.input_spec)),
            "class_names": self.class_names if self.classifies else None,
            "teacher": data.teacher_origin(),
            "pictures": {"places": [Path(p).name for p in data.places], **{k: len(v) for k, v in data.files.items()}},
            "settings": {
                "model": checkpoints.plain(dict(self.hparams)),
                "data": checkpoints.plain({k: v for k, v in data.hparams.items() if k != "pictures"}),
                "epochs": int(checkpoint["epoch"]) + 1,
                "steps": int(checkpoint["global_step"]),
            },
            "metrics": {} if score is None else {str(chosen.monitor): round(float(score), 5)},
            "version": __version__,
        }
