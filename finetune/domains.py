"""How far apart a trained model sees two domains: its features of both on a map, and the A-distance between them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune.files import write_atomically
from finetune.outcomes import Outcome, read_outcome
from finetune.predictor import Predictor
from finetune.run_files import DOMAINS, PREDICTIONS

_FEWEST = 2  # pictures of a domain: one to learn from, one to measure on
_MOST = 300  # pictures of each domain: t-SNE takes seconds for them

Array = npt.NDArray[np.float64]


def measure_domains(run: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Look at both domains with the best checkpoint of a run, and write `domains.json` into its folder.

    It takes the pictures that validation looked at, at most 300 of each domain.

    Args:
        run: The run's folder.

    Returns:
        a_distance, and points: x, y, the domain and the name of the class of each picture. None if the run kept no predictions
        of both domains, as without labels of the target, or there are too few to tell.
    """
    folder = Path(run)
    tables = {"source": folder / PREDICTIONS["val"], "target": folder / PREDICTIONS["target"]}
    if not all(table.is_file() for table in tables.values()):
        return None
    predictor = Predictor(folder)
    found = {name: _some(read_outcome(table)) for name, table in tables.items()}
    if min(len(files) for files, _ in found.values()) < _FEWEST:
        return None
    features = {name: np.asarray(predictor.features(files), np.float64) for name, (files, _) in found.items()}
    places = tsne(np.concatenate(list(features.values())))
    named = [(name, label) for name, (_, labels) in found.items() for label in labels]
    points = [[round(float(x), 3), round(float(y), 3), *name] for (x, y), name in zip(places, named, strict=True)]
    content = {"a_distance": round(a_distance(features["source"], features["target"]), 4), "points": points}
    write_atomically(folder / DOMAINS, json.dumps(content))
    return content


def a_distance(source: Array, target: Array, seed: int = 0) -> float:
    """Return the proxy A-distance (Ben-David et al. 2007): 2 if a linear classifier tells the domains apart, 0 if it cannot.

    It is 2 (1 - 2 ε), with the mean error ε on the domains when the classifier is trained on half of the pictures and measured
    on the other half; 0 if the error is above a half.

    Args:
        source: Features, (N, C).
        target: Features, (M, C).
        seed: Another seed draws other halves.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features, domain = np.concatenate([source, target]), np.repeat([0, 1], [len(source), len(target)])
    train, test, train_domain, test_domain = train_test_split(
        features, domain, test_size=0.5, random_state=seed, stratify=domain
    )
    classifier = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    error = 1 - balanced_accuracy_score(test_domain, classifier.fit(train, train_domain).predict(test))
    return float(max(0.0, 2 * (1 - 2 * error)))


def tsne(features: Array, seed: int = 0) -> Array:
    """Return a place on a map for each picture, (N, 2), that keeps neighbours together (van der Maaten & Hinton 2008)."""
    from sklearn.manifold import TSNE

    perplexity = min(30.0, max(1.0, (len(features) - 1) / 4))
    return np.asarray(TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(features), np.float64)


def _some(outcome: Outcome) -> tuple[Sequence[str], list[str]]:
    """Return the files and the names of the classes of at most so many pictures, taken evenly."""
    chosen = np.unique(np.linspace(0, len(outcome.files) - 1, min(len(outcome.files), _MOST)).round().astype(int))
    return [outcome.files[i] for i in chosen], [outcome.classes[int(outcome.labels[i])] for i in chosen]
