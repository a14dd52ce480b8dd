"""The training loss of a classifier: cross-entropy, focal loss, and weights for classes that are uneven."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.errors import ConfigError
from finetune.labels import classes_of, labels_of

ClassWeights = Literal["none", "balanced", "effective"]
_EFFECTIVE_BETA = 0.999  # Cui et al. 2019 try 0.9 to 0.9999; this one suits classes of tens to thousands of pictures
_SURE = 1e-7  # the least 1 - p of the focal loss: below, the gradient of a small exponent is not finite


def class_weights(kind: ClassWeights, counts: Sequence[int]) -> Tensor | None:
    """Return a weight per class, (K,), whose mean over the training pictures is 1; None for no weights.

    Args:
        kind: `balanced`: every class weighs the same in total, N / (K n). `effective`: by the effective number of pictures,
            (1 - b) / (1 - b^n) with b = 0.999 (Cui et al. 2019), which is milder where classes are large.
        counts: Number of training pictures n of each class; a class without any gets 0.
    """
    if kind == "none":
        return None
    number = torch.tensor(counts, dtype=torch.float64)
    if kind == "balanced":
        weights = number.clamp(min=1).reciprocal()
    else:
        weights = (1 - _EFFECTIVE_BETA) / (1 - _EFFECTIVE_BETA ** number.clamp(min=1))
    weights = torch.where(number > 0, weights, 0.0)
    return (weights * number.sum() / (weights * number).sum()).float()


def classification_loss(
    logits: Tensor, targets: Tensor, *, weight: Tensor | None = None, smoothing: float = 0.0, focal_gamma: float = 0.0
) -> Tensor:
    """Return the mean loss of a batch.

    With `focal_gamma` g it is the focal loss (Lin et al. 2017), which turns away from what is right already: the sum over the
    classes of y (1 - p)^g (-log p). Weighted losses are divided by the number of pictures and not by the sum of their weights,
    so that a batch of rare classes counts for more.

    Args:
        logits: (N, K).
        targets: Class indices (N,), or a distribution per picture (N, K), as mixup makes them.
        weight: A weight per class, (K,).
        smoothing: Label smoothing (Szegedy et al. 2016).
        focal_gamma: 0 for cross-entropy.
    """
    if logits.dtype.itemsize < 4:  # half precision is too coarse for sums of logarithms; mixed precision computes so, too
        logits = logits.float()
    weight = None if weight is None else weight.to(logits.dtype)
    targets = targets.to(logits.dtype) if targets.is_floating_point() else targets
    if not focal_gamma:
        each = F.cross_entropy(logits, targets, weight, reduction="none", label_smoothing=smoothing)
        return each.mean()
    classes = logits.shape[1]
    soft = targets if targets.ndim == 2 else F.one_hot(targets, classes).to(logits.dtype)
    soft = soft * (1 - smoothing) + smoothing / classes
    log_p = F.log_softmax(logits, dim=1)
    each_class = -soft * (1 - log_p.exp()).clamp_min(_SURE).pow(focal_gamma) * log_p
    return (each_class if weight is None else each_class * weight).sum(1).mean()


def training_counts(data: object, num_classes: int) -> list[int]:
    """Return the number of training pictures of each class.

    Args:
        data: A data module with a method `labels(split)`.
        num_classes: Number of classes.

    Raises:
        ConfigError: If the data module does not tell its labels.
        DataError: If they are no labels of these classes.
    """
    labels = getattr(data, "labels", None)
    if not callable(labels):
        raise ConfigError(
            f"model.class_weights needs the labels of the training pictures, but {type(data).__name__} has no method "
            "labels('train') that returns them. Add one, or set model.class_weights none."
        )
    found = labels("train")
    checked = labels_of(found, len(found), num_classes, what=f"The labels that {type(data).__name__}.labels('train') returns")
    return torch.bincount(classes_of(checked), minlength=num_classes).tolist()
