"""Freezing policies against tables written by hand."""

import pytest

from finetune.errors import ConfigError
from finetune.freezing import phase_at, plan, started

STAGES = ["stem", "layer1", "layer2", "head"]


def table(policy, epochs):
    return [(p.start, p.end, " ".join(p.train), p.norms) for p in plan(policy, STAGES, epochs)]


@pytest.mark.parametrize(
    ("policy", "epochs", "expected"),
    [
        ("full", 3, [(0, 3, "stem layer1 layer2 head", False)]),
        ("head", 3, [(0, 3, "head", False)]),
        ("last:2", 3, [(0, 3, "layer1 layer2 head", False)]),
        ("norm", 3, [(0, 3, "head", True)]),
        ("surgical:stem", 3, [(0, 3, "stem head", False)]),
        ("surgical:layer2,stem", 3, [(0, 3, "stem layer2 head", False)]),
        ("lp_ft", 10, [(0, 3, "head", False), (3, 10, "stem layer1 layer2 head", False)]),
        ("lp_ft:0.5", 4, [(0, 2, "head", False), (2, 4, "stem layer1 layer2 head", False)]),
        ("lp_ft:1", 4, [(0, 1, "head", False), (1, 4, "stem layer1 layer2 head", False)]),
        ("lp_ft", 2, [(0, 1, "head", False), (1, 2, "stem layer1 layer2 head", False)]),
        (
            "gradual:2",
            9,
            [
                (0, 2, "head", False),
                (2, 4, "layer2 head", False),
                (4, 6, "layer1 layer2 head", False),
                (6, 9, "stem layer1 layer2 head", False),
            ],
        ),
        (
            [{"train": "head", "share": 0.3}, {"train": "last:1", "epochs": 2}, {"train": ["stem", "head"]}],
            10,
            [(0, 3, "head", False), (3, 5, "layer2 head", False), (5, 10, "stem head", False)],
        ),
        ([{"train": "layer1"}], 2, [(0, 2, "layer1", False)]),
    ],
)
def test_phases(policy, epochs, expected):
    assert table(policy, epochs) == expected


@pytest.mark.parametrize(
    ("policy", "epochs", "says"),
    [
        ("gradul", 4, "Did you mean 'gradual'"),
        ("last", 4, "needs an argument"),
        ("last:0", 4, "at least 1"),
        ("last:4", 4, "more stages than there are"),
        ("surgical:layr1", 4, "Did you mean 'layer1'"),
        ("lp_ft:1.5", 4, "share between 0 and 1"),
        ("lp_ft", 1, "at least 2"),
        ("gradual", 3, "4 phases"),
        ("gradual:3", 8, "at least 10"),
        ([], 4, "nothing would train"),
        ([{"train": []}], 4, "trains nothing"),
        ([{"train": "head", "epoch": 3}], 4, "Did you mean 'epochs'"),
        ([{"train": "head"}, {"train": "full"}], 4, "only the last may go without"),
        ([{"train": "head", "epochs": 4}, {"train": "full"}], 4, "at least 5"),
    ],
)
def test_mistakes(policy, epochs, says):
    with pytest.raises(ConfigError, match=says):
        plan(policy, STAGES, epochs)


def test_phases_cover_every_epoch_whatever_the_length():
    policy = [{"train": "head", "share": 0.2}, {"train": "last:1", "share": 0.3}, {"train": "full"}]
    for epochs in range(3, 60):
        phases = plan(policy, STAGES, epochs)
        covered = [phase_at(phases, epoch) for epoch in range(epochs)]
        assert [p.start for p in phases] == sorted({p.start for p in covered})
        assert phases[0].start == 0
        assert phases[-1].end == epochs


def test_started_is_the_epoch_since_which_a_stage_trains_without_a_break():
    policy = [{"train": "full", "epochs": 2}, {"train": "head", "epochs": 2}, {"train": "full"}]
    phases = plan(policy, STAGES, 6)
    assert [started(phases, "stem", epoch) for epoch in range(6)] == [0, 0, None, None, 4, 4]
    assert [started(phases, "head", epoch) for epoch in range(6)] == [0] * 6
