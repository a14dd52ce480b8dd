"""Temperature scaling (Guo et al. 2017): one number that makes a model as sure of itself as it is right."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from msgspec import Meta

from finetune.files import write_atomically
from finetune.outcomes import Floats, Outcome
from finetune.schema import read_json

Temperature = Annotated[float, Meta(gt=0, le=1e6)]
"""What logits may be divided by, as a file says."""


@dataclass
class Calibration:
    """What `store_temperature` writes: the temperature, and the optimizer steps of its checkpoint."""

    temperature: Temperature
    step: int | None = None


_LIMIT = 20.0  # where few pictures are all right, or all wrong, the best temperature would be 0 or infinite


def scaled(outcome: Outcome, temperature: float) -> Outcome:
    """Return the outcome with the logits divided by a temperature; the predicted classes stay the same."""
    logits = _log(outcome) / temperature
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return Outcome(outcome.files, outcome.labels, weights / weights.sum(1, keepdims=True), outcome.classes)


def fit_temperature(outcome: Outcome) -> float:
    """Return the temperature with the lowest negative log-likelihood, between 1/20 and 20.

    The likelihood is log-concave in the inverse of the temperature, so there is one best value.

    Args:
        outcome: What the model says of pictures that it was not trained on.
    """
    from scipy.optimize import minimize_scalar

    logits = _log(outcome)
    rows = np.arange(len(outcome))

    def loss(log_temperature: float) -> float:
        heated = logits / np.exp(log_temperature)
        top = heated.max(1)
        return float((np.log(np.exp(heated - top[:, None]).sum(1)) + top - heated[rows, outcome.labels]).mean())

    bound = np.log(_LIMIT)
    found = minimize_scalar(loss, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def _log(outcome: Outcome) -> Floats:
    return np.log(np.clip(outcome.probabilities, np.finfo(np.float64).tiny, None))


def calibration_file(checkpoint: Path) -> Path:
    """Return where the temperature of a checkpoint is stored: beside it."""
    return checkpoint.with_suffix(".calibration.json")


def store_temperature(checkpoint: Path, temperature: float, step: int, details: dict[str, float | int | str]) -> Path:
    """Store the temperature of a checkpoint beside it.

    Args:
        checkpoint: The checkpoint.
        temperature: Its temperature.
        step: Optimizer steps of the checkpoint, by which it is told from another one that takes its place.
        details: What else is worth knowing.
    """
    path = calibration_file(checkpoint)
    write_atomically(path, json.dumps({"temperature": temperature, "step": step, **details}, indent=2) + "\n")
    return path


def stored_temperature(checkpoint: Path, step: int | None = None) -> float:
    """Return the temperature that is stored for a checkpoint; 1 if none is.

    Args:
        checkpoint: The checkpoint.
        step: Its optimizer steps; a temperature of another step is that of a checkpoint that was here before.

    Raises:
        CheckpointError: If what is stored cannot be read.
    """
    path = calibration_file(checkpoint)
    if not path.is_file():
        return 1.0
    advice = "Remove it, or make it anew with: resnet-finetune evaluate --calibrate"
    found = read_json(path, Calibration, "a temperature", advice=advice)
    return found.temperature if step in (None, found.step) else 1.0
