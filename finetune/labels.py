"""Labels of a batch, whoever's loader it comes from: class indices, or a distribution over the classes for each image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.errors import DataError

_WHAT = "The labels of a batch"
_SUM = 0.01  # how far a distribution may be from adding up to 1: half precision rounds each share by up to 0.001


def labels_of(found: Any, images: int, num_classes: int, *, check_values: bool = True, what: str = _WHAT) -> Tensor:
    """Return labels as int64 class indices (N,), or as float32 distributions (N, num_classes).

    Class indices may be of any integer kind, floats that are whole numbers, or (N, 1). Distributions, such as one-hot labels,
    soft labels, or what MixUp makes in a collate function, may be of any kind; each row adds up to 1.

    Args:
        found: What the batch holds: a tensor, an array, or a list.
        images: How many images the batch has.
        num_classes: Number of classes.
        check_values: Whether values are looked at, which on an accelerator waits for it; if false, shapes and kinds alone are.
        what: What messages call them.

    Raises:
        DataError: If these are no labels of that many images and classes.
    """
    labels = _as_tensor(found, what)
    shape = tuple(labels.shape)
    if labels.ndim == 2 and shape[1] == 1:
        labels = labels.flatten()
    if labels.ndim not in (1, 2) or len(labels) != images or (labels.ndim == 2 and shape[1] != num_classes):
        raise DataError(
            f"{what} have the shape {shape}: expected ({images},), a class index for each of its {images} images, "
            f"or ({images}, {num_classes}), a distribution over the {num_classes} classes for each."
        )
    if labels.is_complex():
        raise DataError(f"{what} are {labels.dtype}: expected class indices from 0 to {num_classes - 1}.")
    if labels.ndim == 2:
        return _distributions(labels.float(), what) if check_values and images else labels.float()
    if check_values and images:
        _check_indices(labels, num_classes, what)
    return labels.long()


def classes_of(labels: Tensor) -> Tensor:
    """Return the class of each image, (N,): the most probable one of a distribution.

    >>> classes_of(torch.tensor([[0.3, 0.7], [1.0, 0.0]]))
    tensor([1, 0])
    """
    return labels.argmax(1) if labels.ndim == 2 else labels


def joined(first: Tensor, second: Tensor) -> Tensor:
    """Return the labels of two batches as one; where either holds distributions, class indices become such.

    >>> joined(torch.tensor([[0.3, 0.7]]), torch.tensor([0]))
    tensor([[0.3000, 0.7000],
            [1.0000, 0.0000]])
    """
    if first.ndim == second.ndim:
        return torch.cat([first, second])
    width = max(labels.shape[1] for labels in (first, second) if labels.ndim == 2)
    return torch.cat([F.one_hot(labels, width).float() if labels.ndim == 1 else labels for labels in (first, second)])


def _as_tensor(found: Any, what: str) -> Tensor:
    if isinstance(found, Tensor):
        return found
    first = found = found.tolist() if isinstance(found, np.ndarray) else found
    while isinstance(first, Sequence) and not isinstance(first, str | bytes) and len(first):
        first = first[0]
    if isinstance(first, str | bytes):
        raise DataError(
            f"{what} are strings, such as {first!r}: expected class indices. Let the dataset return their "
            "positions in the list of class names: classes.index(name)."
        )
    try:
        return torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{what} are {type(found).__name__}: expected a tensor of class indices ({error}).") from None


def _check_indices(labels: Tensor, num_classes: int, what: str) -> None:
    if labels.is_floating_point():
        odd = labels[(labels != labels.round()) | ~labels.isfinite()]
        if len(odd):
            raise DataError(
                f"{what} are {labels.dtype} and not whole numbers, such as {float(odd[0]):g}: expected class "
                f"indices from 0 to {num_classes - 1}, or a distribution over the {num_classes} classes for each image."
            )
    least, most = (int(value) for value in labels.long().aminmax())
    if least >= 0 and most < num_classes:
        return
    advice = "Check the labels of the dataset against the names of its classes."
    if least < 0:
        advice = "An image without a class cannot be left out by its label: leave it out of the dataset."
    elif least >= 1 and most == num_classes:
        advice = "They seem to count from 1: subtract 1."
    raise DataError(f"{what} lie between {least} and {most}: expected class indices from 0 to {num_classes - 1}. {advice}")


def _distributions(labels: Tensor, what: str) -> Tensor:
    sums = labels.sum(1)
    wrong = (~((sums - 1).abs() <= _SUM) | ~(labels >= -_SUM).all(1)).nonzero().flatten()
    if not len(wrong):
        return labels
    row, total = labels[wrong[0]], float(sums[wrong[0]])
    if bool(((row == 0) | (row == 1)).all()) and total > 1:
        raise DataError(
            f"{what} give an image {total:.0f} classes at once: expected rows that add up to 1. Several labels "
            "per image are not supported yet."
        )
    raise DataError(
        f"{what} are no distributions over the classes: a row adds up to {total:g} and holds values from "
        f"{float(row.min()):g} to {float(row.max()):g}; expected shares of 0 or more that add up to 1, or class indices (N,)."
    )
