"""Distillation: a student backbone learns to reproduce what a teacher says of pictures that need no labels.

Each picture is cut out in a fixed number of views. Teacher and student see the same views, so what the teacher makes of them
is computed once and kept. The student's features, through a linear map, are drawn to the teacher's standardised features; its
head, if wanted, to the teacher's softened class probabilities (Hinton et al. 2015).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.nn import functional as F

from finetune import checkpoints
from finetune.card import write_weights
from finetune.distill_data import DistillDataModule, features_in
from finetune.errors import ConfigError
from finetune.loading import seeded
from finetune.module import FinetuneModule
from finetune.randomness import global_seed, seed_of
from finetune.store import format_bytes
from finetune.version import __version__


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

    why_no_average = "A student gets its projector only when the teacher is known, too late for an average of the weights."

    @property
    def classifies(self) -> bool:
        """Whether the head learns, too."""
        return bool(self.hparams["logits_weight"] > 0)

    def setup(self, stage: str) -> None:
        """Take the teacher's width, scale and classifier from the data."""
        super().setup(stage)
        if stage == "predict":  # without a teacher
            return
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

    def _step(self, batch: Any, split: str) -> dict[str, Tensor]:
        target = batch["target"]
        loss = self.distance(features_in(self, batch["image"], target.shape[-1]), target)
        self._log_loss(split, loss, len(batch["index"]), prog_bar=True)
        return {"loss": loss}

    def _log_metrics(self, split: str) -> None:
        """Nothing is classified."""

    @rank_zero_only
    def on_fit_end(self) -> None:
        """Write the student of the best checkpoint as weights for others, with a card, into the run's folder."""
        kept: Any = self.trainer.checkpoint_callbacks
        chosen = next((callback for callback in kept if getattr(callback, "best_model_path", None)), None)
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
                "model": _without_folders(self.hparams),
                "data": _without_folders({k: v for k, v in data.hparams.items() if k != "pictures"}),
                "epochs": int(checkpoint["epoch"]) + 1,
                "steps": int(checkpoint["global_step"]),
            },
            "metrics": {} if score is None else {str(chosen.monitor): round(float(score), 5)},
            "version": __version__,
        }


def _without_folders(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as plain values; of a file its name alone, as folders of this machine concern nobody else."""
    plain: dict[str, Any] = checkpoints.plain(dict(options))
    return {name: Path(value).name if isinstance(value, str) else value for name, value in plain.items()}
