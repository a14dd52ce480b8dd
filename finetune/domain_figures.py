"""Figures of domain adaptation: accuracy of both domains and of the discriminator, validators, features, confusion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune import curve_figures as curves
from finetune.figure_style import BLUE, COLOURS, INK, RED, new_axes
from finetune.outcome_figures import confusion_matrix
from finetune.run_files import Curve, RunFiles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ACCURACIES = {
    "val/acc": "source",
    "oracle/target_acc": "target (oracle)",
    "train/domain_acc": "discriminator: which domain",
}


def of_domains(files: RunFiles) -> dict[str, Figure]:
    """Draw what a run of domain adaptation left; nothing of other runs.

    Args:
        files: Of the run.

    Returns:
        domain_accuracy, validators, domain_features, confusion_source, confusion_target, as far as there is anything to draw.
    """
    found: dict[str, Figure] = {}
    validators = {name: curve for name, curve in files.metrics.items() if name.startswith("target/")}
    if validators:
        marks: dict[str, Any] = {"unit": files.unit, "spans": files.spans}
        accuracies = {says: files.metrics[name] for name, says in _ACCURACIES.items() if name in files.metrics}
        found["domain_accuracy"] = curves.named_curves("Accuracy by domain", accuracies, **marks)
        found["validators"] = curves.named_curves("Validators, from least (0) to most (1)", scaled(validators), **marks)
    if files.domains:
        found["domain_features"] = feature_map(files.domains)
    if "target" in files.outcomes:
        for split, domain in (("val", "source"), ("target", "target")):
            if split in files.outcomes:
                title = f"Confusion on the {domain}, % of the true class"
                found[f"confusion_{domain}"] = confusion_matrix(files.outcomes[split], normalised=True, title=title)
    return found


def scaled(found: Mapping[str, Curve]) -> dict[str, Curve]:
    """Return curves that each go from 0, its least value, to 1, its most; a flat one stays at 0."""
    return {name: Curve(c.x, (c.y - c.y.min()) / max(float(np.ptp(c.y)), 1e-12)) for name, c in found.items() if len(c.y)}


def feature_map(domains: Mapping[str, Any]) -> Figure:
    """Draw the features of both domains: circles are of the source, dots of the target, a colour per class if they are few.

    Args:
        domains: What `domains.json` holds.
    """
    points = domains["points"]
    classes = list(dict.fromkeys(point[3] for point in points))
    figure, axes = new_axes(4.4, f"Features of both domains (t-SNE), A-distance {domains['a_distance']:.2f}", grid="none")
    axes.set_xticks([])
    axes.set_yticks([])
    few = len(classes) <= len(COLOURS)
    for domain, plain in (("source", BLUE), ("target", RED)):
        own = [point for point in points if point[2] == domain]
        colours = [COLOURS[classes.index(point[3])] if few else plain for point in own]
        x, y = np.array([point[:2] for point in own], float).reshape(-1, 2).T
        faces: Any = "none" if domain == "source" else colours
        axes.scatter(x, y, s=14, label=domain, facecolors=faces, edgecolors=colours, linewidths=0.8)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False, labelcolor=INK)
    return figure
