"""How epochs and steps belong together: against counting them one by one, and what a checkpoint says of it."""

from fractions import Fraction
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from finetune.behind import Behind
from finetune.errors import CheckpointError
from finetune.freezing import plan
from finetune.midway import Rest, rest_of_epoch
from finetune.pace import Pace, lengths_of
from finetune.place import Place
from finetune.timetable import build_timetable

QUIET = settings(deadline=None, derandomize=True, database=None, max_examples=200)
OPTIONS = {
    "freezing": "full",
    "schedule": "cosine",
    "warmup_epochs": 0.0,
    "warmup_steps": 0,
    "ramp_epochs": 0.5,
    "min_lr_ratio": 0.0,
    "step_milestones": None,
    "step_drop": 0.1,
}


def trainer(batches=8, max_epochs=6, max_steps=-1, accumulate=1, **more):
    options = {"num_training_batches": batches, "max_epochs": max_epochs, "max_steps": max_steps}
    return SimpleNamespace(**options, accumulate_grad_batches=accumulate, fast_dev_run=False, **more)


@QUIET
@given(st.dictionaries(st.integers(1, 6), st.integers(1, 5), max_size=3), st.integers(1, 5), st.integers(1, 9))
def test_it_is_what_counting_step_by_step_gives(changes, first, epochs):
    pace = Pace(((0, first), *sorted(changes.items())))
    place, made = Fraction(0), 0
    for epoch in range(epochs):
        length = first
        for start in sorted(changes):
            length = changes[start] if start <= epoch else length
        for _ in range(length):
            assert (pace.epochs_after(made), pace.steps_after(place)) == (place, made)
            place, made = place + Fraction(1, length), made + 1
        assert place == epoch + 1


@QUIET
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=5))
def test_what_resumes_leave_behind_adds_up(parts):
    """Parts of some epochs each, of one length; each part knows those before it by what a checkpoint of theirs says."""
    knots, place, made = (), 0, 0
    corners = [(0, 0)]
    for epochs, length in parts:
        times = build_timetable(trainer(batches=length, max_epochs=99), ["head"], OPTIONS, Place(place, 0, made), knots)
        place, made = place + epochs, made + epochs * length
        corners.append((place, made))
        knots = times.pace.until(Fraction(place))
        assert [(times.pace.epochs_after(m), times.pace.steps_after(p)) for p, m in corners] == corners


def test_a_schedule_of_accumulation_is_known_beforehand():
    schedule = GradientAccumulationScheduler({0: 4, 2: 1})
    assert lengths_of(trainer(batches=10, callbacks=[schedule])) == ((0, 3), (2, 10))
    assert lengths_of(trainer(batches=10, accumulate=4)) == ((0, 3),)
    assert lengths_of(trainer(batches=float("inf"))) is None
    # 3, 3, 10, 10, ... steps: 26 steps are 4 epochs, and the phases are planned for so many
    times = build_timetable(
        trainer(batches=10, max_epochs=-1, max_steps=26, callbacks=[schedule]),
        ["a", "head"],
        {**OPTIONS, "freezing": "gradual:2"},
    )
    assert (times.epochs, times.schedule.total, times.by_steps) == (4, 26, True)
    assert times.phases == plan("gradual:2", ["a", "head"], 4)


def test_a_run_of_so_many_steps_has_more_epochs_when_they_become_shorter():
    # 64 steps in 2 epochs of 32; 36 are left, which are 4.5 epochs of 8
    times = build_timetable(trainer(batches=8, max_epochs=-1, max_steps=100), ["head"], OPTIONS, Place(2, 0, 64))
    assert (times.epochs, times.by_steps, times.schedule.total) == (7, True, 100)
    assert times.factor_at("head", Place(2, 0, 64)) == pytest.approx((1 - 0.4257793) / 2)  # 64 % of 180 degrees: cos 115.2


@QUIET
@given(st.integers(1, 200), st.data())
def test_what_is_left_of_an_epoch_is_shown_once(images, data):
    batch = data.draw(st.integers(1, images))
    length = images // batch
    seen = data.draw(st.integers(0, images - 1))
    rest = rest_of_epoch(seen, images, batch, length)
    begin, left = rest.batches * batch + rest.shift, length - rest.batches
    assert begin == seen - rest.again
    assert begin + left * batch <= images, "no more than there are"
    assert images - (begin + left * batch) < batch, "what waits is less than a batch"
    assert left >= 1
    assert rest.again == 0 or images - seen < batch


def test_a_limited_epoch_goes_on_by_its_share():
    # 10 batches of 4 of 200 images, half of them done; now 10 batches of 16: 5 are left, from the 21st image on
    assert rest_of_epoch(20, 200, 16, 10, Fraction(1, 2)) == Rest(5, 20 - 5 * 16)


GOOD = {"knots": [[0, 1, 0], [5, 2, 20]], "lengths": [[0, 8], [3, 2]], "batches": 8}


def test_what_a_checkpoint_says_is_read():
    found = Behind.of({"finetune": {"pace": GOOD}})
    assert found == Behind(((Fraction(0), 0), (Fraction(5, 2), 20)), ((0, 8), (3, 2)), 8)
    assert Behind.of({}) == Behind.of({"finetune": {}}) == Behind()


@pytest.mark.parametrize(
    "said",
    [
        3,
        [],
        {},
        GOOD | {"knots": [[0, 0, 0]]},
        GOOD | {"knots": [[3, 1, 9], [1, 1, 2]]},
        GOOD | {"knots": [[0.5, 1, 0]]},
        GOOD | {"knots": None},
        GOOD | {"lengths": []},
        GOOD | {"lengths": [[1, 8]]},
        GOOD | {"lengths": [[0, 0]]},
        GOOD | {"lengths": [[0, 8, 9]]},
        GOOD | {"batches": "8"},
        GOOD | {"batches": -1},
    ],
)
def test_nonsense_in_a_checkpoint_is_named(said):
    with pytest.raises(CheckpointError, match=r"(?i)the checkpoint .*the steps of its epochs"):
        Behind.of({"finetune": {"pace": said}})
