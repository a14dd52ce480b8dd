"""The timetable against tables written by hand."""

from types import SimpleNamespace

import pytest
import torch

from finetune.errors import ConfigError
from finetune.freezing import plan
from finetune.schedules import Schedule
from finetune.timetable import Timetable, build_timetable, run_length

STAGES = ["stem", "layer1", "head"]
OPTIONS = {
    "freezing": "full",
    "schedule": "flat",
    "warmup_epochs": 0.0,
    "warmup_steps": 0,
    "ramp_epochs": 0.5,
    "min_lr_ratio": 0.0,
    "step_milestones": None,
    "step_drop": 0.1,
}


def trainer(batches=10, max_epochs=3, max_steps=-1, accumulate=1, fast_dev_run=False):
    """What a Lightning trainer says of its run."""
    return SimpleNamespace(
        num_training_batches=batches,
        max_epochs=max_epochs,
        max_steps=max_steps,
        accumulate_grad_batches=accumulate,
        fast_dev_run=fast_dev_run,
    )


def test_timetable_by_hand():
    # 3 epochs of 4 steps: head, then layer1 joins at step 4, stem at step 8, each over 2 steps; the rate drops in the middle
    phases = plan("gradual", STAGES, 3)
    schedule = Schedule("step", total=12, warmup=2, milestones=[0.5], drop=0.1)
    times = Timetable(phases, schedule, steps_per_epoch=4, ramp_steps=2, stages=tuple(STAGES))
    assert [round(times.factor("head", s), 6) for s in range(12)] == [0.5, 1, 1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]
    assert [round(times.factor("layer1", s), 6) for s in range(12)] == [0, 0, 0, 0, 0.5, 1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]
    assert [round(times.factor("stem", s), 6) for s in range(12)] == [0] * 8 + [0.05, 0.1, 0.1, 0.1]
    assert times.announce(1) == "Epoch 2: phase 2 of 3 begins: layer1, head train."


def test_a_stage_that_is_frozen_again_ramps_up_again():
    phases = plan([{"train": "full", "epochs": 1}, {"train": "head", "epochs": 1}, {"train": "full"}], STAGES, 3)
    times = Timetable(phases, Schedule("flat", total=12), steps_per_epoch=4, ramp_steps=4, stages=tuple(STAGES))
    assert [times.factor("stem", s) for s in range(12)] == [1, 1, 1, 1, 0, 0, 0, 0, 0.25, 0.5, 0.75, 1]
    assert [times.factor("head", s) for s in range(12)] == [1] * 12
    assert [times.factor("a layer of the user", s) for s in range(12)] == [1] * 12


def test_what_never_trains_and_what_is_printed():
    groups = [
        {"stage": "stem", "params": [torch.zeros(3, 4), torch.zeros(3)], "lr": 0.0, "initial_lr": 0.025},
        {"stage": "layer1", "params": [torch.zeros(1000)], "lr": 0.05},
        {"stage": "layer1", "params": [torch.zeros(500)], "lr": 0.05},
        {"stage": "head", "params": [torch.zeros(2, 5)], "lr": 0.1},
        {"stage": "mine", "params": [torch.zeros(1)], "lr": 0.1},
    ]
    times = Timetable(plan("lp_ft:2", STAGES, 5), Schedule("flat", total=5), 1, 1, tuple(STAGES))
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in times.table(groups).splitlines()]
    assert rows[1] == ["stage", "parameters", "lr", "epochs 1-2", "epochs 3-5"]
    assert rows[3:] == [
        ["stem", "15", "0.025", "frozen", "trains"],
        ["layer1", "1,500", "0.05", "frozen", "trains"],
        ["head", "10", "0.1", "trains", "trains"],
        ["mine", "1", "0.1", "trains", "trains"],
    ]
    never = {"full": [], "head": ["stem", "layer1"], "last:1": ["stem"], "gradual": [], "surgical:stem": ["layer1"], "norm": []}
    for policy, expected in never.items():
        times = Timetable(plan(policy, STAGES, 6), Schedule("flat", total=6), 1, 1, tuple(STAGES))
        assert times.never_trained(["stem", "layer1"]) == expected, policy


@pytest.mark.parametrize(
    ("options", "per_epoch", "expected"),
    [
        ({"max_epochs": 7}, 10, 7),
        ({"max_epochs": -1, "max_steps": 25}, 10, 3),
        ({"max_epochs": 2, "max_steps": 25}, 10, 2),
        ({"max_epochs": 9, "max_steps": 25}, 10, 3),
        ({"max_epochs": 9, "max_steps": 25}, None, 9),
    ],
)
def test_length_of_the_run_in_epochs(options, per_epoch, expected):
    assert run_length(trainer(**options), per_epoch) == expected


@pytest.mark.parametrize(
    ("run", "options", "per_epoch", "total", "warmup"),
    [
        # 10 batches, 3 epochs; 4 batches per step: 3 steps per epoch, as the last one is taken with what is there
        ({}, {"warmup_epochs": 0.5}, 10, 30, 5),
        ({"accumulate": 4}, {"warmup_steps": 2}, 3, 9, 2),
        ({"max_steps": 25}, {"warmup_epochs": 99}, 10, 25, 25),
        ({"max_epochs": -1, "max_steps": 12}, {}, 10, 12, 0),
        ({"batches": float("inf"), "max_epochs": -1, "max_steps": 12}, {"warmup_steps": 3}, 12, 12, 3),
    ],
)
def test_steps_of_the_run(run, options, per_epoch, total, warmup):
    times = build_timetable(trainer(**run), STAGES, {**OPTIONS, **options})
    assert (times.steps_per_epoch, times.schedule.total, times.schedule.warmup) == (per_epoch, total, warmup)
    assert times.ramp_steps == {10: 5, 3: 2, 12: 6}[per_epoch]  # half an epoch


def test_a_loader_without_length_has_no_epochs_to_speak_of():
    for run, policy in (({"max_epochs": 3}, "full"), ({"max_epochs": 3, "max_steps": 12}, "lp_ft:1")):
        with pytest.raises(ConfigError, match=r"needs trainer\.max_steps and a freezing policy of one phase"):
            build_timetable(trainer(batches=float("inf"), **run), STAGES, {**OPTIONS, "freezing": policy})


@pytest.mark.parametrize(("warmup", "said"), [(5, False), (6, True)])
def test_a_warm_up_that_takes_most_of_the_run_is_said(warmup, said):
    times = Timetable(plan("full", STAGES, 5), Schedule("cosine", total=10, warmup=warmup), 2, 1, tuple(STAGES))
    assert (f"rises in {warmup} of the run's 10 steps" in times.table([])) == said
