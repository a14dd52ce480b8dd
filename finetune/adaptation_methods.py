"""Methods of unsupervised domain adaptation: what each adds to the classification loss of the labelled source."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from finetune import adaptation_losses as losses
from finetune.adaptation import Adaptation, DomainBatch
from finetune.backbones import import_path
from finetune.errors import ConfigError, did_you_mean


class SourceOnly(Adaptation):
    """Nothing is added, and the network never sees the target: the floor that a method must beat."""

    uses_target = False

    def loss(self, batch: DomainBatch) -> Tensor:
        """Return 0."""
        return batch.source_logits.new_zeros(())


class AdaBN(SourceOnly):
    """As `SourceOnly`, but with the BatchNorm statistics of the target (Li et al. 2017): the second floor."""

    restates_batchnorm = True


class MCC(Adaptation):
    """Minimum class confusion (Jin et al. 2020): no discriminator, and hard to get wrong.

    Args:
        weight: Weight of the loss.
        temperature: What logits are divided by.
    """

    def __init__(self, weight: float = 1.0, temperature: float = 2.5) -> None:
        super().__init__()
        self.weight, self.temperature = weight, temperature
        _require_positive(self, temperature=temperature)

    def loss(self, batch: DomainBatch) -> Tensor:
        """Return the confusion of classes on the target."""
        return self.weight * losses.mcc(batch.target_logits, self.temperature)


class DANN(Adaptation):
    """A discriminator tells the domains apart, and the features learn to fool it (Ganin et al. 2016).

    Args:
        strength: Strength of the reversed gradient at the end of the run.
        schedule: ramp: the strength rises from 0, as 2 / (1 + exp(-steepness p)) - 1 of the share p of the run; constant.
        steepness: How early it rises.
        hidden: Width of the discriminator's two hidden layers.
    """

    def __init__(
        self,
        strength: float = 1.0,
        schedule: Literal["ramp", "constant"] = "ramp",
        steepness: float = 10.0,
        hidden: int = 1024,
    ) -> None:
        super().__init__()
        self.strength, self.schedule, self.steepness, self.hidden = strength, schedule, steepness, hidden
        _require_positive(self, hidden=hidden, steepness=steepness)
        if schedule not in ("ramp", "constant"):
            raise ConfigError(f"Expected the schedule of {type(self).__name__} to be ramp or constant, found '{schedule}'.")

    def build(self, feature_dim: int, num_classes: int) -> None:
        """Make the discriminator."""
        self.discriminator = discriminator(feature_dim, self.hidden)

    def reversal(self, progress: float) -> float:
        """Return the strength of the reversed gradient at a share of the run."""
        rise = losses.reversal_strength(progress, self.steepness) if self.schedule == "ramp" else 1.0
        return self.strength * rise

    def loss(self, batch: DomainBatch) -> dict[str, Tensor]:
        """Return the loss of the discriminator, whose gradient is reversed where it enters the features."""
        return self.compete(batch.source_features, batch.target_features, batch.progress)

    def compete(self, source: Tensor, target: Tensor, progress: float, *weights: Tensor) -> dict[str, Tensor]:
        """Return the loss of a discriminator that sees both domains at once, its accuracy, and the strength of the reversal.

        Args:
            source: What it sees of the source, (N, D).
            target: What it sees of the target, (M, D).
            progress: Share of the run that is done.
            *weights: What each counts within its domain, (N,) and (M,).
        """
        strength = self.reversal(progress)
        both = losses.reverse_gradient(torch.cat([source, target]), strength)
        said = self.discriminator(both).squeeze(1)
        on_source, on_target = said[: len(source)], said[len(source) :]
        right = ((on_source > 0).float().mean() + (on_target < 0).float().mean()) / 2
        loss = losses.domain_loss(on_source, on_target, *weights)
        return {"loss": loss, "domain_acc": right, "grl": torch.tensor(strength)}


class CDAN(DANN):
    """DANN whose discriminator sees features together with class probabilities (Long et al. 2018).

    Args:
        strength: Strength of the reversed gradient at the end of the run.
        schedule: ramp or constant, see `DANN`.
        steepness: How early it rises.
        hidden: Width of the discriminator's two hidden layers.
        entropy: Let sure predictions count more (CDAN+E).
        widest: Features times classes above which both are drawn together by random projections of this width / 4.
    """

    features_map: Tensor
    classes_map: Tensor

    def __init__(
        self,
        strength: float = 1.0,
        schedule: Literal["ramp", "constant"] = "ramp",
        steepness: float = 10.0,
        hidden: int = 1024,
        entropy: bool = True,
        widest: int = 4096,
    ) -> None:
        super().__init__(strength, schedule, steepness, hidden)
        self.entropy, self.widest = entropy, widest
        _require_positive(self, widest=widest)

    def build(self, feature_dim: int, num_classes: int) -> None:
        """Make the discriminator, and fixed random projections where features and classes are many."""
        width = feature_dim * num_classes
        self.random = width > self.widest
        if self.random:
            width = max(1, self.widest // 4)
            self.register_buffer("features_map", torch.randn(feature_dim, width))
            self.register_buffer("classes_map", torch.randn(num_classes, width))
        self.discriminator = discriminator(width, self.hidden)

    def joined(self, features: Tensor, logits: Tensor) -> Tensor:
        """Return features and class probabilities as one vector each, (N, D); the probabilities carry no gradient."""
        shares = logits.detach().softmax(1)
        if self.random:
            return (features @ self.features_map) * (shares @ self.classes_map) / math.sqrt(self.features_map.shape[1])
        return losses.outer_product(features, shares)

    def loss(self, batch: DomainBatch) -> dict[str, Tensor]:
        """Return the loss of the discriminator, whose gradient is reversed where it enters the features."""
        logits = batch.source_logits, batch.target_logits
        source, target = map(self.joined, (batch.source_features, batch.target_features), logits)
        weights = [losses.certainty_weight(each) for each in logits] if self.entropy else []
        return self.compete(source, target, batch.progress, *weights)


class CORAL(Adaptation):
    """Draw the covariances of both domains' features together (Sun & Saenko 2016, Deep CORAL).

    Args:
        weight: Weight of the loss.
    """

    def __init__(self, weight: float = 10.0) -> None:
        super().__init__()
        self.weight = weight

    def loss(self, batch: DomainBatch) -> Tensor:
        """Return the distance of the covariances."""
        return self.weight * losses.coral(batch.source_features, batch.target_features)


class MMD(Adaptation):
    """Draw both domains' features together by their maximum mean discrepancy, several kernels wide (Long et al. 2015, DAN).

    Args:
        weight: Weight of the loss.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def loss(self, batch: DomainBatch) -> Tensor:
        """Return the squared discrepancy."""
        return self.weight * losses.mk_mmd(batch.source_features, batch.target_features)


class BNM(Adaptation):
    """Sure and diverse predictions on the target, by their nuclear norm (Cui et al. 2020).

    Args:
        weight: Weight of the loss.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def loss(self, batch: DomainBatch) -> Tensor:
        """Return minus the nuclear norm, over the number of pictures."""
        return self.weight * losses.bnm(batch.target_logits)


class InfoMax(Adaptation):
    """Sure and diverse predictions on the target, by entropies (Krause et al. 2010).

    Args:
        weight: Weight of the loss.
    """

    def __init__(self, weight: float = 0.3) -> None:
        super().__init__()
        self.weight = weight

    def loss(self, batch: DomainBatch) -> Tensor:
        """Return the mean entropy minus the entropy of the mean."""
        return self.weight * losses.infomax(batch.target_logits)


METHODS: dict[str, type[Adaptation]] = {
    kind.__name__: kind for kind in (SourceOnly, AdaBN, MCC, DANN, CDAN, CORAL, MMD, BNM, InfoMax)
}


def discriminator(width: int, hidden: int) -> nn.Sequential:
    """Return a network (N, width) -> (N, 1) with two hidden layers; above 0 says source."""
    layers: list[nn.Module] = []
    for inputs in (width, hidden):
        layers += [nn.Linear(inputs, hidden), nn.BatchNorm1d(hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, 1))


def create(given: Adaptation | Mapping[str, Any] | str) -> Adaptation:
    """Return a method.

    Args:
        given: One that is made already; the name of one, or the dotted path of a class; or what `describe` returned.

    Raises:
        ConfigError: If there is no such method, or it does not take these arguments.
    """
    if isinstance(given, Adaptation):
        return given
    path, arguments = (given, {}) if isinstance(given, str) else (given["class_path"], given.get("init_args") or {})
    kind: Any = METHODS.get(path)
    reason = ""
    try:
        kind = kind or (import_path(path) if "." in path else None)
    except ConfigError as error:
        reason = f" {error}"
    if not (isinstance(kind, type) and issubclass(kind, Adaptation)):
        raise ConfigError(
            f"There is no adaptation method '{path}'.{did_you_mean(path, METHODS)} Expected {', '.join(METHODS)}, or the "
            f"dotted path of a class derived from finetune.Adaptation that can be imported from here.{reason}"
        )
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ConfigError(f"The adaptation method {path} cannot be made with {arguments}: {error}") from error


def _require_positive(method: Adaptation, **values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ConfigError(f"Expected {name} of {type(method).__name__} to be above 0, found {value}.")
