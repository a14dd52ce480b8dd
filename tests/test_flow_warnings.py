"""What is said about gradients: at which limits, which stage, and how often."""

import pytest
from torch import nn

from finetune.flow_warnings import EXPLODING, LASTING, TOO_FAR, VANISHING, FlowWarnings, Rate, why_it_rests
from finetune.stage_flow import Flow


def flow(grad_norm=1.0, update_ratio=1e-3, nonfinite=0, weight_norm=1.0):
    return Flow(grad_norm, weight_norm, update_ratio, 0.0, 0.0, nonfinite, grad_norm / weight_norm)


def said(warnings, times=1, **flows):
    return [text for step in range(times) for text in warnings.judge(step, {"frozen": Flow(), **flows})]


@pytest.mark.parametrize(
    ("stem", "word"),
    [
        ({}, None),
        ({"grad_norm": 2 * VANISHING}, None),
        ({"grad_norm": 0.5 * VANISHING}, "gradients vanish"),
        ({"grad_norm": 0.0}, "gradients vanish"),
        ({"grad_norm": 0.5 * EXPLODING}, None),
        ({"grad_norm": 2 * EXPLODING}, "gradients explode"),
        ({"update_ratio": 0.9 * TOO_FAR}, None),
        ({"update_ratio": 1.1 * TOO_FAR}, "the weights explode"),
        ({"update_ratio": None}, None),
        ({"grad_norm": float("nan"), "nonfinite": 7}, "NaN or infinite: stem (7 values)"),
        ({"grad_norm": float("inf"), "nonfinite": 1}, "NaN or infinite: stem (1 values)"),
    ],
)
def test_limits(stem, word):
    texts = said(FlowWarnings(), times=LASTING, stem=flow(**stem), layer1=flow(), head=flow())
    assert [word in text for text in texts] == ([True] if word else [])
    assert all("stem" in text and "layer1" not in text for text in texts)


def test_the_rate_is_named_and_what_to_type():
    """With Adam the ratio is in proportion to the rate: a hundredth of the norm, at the highest rate, is the most it may be."""
    flows = {"stem": flow(update_ratio=0.5), "layer1": flow(update_ratio=0.05), "head": flow(update_ratio=0.003)}
    rates = {"stem": Rate(0.2, 0.2), "layer1": Rate(0.2, 0.2), "head": Rate(0.02, 0.02)}
    (text,) = FlowWarnings(lr=0.02).judge(0, flows, rates)
    assert "stem by 0.5 times (learning rate 0.2) their own norm" in text
    assert "layer1" not in text
    assert "--model.lr 2e-04 (it is 0.02" in text  # 0.02 * 0.01 / 0.5 = 4e-4
    assert "resnet-finetune lr-find" in text
    warming_up = {"stem": Rate(0.02, 0.2)}  # at the peak it would be 5 times the norm: 0.02 * 0.01 / 5 = 4e-5
    assert "--model.lr 2e-05" in FlowWarnings(lr=0.02).judge(0, flows, warming_up)[0]
    assert "lower --model.lr" in FlowWarnings().judge(0, flows, rates)[0]  # the rate is not known


def test_what_starts_from_random_values_may_move_by_its_own_norm_at_first():
    warnings = FlowWarnings(lr=1e-3, new={"stem", "head"})
    assert not warnings.judge(0, {"stem": flow(update_ratio=0.5), "head": flow()})
    warnings = FlowWarnings(lr=1e-3)
    for step, ratio in enumerate([None, 1.0, 0.5, 0.33, 0.25]):  # from zero, with Adam
        assert not warnings.judge(step, {"stem": flow(), "head": flow(update_ratio=ratio)})
    assert warnings.judge(516, {"stem": flow(), "head": flow(update_ratio=0.2)}, {}, since=4) == []  # a phase of its own
    assert "head by 0.2 times" in warnings.judge(516, {"stem": flow(), "head": flow(update_ratio=0.2)}, {}, since=516)[0]


@pytest.mark.parametrize(
    ("loss", "classes", "told"),
    [
        (6.8, 10, False),  # 3 * ln 10 = 6.9
        (7.0, 10, True),
        (5.6e7, 10, True),
        (3.2, 2, False),  # of two classes 3 * ln 3 = 3.3
        (3.4, 2, True),
        (float("nan"), 10, False),  # which stops the run
    ],
)
def test_a_loss_far_above_that_of_guessing(loss, classes, told):
    warnings = FlowWarnings(lr=0.02)
    texts = warnings.judge_loss(1, loss, classes)
    assert len(texts) == told
    assert all(f"guessing among {classes} classes" in text and "--model.lr 2e-03" in text for text in texts)
    assert not warnings.judge_loss(2, loss, classes)


def test_the_rate_that_was_suggested_by_the_update_is_suggested_for_the_loss():
    warnings = FlowWarnings(lr=0.02)
    warnings.judge(0, {"stem": flow(update_ratio=0.5)}, {"stem": Rate(0.2, 0.2)})
    assert "--model.lr 2e-04" in warnings.judge_loss(1, 1e6, 10)[0]


def test_small_everywhere_is_the_end_of_a_good_run():
    assert not said(FlowWarnings(), times=9, stem=flow(1e-12), head=flow(1e-11))
    assert not said(FlowWarnings(), times=9, stem=flow(0.0), head=flow(0.0))


def test_each_fault_once_per_stage():
    warnings = FlowWarnings()
    bad = flow(update_ratio=9.0)
    assert len(said(warnings, times=5, stem=bad, head=flow())) == 1
    (text,) = said(warnings, stem=bad, head=bad)
    assert "head by 9 times" in text
    assert "stem" not in text
    assert "explode" in said(warnings, stem=flow(1e9), head=flow())[0]  # another fault of the same stage


def test_a_fault_that_passes_is_none():
    warnings = FlowWarnings()
    dead, alive = flow(0.0), flow()
    for stem in [dead, dead, alive] * 4:  # as behind a new head whose weights are zero
        assert not said(warnings, stem=stem, head=flow())
    assert said(warnings, times=LASTING, stem=dead, head=flow())


def test_infinite_gradients_belong_to_finding_the_scale_of_the_loss():
    bad = flow(float("inf"), nonfinite=3)
    assert not said(FlowWarnings(scaled=True), times=LASTING - 1, stem=bad, head=flow())
    assert said(FlowWarnings(scaled=True), times=LASTING, stem=bad, head=flow())


def test_lost_weights_are_said_to_be_lost():
    lost = flow(float("nan"), nonfinite=3, weight_norm=float("nan"))
    assert "weights themselves are lost" in said(FlowWarnings(), stem=lost, head=lost)[0]
    assert "weights themselves are lost" not in said(FlowWarnings(), stem=flow(nonfinite=1), head=flow())[0]


def test_nothing_trains():
    assert FlowWarnings().judge(0, {"stem": Flow()}) == []


# -- frozen by mistake --------------------------------------------------------------------------------------------------------


@pytest.fixture
def stem():
    layer = nn.Linear(2, 2)
    for parameter in layer.parameters():
        parameter.grad = parameter.detach().clone()
    return dict(layer.named_parameters())


def why(stem, meant=("weight", "bias"), optimized=None):
    return why_it_rests("stem", stem, meant, {id(p) for p in stem.values()} if optimized is None else optimized)


def test_a_stage_that_can_train(stem):
    assert why(stem) is None
    stem["bias"].grad = None  # a part of it that this batch did not need
    assert why(stem) is None


def test_requires_grad_is_false(stem):
    for parameter in stem.values():
        parameter.requires_grad_(False)
    text = why(stem)
    assert text.startswith("'stem' should train now, but requires_grad is False for all of its parameters.")
    assert "--model.freezing" in text
    assert why(stem, meant=())  # also if the network came like that: then nothing of the stage trains


def test_a_part_is_frozen(stem):
    stem["weight"].requires_grad_(False)
    assert "1 of its 2 parameters (weight)" in why(stem)
    assert why(stem, meant=("bias",)) is None  # the network's author wants it so


def test_no_gradient_comes(stem):
    for parameter in stem.values():
        parameter.grad = None
    assert "no gradient reaches it" in why(stem)


def test_the_optimizer_does_not_have_it(stem):
    assert "the optimizer lacks all of its parameters" in why(stem, optimized=())
    assert "lacks 1 of its 2 parameters (bias)" in why(stem, optimized={id(stem["weight"])})
