"""Figures of what went on during training: metrics, learning rates, and how gradients and weights moved, stage by stage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune.figure_style import FAINT, INK, RED, add_legend, label, new_axes, style_of
from finetune.run_files import Curve, Span

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FEW = 30  # points of a curve up to which each has a dot
_COLUMNS = 200  # of a heat map


def metric_curves(
    title: str,
    curves: Mapping[str, Curve],
    *,
    unit: str = "epoch",
    spans: Sequence[Span] = (),
    best: float | None = None,
    ylabel: str = "",
) -> Figure:
    """Draw metrics over the run, those of training dashed and in the colour of their counterpart in validation.

    Args:
        title: Of the figure.
        curves: By name, such as `train/loss` and `val/loss`.
        unit: What the horizontal axis counts.
        spans: The freezing phases.
        best: Where the best checkpoint was kept.
        ylabel: What the vertical axis shows.
    """
    figure, axes = new_axes(3.1, title, unit, ylabel)
    bases = list(dict.fromkeys(name.rpartition("/")[2] for name in curves))
    for name, curve in curves.items():
        split, _, base = name.rpartition("/")
        place = bases.index(base)
        look = {
            **style_of(place),
            "linewidth": min(3.2, 1.0 + 0.7 * (len(bases) - place)),
        }  # so that lines on each other are all seen
        _line(axes, curve, label(name), {**look, "linestyle": "--", "linewidth": 1.6} if split == "train" else look)
    if best is not None:
        axes.axvline(best, color=FAINT, linewidth=1, linestyle=":", label="best checkpoint")
    _finish(axes, unit, spans)
    add_legend(axes)
    return figure


def learning_rates(rates: Mapping[str, Curve], *, unit: str = "epoch", spans: Sequence[Span] = ()) -> Figure:
    """Draw the learning rate of each stage on a logarithmic axis; a frozen stage has no line.

    Args:
        rates: By stage, in the order of the network; stages with one and the same curve share a line.
        unit: What the horizontal axis counts.
        spans: The freezing phases.
    """
    figure, axes = new_axes(3.1, "Learning rate by stage", unit)
    trained = {stage: curve for stage, curve in rates.items() if (curve.y > 0).any()}
    for number, (names, curve) in enumerate(_alike(trained)):
        rate = np.where(curve.y > 0, curve.y, np.nan)
        _line(axes, Curve(curve.x, rate), label(names, 40), style_of(number), dots=False)
    if trained:
        axes.set_yscale("log")
    _finish(axes, unit, spans)
    add_legend(axes, columns=4)
    return figure


def named_curves(title: str, curves: Mapping[str, Curve], *, unit: str = "epoch", spans: Sequence[Span] = ()) -> Figure:
    """Draw one quantity of several stages, or of several runs, over each other.

    Args:
        title: The quantity.
        curves: By the name of the stage or run.
        unit: What the horizontal axis counts.
        spans: The freezing phases.
    """
    figure, axes = new_axes(3.1, title, unit)
    for number, (name, curve) in enumerate(curves.items()):
        _line(axes, curve, label(name, 40), style_of(number))
    _finish(axes, unit, spans)
    add_legend(axes, columns=4 if max(map(len, curves), default=0) < 12 else 2)
    return figure


def stage_heatmap(
    title: str, curves: Mapping[str, Curve], *, unit: str = "epoch", broken: Mapping[str, Curve] | None = None
) -> Figure:
    """Draw a positive quantity as stage by step on a logarithmic scale of colours; a frozen stage is left empty.

    Args:
        title: Of the figure.
        curves: By stage, in the order of the network; many steps are put together, by their geometric mean.
        unit: What the horizontal axis counts.
        broken: By stage, how many values were not finite; where there was one, a cross is drawn.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FixedLocator

    figure, axes = new_axes(0.9 + 0.27 * max(4, len(curves)), title, unit, grid="none")
    edges = _edges(curves.values())
    values = np.array([_binned(curve, edges) for curve in curves.values()])
    measured = np.any([_counts(curve.x, edges) for curve in curves.values()], axis=0)
    values = values[:, np.maximum.accumulate(np.where(measured, np.arange(len(measured)), 0))]  # what was not measured goes on
    shown = np.ma.masked_invalid(values)
    low, high = float(shown.min()), float(shown.max())
    norm = LogNorm(low, high) if high > 1.01 * low else LogNorm(low / 2, high * 2)
    extent = (edges[0], edges[-1], len(curves) - 0.5, -0.5)
    image = axes.imshow(shown, aspect="auto", interpolation="nearest", cmap="viridis", norm=norm, extent=extent)
    axes.set_yticks(range(len(curves)), [label(stage) for stage in curves])
    for row, stage in enumerate(curves):
        bad = (broken or {}).get(stage)
        if bad is not None and (bad.y > 0).any():
            at = bad.x[bad.y > 0]
            axes.plot(at, np.full(len(at), row), "x", color=RED, markersize=6, markeredgewidth=1.6, clip_on=False)
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.06, format="{x:.2g}")
    bar.ax.yaxis.set_major_locator(FixedLocator(np.geomspace(norm.vmin or low, norm.vmax or high, 4).tolist()))
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=FAINT, labelcolor=INK, which="both", width=0.6)
    if bar.solids is not None:
        bar.solids.set_rasterized(True)
    return figure


def _line(axes: Axes, curve: Curve, name: str, look: Mapping[str, object], dots: bool = True) -> None:
    marker = "o" if (dots and len(curve.x) <= _FEW) or len(curve.x) == 1 else None
    drawn: dict[str, Any] = {"linewidth": 1.6, "markersize": 3.2, "marker": marker, **look}
    axes.plot(curve.x, curve.y, label=name, **drawn)


def _finish(axes: Axes, unit: str, spans: Sequence[Span] = ()) -> None:
    """Let the axis begin with the run, count in whole numbers, and show the phases."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    if unit == "epoch":
        axes.set_xlim(left=0)
    _mark_spans(axes, spans)


def _mark_spans(axes: Axes, spans: Sequence[Span]) -> None:
    """Shade every other phase and write above each what trains in it."""
    if len(spans) < 2:
        return
    low, high = axes.get_xlim()
    for number, span in enumerate(spans):
        start, end = max(span.start, low), min(span.end, high) if number + 1 < len(spans) else high
        if start >= end:
            continue
        if number % 2:
            axes.axvspan(start, end, color=FAINT, alpha=0.12, linewidth=0)
        room = (end - start) / (high - low) * 60  # letters that fit
        name = span.name if len(span.name) <= room else str(number + 1)
        place: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
        axes.text((start + end) / 2, 1.01, label(name, 60), fontsize=7.5, color=FAINT, **place)
    axes.set_xlim(low, high)


def _alike(rates: Mapping[str, Curve]) -> list[tuple[str, Curve]]:
    """Put together neighbours that have the same curve, with their names."""
    groups: list[tuple[list[str], Curve]] = []
    for stage, curve in rates.items():
        if groups and np.array_equal(groups[-1][1].y, curve.y) and np.array_equal(groups[-1][1].x, curve.x):
            groups[-1][0].append(stage)
        else:
            groups.append(([stage], curve))
    return [(names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}", curve) for names, curve in groups]


def _edges(curves: Iterable[Curve]) -> np.ndarray:
    """Return the edges of the columns of a heat map, as wide as the places are near to each other, or wider."""
    places = np.unique(np.concatenate([curve.x for curve in curves]))
    if len(places) == 1:
        return np.array([places[0], places[0] + 1])
    gap = np.diff(places).min()
    columns = min(_COLUMNS, round((places[-1] - places[0]) / gap) + 1)
    return np.linspace(places[0], places[-1] + gap, columns + 1)


def _binned(curve: Curve, edges: np.ndarray) -> np.ndarray:
    """Return the geometric mean of a curve's positive values in each column; NaN where there is none."""
    good = np.isfinite(curve.y) & (curve.y > 0)
    count = _counts(curve.x[good], edges)
    total = _counts(curve.x[good], edges, np.log(curve.y[good]))
    return np.exp(np.where(count > 0, total / np.maximum(count, 1), np.nan))


def _counts(places: np.ndarray, edges: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Count what falls into each column, or add it up."""
    rounding = 1e-9 * (edges[-1] - edges[0])
    column = np.clip(np.searchsorted(edges, places + rounding, side="right") - 1, 0, len(edges) - 2)
    return np.bincount(column, weights=weights, minlength=len(edges) - 1)
