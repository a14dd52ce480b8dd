"""What is said about gradients: at which limits, which stage, and how often."""

import pytest
from torch import nn

from finetune.flow_warnings import EXPLODING, LASTING, TOO_FAR, VANISHING, FlowWarnings, why_it_rests
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
