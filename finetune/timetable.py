"""The timetable of a run: which stage trains when, and by what factor its learning rate is multiplied at each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
from tabulate import tabulate

from finetune.errors import ConfigError
from finetune.freezing import Phase, phase_at, plan, started
from finetune.schedules import Schedule, ramp

ENDLESS = 10_000  # epochs, where the length is not known yet or does not matter


@dataclass(frozen=True)
class Timetable:
    """Which stage trains when and by what factor: a pure function of the step.

    Attributes:
        phases: The freezing phases of the run.
        schedule: The factor that all training stages share.
        steps_per_epoch: Optimizer steps of an epoch.
        ramp_steps: Steps over which a newly unfrozen stage comes in.
        stages: Names of all stages in the order of the network, the head last.
        epochs: How many epochs the run has.
    """

    phases: tuple[Phase, ...]
    schedule: Schedule
    steps_per_epoch: int
    ramp_steps: int
    stages: tuple[str, ...]
    epochs: int = 0

    def factor(self, stage: str, step: int) -> float:
        """Return the factor of a stage's learning rate at a step, counted from 0; it is 0 while the stage is frozen."""
        if stage not in self.stages:
            return self.schedule(step)
        since = started(self.phases, stage, step // self.steps_per_epoch)
        if since is None:
            return 0.0
        begin = since * self.steps_per_epoch
        return self.schedule(step) * (ramp(step, begin, self.ramp_steps) if begin else 1.0)

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
        if warmup <= total / 2:
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


def build_timetable(trainer: L.Trainer, stages: Sequence[str], options: Mapping[str, Any]) -> Timetable:
    """Work out the timetable when training starts and the length of an epoch is known.

    Args:
        trainer: The trainer, whose training loader is ready.
        stages: Names of all stages in the order of the network, the head last.
        options: freezing, schedule, warmup_epochs, warmup_steps, ramp_epochs, min_lr_ratio, step_milestones, step_drop.

    Raises:
        ConfigError: If the run has no known length, or the policy has a phase that would never run.
    """
    batches = trainer.num_training_batches
    per_epoch = None if batches == float("inf") else -(-int(batches) // trainer.accumulate_grad_batches)
    epochs = run_length(trainer, per_epoch)
    phases = plan(options["freezing"], stages, epochs)
    if per_epoch is None:
        if len(phases) > 1 or trainer.max_steps <= 0:
            raise ConfigError("A loader without length needs trainer.max_steps and a freezing policy of one phase.")
        per_epoch, epochs = trainer.max_steps, 1
    total = per_epoch * epochs if trainer.max_steps <= 0 else min(per_epoch * epochs, trainer.max_steps)
    schedule = Schedule(
        options["schedule"],
        total=total,
        warmup=min(options["warmup_steps"] or round(options["warmup_epochs"] * per_epoch), total),
        floor=options["min_lr_ratio"],
        milestones=options["step_milestones"] or (1 / 3, 2 / 3),
        drop=options["step_drop"],
    )
    return Timetable(phases, schedule, per_epoch, max(1, round(options["ramp_epochs"] * per_epoch)), tuple(stages), epochs)
