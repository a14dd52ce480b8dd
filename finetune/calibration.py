"""Temperature scaling (Guo et al. 2017): one number that makes a model as sure of itself as it is right."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from finetune.errors import CheckpointError
from finetune.files import write_atomically
from finetune.outcomes import Floats, Outcome

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
    try:
        content = json.loads(path.read_text())
        temperature = float(content["temperature"])
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature {temperature}")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} does not hold a temperature: {error!r}. Remove it, or make it anew with: "
            "resnet-finetune evaluate --calibrate"
        ) from error
    return temperature if step in (None, content.get("step")) else 1.0
