"""Learning-rate schedules as factors of the step: pure functions, so that every group keeps its ratio to the others.

A factor multiplies the rate that stands in an optimizer group, it never replaces it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

ScheduleName = Literal["cosine", "flat", "step"]


@dataclass(frozen=True)
class Schedule:
    """Warm-up, then cosine, flat or step.

    Attributes:
        name: `cosine` (Loshchilov & Hutter 2017) falls from 1 to `floor` at the end; `flat` stays at 1; `step` is multiplied by
            `drop` at each of `milestones`.
        total: Optimizer steps of the run.
        warmup: Steps of linear warm-up; step 0 has the factor 1 / warmup.
        floor: The factor at the end of `cosine`.
        milestones: Where `step` drops, as shares of the run.
        drop: By what `step` drops.
    """

    name: ScheduleName
    total: int
    warmup: float = 0
    floor: float = 0.0
    milestones: Sequence[float] = (1 / 3, 2 / 3)
    drop: float = 0.1

    def __call__(self, step: float) -> float:
        """Return the factor of a step, counted from 0.

        >>> [round(Schedule("cosine", total=6, warmup=2)(step), 3) for step in range(6)]
        [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
        """
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.name == "flat":
            return 1.0
        if self.name == "step":
            passed = sum(step >= round(share * self.total) for share in self.milestones)
            return float(self.drop**passed)
        progress = min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * progress)) / 2


def ramp(step: float, start: float, length: int) -> float:
    """Return the factor that brings a newly unfrozen stage in: linear from its first step to 1 after `length` steps.

    >>> [ramp(step, start=4, length=2) for step in (4, 5, 6)]
    [0.5, 1.0, 1.0]
    """
    return 1.0 if step - start >= length else (step - start + 1) / length
