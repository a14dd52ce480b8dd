"""The exceptions of the toolkit and the hint that goes with a misspelt name.

Every one of them is a user's mistake that a message can mend: it says what was expected, what was found and what to do.
The command prints the message without a traceback.

    FinetuneError
    ├── ConfigError        an option, or a combination of options, that cannot work
    ├── DataError          a folder or a picture
    ├── WeightsError       weights that are missing, do not fit or cannot be read safely
    ├── CheckpointError    a checkpoint that is missing, unreadable, cannot be written, or contradicts the options
    └── TrainingError      training that cannot go on, such as a loss that is not finite
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FinetuneError(Exception):
    """Base of all errors that the toolkit raises on purpose."""


class ConfigError(FinetuneError):
    """An option, or a combination of options, that cannot work."""


class DataError(FinetuneError):
    """A folder or a picture that cannot be used."""


class WeightsError(FinetuneError):
    """Weights that are missing, do not fit or cannot be read safely."""


class CheckpointError(FinetuneError):
    """A checkpoint that is missing, unreadable, cannot be written, or contradicts the options."""


class TrainingError(FinetuneError):
    """Training that cannot go on, such as a loss that is not finite."""


def own_error(error: BaseException | None) -> FinetuneError | None:
    """Return the error of ours that a library wrapped into one of its own, or None.

    >>> own_error(ValueError("plain")) is None
    True
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, FinetuneError):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Return a sentence naming the nearest option, or an empty string if none is near.

    Args:
        word: What the user wrote.
        options: What would have been accepted.

    >>> did_you_mean("gradul", ["full", "gradual", "head"])
    " Did you mean 'gradual'?"
    >>> did_you_mean("xyz", ["full", "head"])
    ''
    """
    by_lower = {option.lower(): option for option in options}
    near = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return f" Did you mean '{by_lower[near[0]]}'?" if near else ""
