"""The look of figures: colours that colour-blind people tell apart, names on the axes, ink that a page can recolour.

Figures are made without pyplot: they belong to nobody's global state, need no screen, and can be made in any thread.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT = "#1b1f24", "#737a83"
BLUE, RED, GREEN, PURPLE, ORANGE, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
COLOURS = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY)
"""Okabe and Ito's palette (2008), without its yellow, which print loses, and its black, which is the ink."""

LINES = ("-", "--", ":", "-.")
WIDTH = 4.6  # inches, so that letters of 8 points are still legible when a phone shows it at its width


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """Return an empty figure on white paper that is drawn by Agg.

    Args:
        height: In inches.
        width: In inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white", dpi=160)
    FigureCanvasAgg(figure)
    return figure


def new_axes(height: float, title: str, x: str = "", y: str = "", grid: str = "y") -> tuple[Figure, Axes]:
    """Return a figure with one pair of axes in the house's style.

    Args:
        height: In inches.
        title: Of the figure.
        x: What the horizontal axis shows.
        y: What the vertical axis shows.
        grid: Whose ticks have lines: x, y, both or none.
    """
    figure = new_figure(height)
    add_title(figure, title)
    axes = figure.subplots()
    dress(axes, x, y, grid)
    return figure, axes


def add_title(figure: Figure, title: str) -> None:
    """Write the title above all axes, at the left edge of the figure."""
    figure.suptitle(label(title, 60), x=0.015, ha="left", fontsize=10, fontweight="bold", color=INK)


def dress(axes: Axes, x: str = "", y: str = "", grid: str = "y") -> None:
    """Put axes into the house's style; arguments are those of `new_axes`."""
    axes.set_facecolor("none")
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=FAINT, labelcolor=INK, which="both", width=0.6)
    axes.tick_params(which="minor", length=0)
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set(color=FAINT, linewidth=0.6)
    if grid != "none":
        axes.grid(axis=grid, color=FAINT, alpha=0.25, linewidth=0.6)  # type: ignore[arg-type]


def add_legend(axes: Axes, columns: int = 3) -> None:
    """Put the legend above the axes, where it hides nothing."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    handles, names = axes.get_legend_handles_labels()
    if handles:
        figure.legend(
            handles,
            names,
            loc="outside lower center",
            ncols=min(columns, len(handles)),
            fontsize=8,
            frameon=False,
            labelcolor=INK,
            handlelength=2.4,
        )


def style_of(number: int) -> dict[str, object]:
    """Return colour and dashes of the n-th line; dashes change when the colours are used up."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": LINES[number // len(COLOURS) % len(LINES)]}


def label(name: str, most: int = 22) -> str:
    r"""Return a name fit for a figure, whatever somebody called a folder: short, on one line, and never read as mathematics.

    Args:
        name: The name.
        most: Length from which its middle is left out.

    >>> label("a" * 30, 11), label("$x_1$ costs")
    ('aaaaa…aaaaa', '\\$x_1\\$ costs')
    """
    readable = "".join(_drawn(character) for character in name)
    if len(readable) > most:
        half = (most - 1) // 2
        readable = f"{readable[: most - 1 - half]}…{readable[-half:]}"
    return readable.replace("$", r"\$")


def labels(names: Sequence[str], most: int = 22) -> list[str]:
    """Return `label` of each name."""
    return [label(name, most) for name in names]


def _drawn(character: str) -> str:
    """Return what is drawn of a character: nothing that controls, joins, or changes the direction."""
    if character.isspace():
        return " "
    kind = unicodedata.category(character)
    return "" if kind == "Cf" else "\ufffd" if kind in ("Cc", "Cs", "Co", "Cn") else character
