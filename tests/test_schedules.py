"""Schedules against values worked out by hand."""

import pytest

from finetune.schedules import Schedule, ramp


def test_cosine_with_warmup_and_floor():
    schedule = Schedule("cosine", total=10, warmup=2, floor=0.2)
    assert schedule(0) == 0.5
    assert schedule(1) == schedule(2) == 1.0
    assert schedule(6) == pytest.approx(0.6)  # half way between 1 and 0.2
    assert schedule(10) == pytest.approx(0.2)
    assert schedule(99) == pytest.approx(0.2)


def test_flat_and_step():
    assert [Schedule("flat", total=4, warmup=2)(step) for step in range(4)] == [0.5, 1, 1, 1]
    drops = Schedule("step", total=9, milestones=(1 / 3, 2 / 3), drop=0.1)
    assert [round(drops(step), 4) for step in range(9)] == [1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01]


def test_warmup_of_the_whole_run():
    schedule = Schedule("cosine", total=4, warmup=4)
    assert [schedule(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_ramp_starts_above_zero_and_ends_at_one():
    assert [ramp(step, start=10, length=4) for step in range(10, 16)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert ramp(10, start=10, length=1) == 1
