"""How good predictions are: metrics of an outcome, each with its bootstrap interval, and where they go wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np

from finetune.outcomes import Floats, Ints, Outcome

RESAMPLES = 1000
LEVEL = 0.95
_MOST_CLASSES = 50  # for the area under the ROC curve, which has to be computed class by class


class Interval(NamedTuple):
    """A metric, and the bounds between which it would lie with other pictures of the same kind."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Bin:
    """Pictures of similar confidence: how confident the model is of them, and how often it is right."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def confusion(outcome: Outcome, weights: Floats | None = None) -> Floats | Ints:
    """Return how often each true class (row) was taken for each class (column).

    Args:
        outcome: N pictures.
        weights: How often each picture counts, (N,); once if None.
    """
    number = len(outcome.classes)
    cells = outcome.labels * number + outcome.predicted
    counts = np.bincount(cells, weights, number * number).reshape(number, number)
    return counts if weights is not None else counts.astype(np.int64)


def per_class(outcome: Outcome) -> dict[str, Floats]:
    """Return precision, recall, F1 and support of each class, (C,); a metric without pictures to judge by is 0."""
    return _per_class(confusion(outcome).astype(np.float64))


def _per_class(table: Floats) -> dict[str, Floats]:
    right, support, said = np.diag(table), table.sum(1), table.sum(0)
    return {
        "precision": _ratio(right, said),
        "recall": _ratio(right, support),
        "f1": _ratio(2 * right, support + said),
        "support": support,
    }


def _ratio(top: Floats, bottom: Floats) -> Floats:
    return np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)


def metrics(outcome: Outcome, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Interval]:
    """Compute all metrics, each with its 95 % interval.

    acc, acc_macro (mean recall over the classes that have pictures), f1 and precision (means over those and the ones that are
    named for a picture), acc_top5 with more than 5 classes, auroc (area under the ROC curve, one class against the rest, mean)
    with up to 50 classes, nll (mean negative log-likelihood), brier (mean squared distance of the probabilities from the truth,
    summed over classes) and ece (see `ece`).

    The interval is the percentile bootstrap (Efron & Tibshirani 1993): the pictures are drawn anew with replacement, so it
    covers the choice of pictures to measure with, not that of the training pictures.

    Args:
        outcome: N pictures, at least one.
        resamples: How often the pictures are drawn; 0 gives bounds that are NaN.
        seed: Seed of the draws.
    """
    compute = _all_metrics(outcome)
    number = len(outcome)
    values = compute(np.ones(number))
    generator = np.random.default_rng(seed)
    share = np.full(number, 1 / number)
    drawn = [compute(generator.multinomial(number, share).astype(np.float64)) for _ in range(resamples)]
    bounds = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
    return {
        name: Interval(value, *(np.nanquantile([draw[name] for draw in drawn], bounds).tolist() if drawn else [np.nan] * 2))
        for name, value in values.items()
    }


def _all_metrics(outcome: Outcome) -> Callable[[Floats], dict[str, float]]:
    """Return a function from weights (N,) to all metrics; what does not depend on weights is computed once."""
    rows = np.arange(len(outcome))
    likelihood = -np.log(np.clip(outcome.probabilities[rows, outcome.labels], np.finfo(np.float64).tiny, None))
    truth = np.zeros_like(outcome.probabilities)
    truth[rows, outcome.labels] = 1
    distance = ((outcome.probabilities - truth) ** 2).sum(1)
    rank = (outcome.probabilities > outcome.probabilities[rows, outcome.labels][:, None]).sum(1)
    areas = _areas(outcome) if len(outcome.classes) <= _MOST_CLASSES else None
    where = _bin_of(outcome, 15)

    def compute(weights: Floats) -> dict[str, float]:
        table = confusion(outcome, weights).astype(np.float64)
        scores, occurs, held = _per_class(table), table.sum(0) + table.sum(1) > 0, table.sum(1) > 0
        total = weights.sum()
        found = {"acc": float(np.trace(table) / total)}
        for name, column in (("acc_macro", "recall"), ("f1", "f1"), ("precision", "precision")):
            found[name] = float(scores[column][held if column == "recall" else occurs].mean())
        if len(outcome.classes) > 5:
            found["acc_top5"] = float(weights[rank < 5].sum() / total)
        if areas is not None:
            found["auroc"] = areas(weights)
        found["nll"] = float(weights @ likelihood / total)
        found["brier"] = float(weights @ distance / total)
        found["ece"] = _ece(outcome, where, weights)
        return found

    return compute


def _areas(outcome: Outcome) -> Callable[[Floats], float]:
    """Return a function from weights to the mean area under the ROC curves; ties count half (Mann-Whitney)."""
    ranks = [np.unique(column, return_inverse=True) for column in outcome.probabilities.T]

    def area(label: int, weights: Floats) -> float:
        values, rank = ranks[label]
        mine = outcome.labels == label
        inside = np.bincount(rank, weights * mine, len(values))
        outside = np.bincount(rank, weights * ~mine, len(values))
        pairs = inside.sum() * outside.sum()
        return float(inside @ (outside.cumsum() - outside / 2) / pairs) if pairs > 0 else np.nan

    def mean(weights: Floats) -> float:
        found = [area(label, weights) for label in range(len(ranks))]
        known = [value for value in found if not np.isnan(value)]
        return sum(known) / len(known) if known else np.nan

    return mean


def _bin_of(outcome: Outcome, bins: int) -> Ints:
    """Return the number of each picture's bin; a bin holds its upper edge."""
    return np.clip(np.ceil(outcome.confidence * bins).astype(np.int64) - 1, 0, bins - 1)


def calibration(outcome: Outcome, bins: int = 15) -> list[Bin]:
    """Return how often the model is right where it is about equally confident, in bins of equal width; empty ones too."""
    where, right = _bin_of(outcome, bins), outcome.predicted == outcome.labels
    count = np.bincount(where, minlength=bins).astype(np.float64)
    sure = _ratio(np.bincount(where, outcome.confidence, bins).astype(np.float64), count)
    share = _ratio(np.bincount(where, right, bins).astype(np.float64), count)
    return [
        Bin(index / bins, (index + 1) / bins, int(count[index]), float(sure[index]), float(share[index]))
        for index in range(bins)
    ]


def ece(outcome: Outcome, bins: int = 15) -> float:
    """Return the expected calibration error: the mean distance of confidence and accuracy over the bins (Guo et al. 2017)."""
    return _ece(outcome, _bin_of(outcome, bins), np.ones(len(outcome)))


def _ece(outcome: Outcome, where: Ints, weights: Floats) -> float:
    right = (outcome.predicted == outcome.labels).astype(np.float64)
    gaps = np.bincount(where, weights * (right - outcome.confidence))
    return float(np.abs(gaps).sum() / weights.sum())


def selective(outcome: Outcome, threshold: float) -> tuple[float, float]:
    """Return coverage and accuracy where only pictures of at least this confidence are answered; NaN if there are none."""
    answered = outcome.confidence >= threshold
    right = outcome.predicted[answered] == outcome.labels[answered]
    return float(answered.mean()), float(right.mean()) if answered.any() else float("nan")


def worst_mistakes(outcome: Outcome, most: int) -> list[int]:
    """Return the indices of wrong predictions, the most confident first."""
    wrong = np.flatnonzero(outcome.predicted != outcome.labels)
    order = np.argsort(-outcome.confidence[wrong], kind="stable")
    return cast(list[int], wrong[order][:most].tolist())


def confused_pairs(outcome: Outcome, most: int) -> list[tuple[int, int, int]]:
    """Return (true, taken for, how often) of the pairs of classes that are confused most, the most frequent first."""
    table = confusion(outcome)
    np.fill_diagonal(table, 0)
    order = np.argsort(-table, axis=None, kind="stable")[:most]
    pairs = [(int(cell // len(table)), int(cell % len(table))) for cell in order]
    return [(true, said, int(table[true, said])) for true, said in pairs if table[true, said]]
