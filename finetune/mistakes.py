"""A bounded choice of a model's mistakes to look at: the worst, and examples of the classes that it confuses most."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from finetune.outcomes import Outcome, read_outcome
from finetune.run_files import path_within
from finetune.scores import confused_pairs, worst_mistakes

VALIDATION = "predictions.val.csv"
_WORST, _PAIRS, _EXAMPLES = 32, 8, 4


class Mistake(NamedTuple):
    """A picture that was taken for another class.

    Attributes:
        path: The picture; None if it lies outside the root.
        file: Its name in the table of predictions.
        true: Its class.
        said: The class that it was taken for.
        sure: The probability of that class.
        right: The probability of its own class.
        why: Why it was chosen.
    """

    path: Path | None
    file: str
    true: str
    said: str
    sure: float
    right: float
    why: str


def mistakes_of(run: Path, root: str | None) -> list[Mistake]:
    """Return the mistakes to show of a run's best checkpoint on the validation split, empty without a table of predictions.

    Args:
        run: The run's folder.
        root: The folder that the pictures' names start from.
    """
    table = run / VALIDATION
    if not table.is_file():
        return []
    outcome = read_outcome(table)
    return [_mistake(outcome, index, why, root) for index, why in choose(outcome).items()]


def choose(outcome: Outcome, worst: int = _WORST, pairs: int = _PAIRS, examples: int = _EXAMPLES) -> dict[int, str]:
    """Return which pictures to show, each with the reason: at most `worst + pairs * examples`.

    Args:
        outcome: What was predicted.
        worst: How many of the wrong predictions with the highest probability.
        pairs: How many of the most frequent confusions of one class with another.
        examples: How many pictures of each of these, the surest first.
    """
    chosen = dict.fromkeys(worst_mistakes(outcome, worst), "worst mistakes")
    for true, said, times in confused_pairs(outcome, pairs):
        found = np.flatnonzero((outcome.labels == true) & (outcome.predicted == said))
        surest = found[np.argsort(-outcome.confidence[found], kind="stable")][:examples]
        name = f"{outcome.classes[true]} taken for {outcome.classes[said]} ({times} times)"
        chosen |= {int(index): name for index in surest if int(index) not in chosen}
    return chosen


def _mistake(outcome: Outcome, index: int, why: str, root: str | None) -> Mistake:
    row, label = outcome.probabilities[index], int(outcome.labels[index])
    said, file = int(row.argmax()), outcome.files[index]
    path = path_within(Path(root), file) if root else Path(file)
    return Mistake(path, file, outcome.classes[label], outcome.classes[said], float(row[said]), float(row[label]), why)
