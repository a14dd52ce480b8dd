"""What training minimises: a loss of mixed or plain pictures, weighted by class, and a pull towards the pretrained weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finetune.errors import ConfigError
from finetune.losses import class_weights, classification_loss, training_counts
from finetune.mixing import Mixing
from finetune.reuse import Kept

if TYPE_CHECKING:
    from finetune.staged import StagedModule

_START = "l2_sp_start"  # in the checkpoint, so that a resumed run is drawn to the same weights


class Objective:
    """The training objective of a `FinetuneModule`, from its options.

    Args:
        options: num_classes, label_smoothing, class_weights, focal_gamma, mixup, cutmix, mix_share and l2_sp.

    Attributes:
        weight: A weight per class, (K,), or None.
        start: The weights that L2-SP draws to, by name, once training has begun; None without it.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options
        self.mixing = Mixing(options["mixup"], options["cutmix"], options["num_classes"], options["mix_share"])
        self.weight: Tensor | None = None
        self.start: dict[str, Tensor] | None = None

    def weigh_classes(self, data: object) -> None:
        """Take the class weights from the training pictures of a data module, if they are asked for.

        Raises:
            ConfigError: If the data module shows all classes equally often already.
        """
        if self.options["class_weights"] != "none":
            if getattr(data, "sampling", "natural") == "balanced":
                raise ConfigError(
                    f"model.class_weights {self.options['class_weights']} and data.sampling balanced would correct for uneven "
                    "classes twice: rare ones would count for more than others. Leave one of them out."
                )
            counts = training_counts(data, self.options["num_classes"])
            self.weight = class_weights(self.options["class_weights"], counts)

    def mix(self, images: Tensor | Kept, labels: Tensor, epoch: int, epochs: int) -> tuple[Tensor | Kept, Tensor]:
        """Return pictures and targets of a training step: mixed in the epochs that are, otherwise as they are.

        Raises:
            ConfigError: If there are no pictures but only what was kept of them.
        """
        if not self.mixing.applies(epoch, epochs):
            return images, labels
        if isinstance(images, Kept):
            raise ConfigError("model.mixup and model.cutmix mix pictures, and data.reuse has none: set data.reuse off.")
        return self.mixing(images, labels)

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of a training batch, see `classification_loss`."""
        if self.weight is not None:
            self.weight = self.weight.to(logits.device)
        return classification_loss(
            logits,
            targets,
            weight=self.weight,
            smoothing=self.options["label_smoothing"],
            focal_gamma=self.options["focal_gamma"],
        )

    # ---------------------------------------------------------------------------------------------------------- L2-SP

    def hold_to_start(self, module: StagedModule, untrained: Collection[str]) -> None:
        """Remember the pretrained weights, unless a resumed checkpoint brought those that the run began with.

        Args:
            module: The module, on its device.
            untrained: Stages that no weights filled: there is nothing to draw them to.
        """
        if not self.options["l2_sp"]:
            return
        if self.start is None:
            loaded = {f"backbone.{name}" for stage in module.stages if stage.name not in untrained for name in stage.parameters}
            self.start = {name: p.detach().clone() for name, p in module.named_parameters() if name in loaded}
        self.start = {name: tensor.to(module.device) for name, tensor in self.start.items()}

    def pull(self, module: StagedModule) -> Tensor | float:
        """Return the L2-SP term (Li et al. 2018): its strength times half the squared distance of the weights from their start.

        What is frozen has not moved and is left out.
        """
        if self.start is None:
            return 0.0
        parts = [
            (parameter - self.start[name]).square().sum()
            for name, parameter in module.named_parameters()
            if name in self.start and parameter.requires_grad
        ]
        return 0.5 * float(self.options["l2_sp"]) * torch.stack(parts).sum() if parts else 0.0

    def save(self, checkpoint: MutableMapping[str, Any]) -> None:
        """Put what a resumed run needs into a checkpoint."""
        if self.start is not None:
            checkpoint[_START] = self.start

    def load(self, checkpoint: Mapping[str, Any]) -> None:
        """Take it over from a checkpoint."""
        self.start = checkpoint.get(_START)
