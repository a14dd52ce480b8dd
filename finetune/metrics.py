"""The metrics of a split, under the names that logs, checkpoints and reports use."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score


class MeanLoss(Metric):
    """The mean of a loss over pictures, over all processes together.

    Lightning divides by the mean number of pictures per process, rounded down: 101 pictures on 2 processes count as 100.

    Args:
        finite: Leave out losses that are not finite.
    """

    full_state_update = False
    total: Tensor
    number: Tensor

    def __init__(self, finite: bool = False) -> None:
        super().__init__()
        self.finite = finite
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("number", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, loss: Tensor, number: int) -> None:
        """Add the mean loss of so many pictures."""
        counts = loss.isfinite() if self.finite else torch.ones_like(loss, dtype=torch.bool)
        self.total += torch.where(counts, loss, 0.0) * number
        self.number += counts * number

    def compute(self) -> Tensor:
        """Return the mean."""
        return self.total / self.number


class MeanRecall(MulticlassAccuracy):
    """Mean recall over the classes that have pictures, which scikit-learn calls balanced accuracy.

    The macro average of torchmetrics counts a class without pictures as 0 as soon as one picture is taken for it.
    """

    def compute(self) -> Tensor:
        """Return the mean, a scalar."""
        right, _, _, missed = self._final_state()
        number = right + missed
        return (right / number)[number > 0].mean() if bool((number > 0).any()) else torch.tensor(0.0, device=right.device)


def build_metrics(split: str, num_classes: int) -> MetricCollection:
    """Return `{split}/acc`, and outside training `acc_macro`, `f1` (macro) and, with more than 5 classes, `acc_top5`.

    Args:
        split: `train`, `val` or `test`.
        num_classes: Number of classes.
    """

    def accuracy(average: Literal["micro", "macro"], top_k: int = 1) -> MulticlassAccuracy:
        return MulticlassAccuracy(num_classes=num_classes, average=average, top_k=top_k, validate_args=False)

    metrics: dict[str, Metric | MetricCollection] = {"acc": accuracy("micro")}
    alike = [["acc"]]  # whose counts are shared; left to itself, torchmetrics takes those that are equal after a batch
    if split != "train":
        metrics["acc_macro"] = MeanRecall(num_classes=num_classes, average="macro", validate_args=False)
        alike.append(["acc_macro", "f1"])
        metrics["f1"] = MulticlassF1Score(num_classes=num_classes, average="macro", validate_args=False)
        if num_classes > 5:
            alike.append(["acc_top5"])
            metrics["acc_top5"] = accuracy("micro", top_k=5)
    return MetricCollection(metrics, prefix=f"{split}/", compute_groups=alike)
