"""Figures of what a trained model says of labelled pictures: confusion, precision and recall, calibration, mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune import scores
from finetune.figure_style import BLUE, COLOURS, FAINT, INK, RED, add_title, dress, label, labels, new_axes, new_figure
from finetune.outcomes import Outcome

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MANY = 30
"""Number of classes above which figures show those with the most mistakes only."""


def confusion_matrix(outcome: Outcome, *, normalised: bool = False, title: str = "") -> Figure:
    """Draw which class was taken for which: right predictions in blue, mistakes in red.

    With more than `MANY` classes it is the matrix of those with the most mistakes.

    Args:
        outcome: Labels and predictions.
        normalised: Show shares of each row (of the pictures of a true class) in place of counts.
        title: Of the figure.
    """
    whole = scores.confusion(outcome)
    shown = most_confused_classes(whole)
    matrix, support = whole[np.ix_(shown, shown)], whole.sum(1)[shown]
    share = matrix / np.maximum(support, 1)[:, None]
    height = max(2.4, min(4.9, 1.5 + 0.34 * len(shown)))
    figure, axes = new_axes(
        height,
        title or _title("Confusion, % of the true class" if normalised else "Confusion, pictures", outcome, shown),
        grid="none",
    )
    axes.imshow(_paint(share), aspect="equal", interpolation="nearest")
    names = labels([outcome.classes[i] for i in shown], 16)
    size = 8 if len(shown) <= 16 else 6
    axes.set_xticks(range(len(shown)), names, rotation=0 if _short(names) else 90, fontsize=size)
    axes.set_yticks(range(len(shown)), names, fontsize=size)
    dress(axes, "predicted", "true", grid="none")
    axes.tick_params(labelsize=size, length=0)
    for spine in axes.spines.values():
        spine.set_visible(True)
    if len(shown) <= 20:
        for row, column in np.argwhere(matrix > 0):
            text = _percent(share[row, column]) if normalised else f"{matrix[row, column]}"
            colour = "white" if share[row, column] > 0.55 else INK
            axes.text(column, row, text, ha="center", va="center", fontsize=size - 0.5, color=colour)
    return figure


def confused_pairs(outcome: Outcome, most: int = 12) -> Figure | None:
    """Draw the pairs of classes that are mistaken most often, as bars; None if there is no mistake.

    Args:
        outcome: Labels and predictions.
        most: How many pairs.
    """
    pairs = scores.confused_pairs(outcome, most)
    if not pairs:
        return None
    figure, axes = new_axes(0.9 + 0.24 * len(pairs), "Most often mistaken", "pictures", grid="x")
    names = [f"{label(outcome.classes[true])} → {label(outcome.classes[said])}" for true, said, _ in pairs]
    bars = axes.barh(range(len(pairs)), [count for *_, count in pairs], color=RED, height=0.65)
    axes.bar_label(bars, padding=3, fontsize=8, color=INK)
    axes.set_yticks(range(len(pairs)), names)
    axes.invert_yaxis()
    axes.locator_params(axis="x", integer=True)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def per_class_scores(outcome: Outcome) -> Figure:
    """Draw precision and recall of each class, the worst F1 on top; the worst only, if there are more than `MANY` classes.

    Args:
        outcome: Labels and predictions.
    """
    table = scores.per_class(outcome)
    order = np.argsort(np.nan_to_num(table["f1"]), kind="stable")[:MANY]
    figure, axes = new_axes(1.0 + 0.24 * len(order), _title("Precision and recall", outcome, order), grid="x")
    precision, recall = table["precision"][order], table["recall"][order]
    rows = np.arange(len(order))
    axes.hlines(rows, np.minimum(precision, recall), np.maximum(precision, recall), color=FAINT, linewidth=1.2, zorder=1)
    axes.plot(precision, rows, "o", color=BLUE, markersize=5.5, label="precision: of what was called so, this share is")
    axes.plot(recall, rows, "D", color=COLOURS[4], markersize=5, label="recall: of what is so, this share was found")
    axes.set_yticks(rows, labels([outcome.classes[i] for i in order]))
    axes.set_ylim(len(order) - 0.4, -0.6)
    lowest = float(np.nanmin([precision, recall])) if len(order) else 0.0
    axes.set_xlim(min(0.9, max(-0.02, lowest - 0.05)), 1.01)
    figure.legend(loc="outside lower center", ncols=1, fontsize=8, frameon=False, labelcolor=INK)
    return figure


def reliability(outcome: Outcome, bins: int = 15) -> Figure:
    """Draw how often the model is right against how sure it says it is, with the expected calibration error.

    Args:
        outcome: Labels and probabilities.
        bins: Number of bins of equal width (Guo et al. 2017).
    """
    filled = [b for b in scores.calibration(outcome, bins) if b.count]
    figure = new_figure(3.6)
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    add_title(figure, f"Calibration: expected error (ECE) {scores.ece(outcome, bins):.3f}")
    dress(axes, y="share that is right")
    dress(below, "confidence", "pictures")
    left, width = [b.low + 0.003 for b in filled], 1 / bins - 0.006
    right, sure = np.array([b.accuracy for b in filled]), np.array([b.confidence for b in filled])
    bars: dict[str, Any] = {"align": "edge", "linewidth": 0.6}
    axes.bar(left, right, width, color=BLUE, alpha=0.85, label="is right", **bars)
    axes.bar(left, sure - right, width, right, facecolor="none", edgecolor=RED, hatch="////", label="gap", **bars)
    axes.plot([0, 1], [0, 1], color=FAINT, linestyle="--", linewidth=1, label="as sure as right")
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False, labelcolor=INK)
    below.bar(left, [b.count for b in filled], width, color=FAINT, **bars)
    below.locator_params(axis="y", nbins=3, integer=True)
    return figure


def picture_grid(
    title: str, pictures: Sequence[np.ndarray | None], captions: Sequence[str], columns: int = 6, size: float = 1.15
) -> Figure:
    """Draw pictures with a caption each.

    Args:
        title: Of the figure.
        pictures: uint8 (height, width, 3) each; None is shown as missing.
        captions: A line or two for each.
        columns: Pictures side by side.
        size: Of a picture, in inches.
    """
    columns = max(1, min(columns, len(pictures)))
    rows = -(-len(pictures) // columns)
    figure = new_figure(0.4 + (size + 0.3) * rows, (size + 0.1) * columns + 0.1)
    add_title(figure, title)
    cells = figure.subplots(max(1, rows), columns, squeeze=False).ravel()
    for cell in cells:
        cell.set_axis_off()
    for cell, picture, caption in zip(cells, pictures, captions, strict=False):
        if picture is None:
            cell.text(0.5, 0.5, "missing", ha="center", va="center", fontsize=8, color=FAINT, transform=cell.transAxes)
        else:
            cell.imshow(picture, interpolation="nearest")
        cell.set_title("\n".join(labels(caption.split("\n"), 18)), fontsize=7, color=INK, pad=2)
    return figure


def most_confused_classes(matrix: np.ndarray, most: int = MANY) -> np.ndarray:
    """Return the classes, in their order, that figures show: all, or those with the most mistakes made of or for them.

    Args:
        matrix: Counts, (C, C), a row per true class.
        most: How many.

    >>> most_confused_classes(np.array([[5, 0, 1], [0, 4, 0], [2, 0, 3]]), most=2).tolist()
    [0, 2]
    """
    mistakes = matrix.sum(0) + matrix.sum(1) - 2 * np.diag(matrix)
    return np.sort(np.argsort(-mistakes, kind="stable")[:most])


def _paint(share: np.ndarray) -> np.ndarray:
    """Return RGBA colours of shares: blue on the diagonal, red beside it, nothing at 0, so that paper stays paper."""
    from matplotlib.colors import to_rgba

    picture = np.empty((*share.shape, 4))
    picture[:] = to_rgba(RED)
    picture[np.diag_indices(len(share))] = to_rgba(BLUE)
    picture[..., 3] = np.where(share > 0, 0.08 + 0.92 * np.sqrt(share), 0.0)
    return picture


def _percent(share: float) -> str:
    return f"{100 * share:.0f}" if share >= 0.005 else "<1"


def _short(names: Sequence[str]) -> bool:
    return max(map(len, names)) * len(names) <= 44


def _title(what: str, outcome: Outcome, shown: np.ndarray) -> str:
    whole = len(outcome.classes)
    return what if len(shown) == whole else f"{what}: {len(shown)} of {whole} classes"
