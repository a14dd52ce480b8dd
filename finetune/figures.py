"""All figures of a run, for the report and for whatever else tracks it; and figures as bytes and as part of a page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

from finetune import curve_figures as curves
from finetune import outcome_figures as outcomes
from finetune import scores
from finetune.domain_figures import of_domains
from finetune.figure_style import FAINT, INK
from finetune.run_files import AUGMENTED, EXPLAINED, Curve, RunFiles, in_order
from finetune.thumbnails import thumbnail

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GRADIENTS = {
    "gradient_flow": ("grad_norm", "Gradient norm by stage"),
    "update_ratio": ("update_ratio", "Update-to-weight ratio by stage"),
}
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"


def of_run(run: str | Path | RunFiles, pictures: bool = True) -> dict[str, Figure]:
    """Draw all figures that a run's files allow; what is not there is left out.

    Args:
        run: The run's folder.
        pictures: Whether those that are made of pictures are wanted as well.

    Returns:
        loss, metrics, learning_rates, weight_distance, gradient_flow, update_ratio, confusion, confusion_normalised,
        confused_pairs, per_class, reliability; of domain adaptation what `of_domains` returns; augmented, mistakes.
    """
    files = run if isinstance(run, RunFiles) else RunFiles(run)
    found = {**_of_training(files), **_of_gradients(files), **_of_outcome(files), **of_domains(files)}
    return {**found, **_of_pictures(files)} if pictures else found


def _of_training(files: RunFiles) -> dict[str, Figure]:
    found: dict[str, Figure] = {}
    best = None if files.best_epoch is None else files.best_epoch + 1
    marks: dict[str, Any] = {"unit": files.unit, "spans": files.spans, "best": best}
    losses, rest = split_metrics(files.metrics)
    if losses:
        found["loss"] = curves.metric_curves("Loss", losses, **marks)
    if rest:
        found["metrics"] = curves.metric_curves("Metrics", rest, **marks)
    if files.rates:
        found["learning_rates"] = curves.learning_rates(files.rates, unit=files.unit, spans=files.spans)
    return found


def split_metrics(metrics: Mapping[str, Curve]) -> tuple[dict[str, Curve], dict[str, Curve]]:
    """Return the losses, and the other metrics that lie between 0 and 1, of training and validation."""
    during = {name: curve for name, curve in metrics.items() if name.startswith(("val/", "train/")) and len(curve.x)}
    during = dict(sorted(during.items(), key=lambda item: item[0].startswith("train/")))  # validation is the one to look at
    losses = {name: curve for name, curve in during.items() if name.endswith("/loss")}
    shares = {
        name: curve
        for name, curve in during.items()
        if name not in losses and np.nanmin(curve.y, initial=0) >= 0 and np.nanmax(curve.y, initial=0) <= 1
    }
    return losses, shares


def _of_gradients(files: RunFiles) -> dict[str, Figure]:
    found = {}
    moved, broken = gradient_curves(files, "distance"), gradient_curves(files, "nonfinite")
    if moved:
        title = "Distance from the weights at the start, by stage"
        found["weight_distance"] = curves.named_curves(title, moved, unit=files.unit, spans=files.spans)
    for name, (column, title) in GRADIENTS.items():
        flow = gradient_curves(files, column)
        if any((np.isfinite(curve.y) & (curve.y > 0)).any() for curve in flow.values()):
            found[name] = curves.stage_heatmap(title, flow, unit=files.unit, broken=broken)
    return found


def gradient_curves(files: RunFiles, column: str) -> dict[str, Curve]:
    """Return a column of `gradients.csv` as a curve for each stage, in the order of the network."""
    points: dict[str, list[tuple[float, float]]] = {}
    for place, stage, numbers in files.gradients:
        if column in numbers:
            points.setdefault(stage, []).append((place, numbers[column]))
    return {stage: Curve(*np.array(points[stage]).T) for stage in in_order(points, files.stages)}


def _of_outcome(files: RunFiles) -> dict[str, Figure]:
    outcome = next(iter(files.outcomes.values()), None)
    if outcome is None:
        return {}
    found = {
        "confusion": outcomes.confusion_matrix(outcome),
        "confusion_normalised": outcomes.confusion_matrix(outcome, normalised=True),
        "per_class": outcomes.per_class_scores(outcome),
        "reliability": outcomes.reliability(outcome),
    }
    pairs = outcomes.confused_pairs(outcome)
    return found if pairs is None else {**found, "confused_pairs": pairs}


def _of_pictures(files: RunFiles) -> dict[str, Figure]:
    found = {}
    seen = _drawn(files, AUGMENTED, 1200)
    if seen is not None:
        found["augmented"] = outcomes.picture_grid("Training pictures as the network sees them", [seen], [""], size=4.4)
    explained = _drawn(files, EXPLAINED, 1600)
    if explained is not None:
        found["explained"] = outcomes.picture_grid("Where the model looked in its worst mistakes", [explained], [""], size=6)
    outcome = next(iter(files.outcomes.values()), None)
    worst = [] if outcome is None else scores.worst_mistakes(outcome, 12)
    if outcome is not None and worst:
        said = [f"→ {outcome.classes[outcome.predicted[i]]} {100 * outcome.confidence[i]:.0f} %" for i in worst]
        captions = [f"{outcome.classes[outcome.labels[i]]}\n{text}" for i, text in zip(worst, said, strict=True)]
        paths = [files.picture(outcome.files[i]) for i in worst]
        shown = [None if path is None else thumbnail(path) for path in paths]
        found["mistakes"] = outcomes.picture_grid("The worst mistakes", shown, captions, columns=4)
    return found


def _drawn(files: RunFiles, name: str, side: int) -> np.ndarray | None:
    path = files.image(name)
    return None if path is None else thumbnail(path, side)


# ------------------------------------------------------------------------------------------------------------- rendering


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file on white."""
    buffer = io.BytesIO()
    with _quietly():
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def svg(figure: Figure, name: str) -> str:
    """Return a figure as an `<svg>` element for an HTML page, without a background.

    Its ink takes the page's colours (`currentColor` and `--faint`), so that it is legible on a dark page too. Text stays text,
    which the page can set in its font; no id occurs twice on a page, and nothing refers to an address.

    Args:
        figure: The figure.
        name: A name that is unique on the page, of letters and digits.
    """
    import matplotlib

    buffer = io.BytesIO()
    options: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "svg.image_inline": True}
    with _quietly(), matplotlib.rc_context(options):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", facecolor="none", metadata=metadata)
    root = ElementTree.fromstring(buffer.getvalue())
    _strip(root, name)
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "style": f"max-width: {_points(figure):.0f}pt"}
    return ElementTree.tostring(root, encoding="unicode")


def _points(figure: Figure) -> float:
    return float(figure.get_size_inches()[0]) * 72 * 1.35  # wider than this, its letters would be larger than the page's


def _strip(root: ElementTree.Element, name: str) -> None:
    """Leave names of XML and styles for whole pages out, make ids unique, and let ink be that of the page."""
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        for child in list(element):
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                element.remove(child)
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            element.set(key.removeprefix(_XLINK), _attribute(key.removeprefix(_XLINK), value, name))


def _attribute(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href" and value.startswith("#"):
        return f"#{name}-{value[1:]}"
    value = re.sub(r"url\(#", f"url(#{name}-", value)
    if key == "style":
        value = value.replace(INK, "currentColor").replace(FAINT, "var(--faint)")
    return value


@contextmanager
def _quietly() -> Iterator[None]:
    """Say nothing of letters that the figure's font lacks: a page sets them in a font of the reader's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield
