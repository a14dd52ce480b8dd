"""AdaptModule: fine-tune on a labelled source and adapt to an unlabelled target at the same time.

    source → features → logits → classification loss ┐
                                                      ├ + → loss
    target → features → logits → adaptation loss     ┘

It is a `FinetuneModule` in all else: stages, freezing, rates, weights, checkpoints. The layers of a method learn at the head's
rate. What a run leaves is read by the plain `FinetuneModule`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from finetune import batch_statistics, checkpoints
from finetune.adaptation import Adaptation, DomainBatch, describe
from finetune.adaptation_methods import create
from finetune.errors import ConfigError, DataError
from finetune.labels import classes_of, joined
from finetune.module import FinetuneModule
from finetune.pairs import KNOWN, TARGET
from finetune.target import ORACLE, UNKNOWN
from finetune.validators import validators

_STATISTICS = "source_statistics"


class AdaptModule(FinetuneModule):
    """Fine-tune on a source and adapt to a target.

    Args:
        adaptation: The method: SourceOnly, AdaBN, MCC, DANN, CDAN, CORAL, MMD, BNM, InfoMax, or a class of yours derived from
            finetune.Adaptation. It has options of its own, such as --model.adaptation.temperature 2.
        joint_bn: Pass both domains through the network in one batch, so that BatchNorm normalises them together in training;
            otherwise each by itself.
        **options: Options of `FinetuneModule`.

    Raises:
        ConfigError: If options are unknown or contradict each other.
    """

    def __init__(self, adaptation: Adaptation | dict[str, Any] | str = "MCC", joint_bn: bool = True, **options: Any) -> None:
        method = create(adaptation)
        adaptation = describe(method)  # which is what save_hyperparameters finds
        super().__init__(**options)
        method.build(_width_of(self.head), self.hparams["num_classes"])
        self.adaptation: Adaptation = method
        self._watched: list[tuple[Tensor, Tensor, Tensor]] = []
        self._source_statistics: dict[str, Tensor] | None = None
        if self.hparams["mixup"] or self.hparams["cutmix"]:
            raise ConfigError("model.mixup and model.cutmix do not go with domain adaptation: leave them at 0.")
        if method.restates_batchnorm and not batch_statistics.batchnorm_layers(self):
            raise ConfigError(f"{type(method).__name__} needs BatchNorm, and {self.hparams['backbone']} has none.")

    # ------------------------------------------------------------------------------------------------------- training

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch of both domains."""
        images, targets = self.images_and_labels(_part(batch, "source"))
        labels = classes_of(targets)
        images = cast(Tensor, images)
        others, known = self._target(batch, images)
        features = self._features(images, others)
        logits = [self.head(self.dropout(each)) for each in features]
        labelled = known != UNKNOWN
        loss = self.loss(torch.cat([logits[0], logits[1][labelled]]), joined(targets, known[labelled]))
        self._metrics_of("train").update(logits[0].detach(), labels)
        self._log_mean("train/cls_loss", loss.detach(), len(labels))
        loss = loss + self.objective.pull(self)
        if self.adaptation.uses_target:
            loss = loss + self._adaptation_loss(features, logits, labels)
        self._log_loss("train", loss, len(labels))
        return loss

    def _log_mean(self, name: str, value: Tensor, batch_size: int) -> None:
        """Log the mean of a value over the epoch."""
        self.log(name, value, batch_size=batch_size, on_step=False, on_epoch=True, sync_dist=True)

    def _target(self, batch: Any, source: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pictures of the target that the network may see, and their labels where they are to be learned."""
        target = _part(batch, TARGET)
        images = target["image"] if isinstance(target, Mapping) else target[0] if isinstance(target, list | tuple) else target
        if images.shape[1:] != source.shape[1:]:
            raise DataError(
                f"Expected pictures of both domains to have the same channels, height and width, found {_shape(source)} in the "
                f"source and {_shape(images)} in the target. Bring them to one size and to RGB, as AdaptDataModule does."
            )
        known = target.get(KNOWN) if isinstance(target, Mapping) else None
        if known is None:
            known = torch.full((len(images),), UNKNOWN, device=images.device)
        if self.adaptation.uses_target:
            return images, known
        return images[known != UNKNOWN], known[known != UNKNOWN]

    def _features(self, source: Tensor, target: Tensor) -> list[Tensor]:
        """Return what the head sees of both domains."""
        if not len(target):
            features = self.features(source)
            return [features, features[:0]]
        if self.hparams["joint_bn"]:
            both = self.features(torch.cat([source, target]))
            return [both[: len(source)], both[len(source) :]]
        return [self.features(source), self.features(target)]

    def _adaptation_loss(self, features: list[Tensor], logits: list[Tensor], labels: Tensor) -> Tensor:
        """Return what the method adds, computed in float32 whatever the precision of the run; log it."""
        progress = self.timetable.share(self.place) if self.timetable else 1.0
        with torch.autocast(labels.device.type, enabled=False):
            wide = [each.float() if each.dtype.itemsize < 4 else each for each in (*features, *logits)]
            said = self.adaptation.loss(DomainBatch(wide[0], wide[1], wide[2], wide[3], labels, progress))
        values = said if isinstance(said, Mapping) else {"loss": said}
        for name, value in values.items():
            self._log_mean(f"train/{'adapt_loss' if name == 'loss' else name}", value.detach().to(labels.device), len(labels))
        if "loss" not in values:
            raise ConfigError(f"{type(self.adaptation).__name__}.loss returned {sorted(values)}: expected 'loss' among them.")
        return values["loss"]

    # ------------------------------------------------------------------------------------------------------- watching

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Add a batch of the source to the metrics, or one of the target to what its validators look at."""
        return self._watch(batch) if _is_target(batch) else super().validation_step(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Add a batch of the source to the metrics, or one of the target to the oracle."""
        if not _is_target(batch):
            return super().test_step(batch, batch_idx)
        self._watch(batch)
        return {}

    def _watch(self, batch: Any) -> dict[str, Any]:
        images, labels = self.unpack(batch[TARGET])
        labels = classes_of(labels)
        logits: Tensor = self(images)
        place = torch.arange(len(labels))
        index = batch[TARGET].get("index", place) if isinstance(batch[TARGET], Mapping) else place
        self._watched.append((index.cpu(), logits.detach().float().cpu(), labels.cpu()))
        if not bool((labels != UNKNOWN).all()):
            return {}
        unseen = self._unseen(index.cpu()).to(logits.device)
        return {"logits": logits[unseen], "labels": labels[unseen], "index": index.to(logits.device)[unseen], "split": TARGET}

    def _unseen(self, places: Tensor) -> Tensor:
        """Return which of the watched images, by their places, are not trained with their labels."""
        data: Any = getattr(self.trainer, "datamodule", None)
        shots = getattr(data, "labelled_target", []) if getattr(data, "watched", "") == "train" else []
        return ~torch.isin(places, torch.tensor(list(shots), dtype=places.dtype))

    def _all_watched(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return logits and labels of all pictures of the target, from all processes and in order, and their places."""
        parts, self._watched = self._watched, []
        if self.trainer.world_size > 1:
            gathered: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(gathered, parts)
            parts = [part for each in gathered for part in each]
        if not parts:
            return None
        index, logits, labels = (torch.cat(columns) for columns in zip(*parts, strict=True))
        order = index.argsort(stable=True)
        return logits[order], labels[order], index[order]

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the source, and validators and oracle of the target."""
        super().on_validation_epoch_end()
        watched = self._all_watched()
        if watched is not None and len(watched[0]) > 1:
            logits, labels, places = watched
            found = {f"{TARGET}/{name}": value for name, value in self.target_validators(logits).items()}
            unseen = self._unseen(places)
            self._log_of_target({**found, **_accuracy(logits[unseen], labels[unseen], ORACLE)})

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the source, and the oracle of the target."""
        super().on_test_epoch_end()
        watched = self._all_watched()
        if watched is not None:
            self._log_of_target(_accuracy(watched[0], watched[1], "oracle/target_test_acc"))

    def target_validators(self, logits: Tensor) -> dict[str, Tensor]:
        """Return what says without labels how well the model fits the target; a subclass may add numbers of its own.

        Each is logged as `target/NAME` after an epoch, drawn in the report, and can choose the best checkpoint
        (`--run.monitor target/NAME`). More has to be better, or `--run.mode min` be given.

        Args:
            logits: Of all images of the target that are watched, in order, (N, K), on the CPU.

        Returns:
            A scalar for each name.
        """
        return validators(logits)

    def _log_of_target(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.log(name, value.float().to(self.device), sync_dist=True)  # equal in all processes

    def _log_metrics(self, split: str) -> None:
        if any(metric.update_called for metric in self._metrics_of(split).values()):
            super()._log_metrics(split)

    # ------------------------------------------------------------------------------------------- BatchNorm of the target

    def on_validation_epoch_start(self) -> None:
        """Let BatchNorm have the statistics of the target, if that is the method; the source's come back for training."""
        if not self.adaptation.restates_batchnorm or self.trainer.state.fn != "fit":
            return
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "target_loader"):
            raise ConfigError("AdaBN needs a data module with target_loader(split), such as AdaptDataModule.")
        self._source_statistics = batch_statistics.statistics_of(self)
        batch_statistics.restate(self, self._target_pictures(data), self.features)

    def _target_pictures(self, data: Any) -> Iterator[Tensor]:
        for batch in data.target_loader("train"):
            images = batch[TARGET]["image"].to(self.device)
            if len(images) > 1:
                yield images

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Go on with the statistics of the source, also behind a validation within an epoch."""
        if self._source_statistics is not None:
            batch_statistics.put_statistics(self, self._source_statistics)
            self._source_statistics = None
        super().on_train_batch_start(batch, batch_idx)

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def on_train_start(self) -> None:
        """Also say so if the checkpoint is chosen by labels of the target."""
        super().on_train_start()
        chosen = [getattr(callback, "monitor", None) or "" for callback in self.trainer.checkpoint_callbacks]
        if any(monitor.startswith("oracle/") for monitor in chosen):
            self.print("warning: best.ckpt is chosen by labels of the target, which unsupervised adaptation does not have.")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say that the plain module can read it, unless a subclass may have changed how pictures become logits."""
        super().on_save_checkpoint(checkpoint)
        if type(self) is AdaptModule:
            checkpoint[checkpoints.KEY]["class_path"] = f"{FinetuneModule.__module__}.{FinetuneModule.__qualname__}"
        if self._source_statistics is not None:
            checkpoint[_STATISTICS] = self._source_statistics

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also take over the statistics that training goes on with."""
        super().on_load_checkpoint(checkpoint)
        self._source_statistics = checkpoint.get(_STATISTICS)


def _is_target(batch: Any) -> bool:
    return isinstance(batch, Mapping) and TARGET in batch and "image" not in batch and "source" not in batch


def _part(batch: Any, domain: str) -> Any:
    """Return what a batch holds of a domain: of ours, or of a CombinedLoader of `source` and `target`."""
    if not isinstance(batch, Mapping) or TARGET not in batch or not {"source", "image"} & set(batch):
        found = f"a mapping with {sorted(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
        raise DataError(
            f"Expected a batch of two domains, such as AdaptDataModule makes, or a mapping with 'source' and 'target'; found "
            f"{found}."
        )
    if domain == TARGET:
        return batch[TARGET]
    return batch["source"] if "source" in batch else {name: batch[name] for name in ("image", "label") if name in batch}


def _accuracy(logits: Tensor, labels: Tensor, name: str) -> dict[str, Tensor]:
    """Return the accuracy under a name; nothing if a label is not known."""
    if (labels == UNKNOWN).any():
        return {}
    return {name: (logits.argmax(1) == labels).float().mean()}


def _width_of(head: nn.Module) -> int:
    return cast(nn.Linear, head).in_features


def _shape(images: Tensor) -> str:
    return " x ".join(str(side) for side in images.shape[1:])
