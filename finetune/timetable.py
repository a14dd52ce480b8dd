"""The timetable of a run: which stage trains when, and by what factor its learning rate is multiplied at each step.

Progress is counted in epochs and the share of the present one, never in steps since the start: epochs that are behind may have
had more or fewer of them. Only what the user gave in steps (warmup_steps, max_steps) is counted in the steps that were made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any

import lightning as L
from tabulate import tabulate

from finetune.errors import ConfigError
from finetune.freezing import Phase, phase_at, plan, started
from finetune.pace import Lengths, Pace, lengths_of
from finetune.place import Place
from finetune.schedules import Schedule, ramp

ENDLESS = 10_000  # epochs, where the length is not known yet or does not matter


@dataclass(frozen=True)
class Timetable:
    """Which stage trains when and by what factor: a pure function of the place in the run.

    Attributes:
        phases: The freezing phases of the run.
        schedule: The factor that all training stages share, over the steps of a run whose epochs all have `steps_per_epoch`;
            over the steps that were made if `by_steps`.
        steps_per_epoch: Optimizer steps of the present epoch.
        ramp_steps: Steps over which a newly unfrozen stage comes in.
        stages: Names of all stages in the order of the network, the head last.
        epochs: How many epochs the run has.
        warmup_steps: Steps of linear warm-up in steps that were made, or 0 if its length was given in epochs.
        by_steps: Whether it is a number of steps that ends the run.
        pace: How epochs and steps of the run belong together; None where a loader has no length.
    """

    phases: tuple[Phase, ...]
    schedule: Schedule
    steps_per_epoch: int
    ramp_steps: int
    stages: tuple[str, ...]
    epochs: int = 0
    warmup_steps: int = 0
    by_steps: bool = False
    pace: Pace | None = None

    def factor(self, stage: str, step: int) -> float:
        """Return the factor of a stage's rate at a step, counted from 0, of a run whose epochs are all like the present one."""
        return self.factor_at(stage, Place(*divmod(step, self.steps_per_epoch), step))

    def factor_at(self, stage: str, place: Place) -> float:
        """Return the factor of a stage's learning rate at a place in the run; it is 0 while the stage is frozen."""
        if stage not in self.stages:
            return self._shared(place)
        since = started(self.phases, stage, place.epoch)
        if since is None:
            return 0.0
        joined = ramp(self._steps(place, since), 0, self.ramp_steps) if since else 1.0
        return self._shared(place) * joined

    def _shared(self, place: Place) -> float:
        if place.made < self.warmup_steps:
            return (place.made + 1) / self.warmup_steps
        step = place.made if self.by_steps else self._steps(place)
        return self.schedule(max(step, self.schedule.warmup) if self.warmup_steps else step)

    def _steps(self, place: Place, since: int = 0) -> float:
        """Return the steps from the beginning of an epoch to a place, were all epochs like the present one."""
        steps = (place.epoch - since) * self.steps_per_epoch + place.done
        return steps if isinstance(steps, int) else float(steps)

    def since_phase(self, place: Place) -> float:
        """Return how many steps of the present length the phase of a place is old."""
        return self._steps(place, phase_at(self.phases, place.epoch).start)

    def share(self, place: Place) -> float:
        """Return which share of the run is done at a place."""
        return min(1.0, self._steps(place) / max(1, self.epochs * self.steps_per_epoch))

    def table(self, groups: Sequence[Mapping[str, Any]]) -> str:
        """Return the table that is printed before training: stage, parameters, learning rate, what trains in which epochs.

        Args:
            groups: The optimizer's groups, with `initial_lr` where a scheduler has set it.
        """
        rows = []
        for stage, count, rate in stage_rates(groups):
            rows.append([stage, f"{count:,}", f"{rate:.3g}", *(self._state(stage, phase) for phase in self.phases)])
        spans = [_span(phase) for phase in self.phases]
        align = ("left", "right", "right", *("left" for _ in spans))
        found = tabulate(rows, headers=["stage", "parameters", "lr", *spans], colalign=align, disable_numparse=True)
        return f"What trains when:\n{found}{self._long_warmup()}"

    def _long_warmup(self) -> str:
        warmup, total = self.schedule.warmup, self.schedule.total
        if warmup <= total / 2 or (self.pace is not None and len(self.pace.knots) > 1):  # or other steps are behind
            return ""
        return (
            f"\nwarning: the learning rate rises in {warmup} of the run's {total} steps and hardly gets to work. Lower "
            "--model.warmup_epochs, or raise --trainer.max_epochs."
        )

    def _state(self, stage: str, phase: Phase) -> str:
        if stage in phase.train or stage not in self.stages:
            return "trains"
        return "norms train" if phase.norms else "frozen"

    def announce(self, epoch: int) -> str:
        """Return the line that is printed when a phase begins."""
        phase = phase_at(self.phases, epoch)
        number = self.phases.index(phase) + 1
        return (
            f"Epoch {epoch + 1}: phase {number} of {len(self.phases)} begins: {', '.join(phase.train)}"
            f"{' and all normalisation layers' if phase.norms else ''} train."
        )

    def first_epoch(self, stage: str) -> int | None:
        """Return the epoch in which a stage begins to train, counted from 0, or None if no phase trains it."""
        if stage not in self.stages:
            return 0
        return next((phase.start for phase in self.phases if stage in phase.train), None)

    def never_trained(self, stages: Sequence[str]) -> list[str]:
        """Return those of the stages that no phase trains."""
        return [s for s in stages if all(started((phase,), s, phase.start) is None for phase in self.phases)]


def stage_rates(groups: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, float]]:
    """Return name, number of parameters and learning rate before any schedule of each stage in an optimizer's groups.

    Args:
        groups: The groups, with `initial_lr` where a scheduler has set it; those without a stage are left out.
    """
    rows = []
    for stage in dict.fromkeys(group["stage"] for group in groups if "stage" in group):
        own = [group for group in groups if group.get("stage") == stage]
        rows.append((stage, sum(p.numel() for group in own for p in group["params"]), own[0].get("initial_lr", own[0]["lr"])))
    return rows


def _span(phase: Phase) -> str:
    if phase.end >= ENDLESS:
        return f"from epoch {phase.start + 1}"
    return f"epoch {phase.end}" if phase.end - phase.start == 1 else f"epochs {phase.start + 1}-{phase.end}"


def run_length(trainer: L.Trainer, steps_per_epoch: int | None = None) -> int:
    """Return the number of epochs that a trainer will run.

    Args:
        trainer: The trainer.
        steps_per_epoch: Optimizer steps of an epoch; None before the loader is known, or if it has no length.

    Raises:
        ConfigError: If the trainer does not say.
    """
    if getattr(trainer, "fast_dev_run", False):  # one batch of the first phase, whatever the policy
        return ENDLESS
    by_steps = trainer.max_steps > 0
    limits = [trainer.max_epochs] if (trainer.max_epochs or -1) > 0 else []
    if by_steps:
        limits.append(-(-trainer.max_steps // steps_per_epoch) if steps_per_epoch else ENDLESS)
    if not limits:
        raise ConfigError(
            "The learning-rate schedule and the freezing phases need the length of the run: set trainer.max_epochs (or "
            "max_steps with a loader of known length); max_time alone is not enough."
        )
    return min(int(limit) for limit in limits if limit)


def build_timetable(
    trainer: L.Trainer,
    stages: Sequence[str],
    options: Mapping[str, Any],
    place: Place | None = None,
    knots: Sequence[tuple[Fraction, int]] = (),
) -> Timetable:
    """Work out the timetable when training starts, or the length of an epoch changes, and that length is known.

    Args:
        trainer: The trainer, whose training loader is ready.
        stages: Names of all stages in the order of the network, the head last.
        options: freezing, schedule, warmup_epochs, warmup_steps, ramp_epochs, min_lr_ratio, step_milestones, step_drop.
        place: Where training stands, if not at the start.
        knots: Up to where in the run epochs had other lengths, see `Pace`.

    Raises:
        ConfigError: If the run has no known length, or the policy has a phase that would never run.
    """
    place = place or Place()
    lengths = lengths_of(trainer)
    if lengths is None:
        return _endless(trainer, stages, options)
    per_epoch = Pace(lengths).length(place.epoch)
    pace = Pace(lengths, _behind(place, per_epoch, lengths, knots))
    epochs, by_steps = run_length(trainer, per_epoch), False
    if trainer.max_steps > 0 and not getattr(trainer, "fast_dev_run", False):
        reached = max(place.epoch + 1, ceil(pace.epochs_after(trainer.max_steps)))
        limit = trainer.max_epochs or -1
        epochs = min(reached, limit) if limit > 0 else reached
    if trainer.max_steps > 0:
        by_steps = (trainer.max_epochs or -1) <= 0 or trainer.max_steps < pace.steps_after(epochs)
    total = trainer.max_steps if by_steps else per_epoch * epochs
    given = min(options["warmup_steps"], total if by_steps else ceil(pace.steps_after(epochs)))
    if by_steps:
        warmup = given or round(float(pace.steps_after(options["warmup_epochs"])))
    else:
        warmup = pace.epochs_after(given) * per_epoch if given else round(options["warmup_epochs"] * per_epoch)
    return Timetable(
        plan(options["freezing"], stages, epochs),
        _schedule(options, total, int(warmup) if warmup == int(warmup) else float(warmup)),
        per_epoch,
        max(1, round(options["ramp_epochs"] * per_epoch)),
        tuple(stages),
        epochs,
        given,
        by_steps,
        pace,
    )


def _endless(trainer: L.Trainer, stages: Sequence[str], options: Mapping[str, Any]) -> Timetable:
    """Return the timetable of a run whose loader has no length: its steps are one long epoch."""
    epochs = run_length(trainer)
    if trainer.max_steps <= 0 or len(plan(options["freezing"], stages, epochs)) > 1:
        raise ConfigError("A loader without length needs trainer.max_steps and a freezing policy of one phase.")
    steps = trainer.max_steps
    warmup = options["warmup_steps"] or round(options["warmup_epochs"] * steps)
    return Timetable(
        plan(options["freezing"], stages, epochs),
        _schedule(options, steps, warmup),
        steps,
        max(1, round(options["ramp_epochs"] * steps)),
        tuple(stages),
        epochs=1,
        by_steps=True,
    )


def _schedule(options: Mapping[str, Any], total: int, warmup: float) -> Schedule:
    return Schedule(
        options["schedule"],
        total=total,
        warmup=min(warmup, total),
        floor=options["min_lr_ratio"],
        milestones=options["step_milestones"] or (1 / 3, 2 / 3),
        drop=options["step_drop"],
    )


def _behind(
    place: Place, per_epoch: int, lengths: Lengths, knots: Sequence[tuple[Fraction, int]]
) -> tuple[tuple[Fraction, int], ...]:
    """Return the knots of what is behind a place, the place itself the last of them."""
    here = (place.epoch + Fraction(place.done) / per_epoch, place.made)
    before = tuple(knot for knot in knots if knot[0] < here[0] and knot[1] <= here[1]) or ((Fraction(0), 0),)
    as_now = Pace(lengths, before).steps_after(here[0]) == here[1]  # nothing has changed
    return before if as_now else (*before, here)
