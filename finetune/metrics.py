"""The metrics of a split, under the names that logs, checkpoints and reports use."""

from __future__ import annotations

from typing import Literal

from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score


def build_metrics(split: str, num_classes: int) -> MetricCollection:
    """Return `{split}/acc`, and outside training `acc_macro`, `f1` (macro) and, with more than 5 classes, `acc_top5`.

    Args:
        split: `train`, `val` or `test`.
        num_classes: Number of classes.
    """

    def accuracy(average: Literal["micro", "macro"], top_k: int = 1) -> MulticlassAccuracy:
        return MulticlassAccuracy(num_classes=num_classes, average=average, top_k=top_k, validate_args=False)

    metrics: dict[str, Metric | MetricCollection] = {"acc": accuracy("micro")}
    if split != "train":
        metrics["acc_macro"] = accuracy("macro")
        metrics["f1"] = MulticlassF1Score(num_classes=num_classes, average="macro", validate_args=False)
        if num_classes > 5:
            metrics["acc_top5"] = accuracy("micro", top_k=5)
    return MetricCollection(metrics, prefix=f"{split}/")
