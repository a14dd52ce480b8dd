"""Groups and optimizers against tables written by hand."""

import pytest
import torch
from torch import nn

from finetune.errors import ConfigError
from finetune.optim import StageRates, build_groups, build_optimizer

STAGES = ["stem", "layer1", "head"]


def test_scales():
    assert StageRates(0.1, lr_decay=0.38).scales(STAGES) == pytest.approx({"stem": 0.1444, "layer1": 0.38, "head": 1.0})
    assert StageRates(0.1, lr_scale=0.1).scales(STAGES) == {"stem": 0.1, "layer1": 0.1, "head": 1.0}
    assert StageRates(0.1, lr_decay=0.5, lr_scale={"stem": 0.0}).scales(STAGES) == {"stem": 0.0, "layer1": 0.5, "head": 1.0}


@pytest.mark.parametrize(
    ("rates", "says"),
    [
        (StageRates(0.1, lr_scale={"layr1": 0.1}), "Did you mean 'layer1'"),
        (StageRates(0.1, lr_decay=0.5, lr_scale=0.1), "exclude each other"),
        (StageRates(0.1, lr_scale={"stem": -1.0}), "0 or more"),
    ],
)
def test_scale_mistakes(rates, says):
    with pytest.raises(ConfigError, match=says):
        rates.scales(STAGES)


def test_groups_split_weight_decay_and_hold_each_parameter_once():
    net = nn.ModuleDict(
        {"stem": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4), "head": nn.Linear(4, 2), "extra": nn.Linear(2, 2)}
    )
    parameters = dict(net.named_parameters())
    members = {
        "stem": ["stem.weight", "stem.bias", "norm.weight", "norm.bias"],
        "head": ["head.weight", "head.bias"],
        "extra": ["extra.weight", "extra.bias"],
    }
    groups = build_groups(parameters, members, ["stem", "head"], StageRates(0.1, lr_decay=0.5, weight_decay=0.3))
    assert [(g["name"], g["lr"], g["weight_decay"], len(g["params"])) for g in groups] == [
        ("stem", 0.05, 0.3, 1),
        ("stem/no_decay", 0.05, 0.0, 3),
        ("head", 0.1, 0.3, 1),
        ("head/no_decay", 0.1, 0.0, 1),
        ("extra", 0.1, 0.3, 1),
        ("extra/no_decay", 0.1, 0.0, 1),
    ]
    placed = [id(p) for g in groups for p in g["params"]]
    assert sorted(placed) == sorted(id(p) for p in net.parameters())


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [("sgd", torch.optim.SGD, {"nesterov": True, "momentum": 0.8}), ("adamw", torch.optim.AdamW, {"betas": (0.8, 0.9)})],
)
def test_optimizer_keeps_the_rate_of_every_group(name, kind, expected):
    a, b = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    groups = [{"params": [a], "lr": 0.1, "weight_decay": 0.2}, {"params": [b], "lr": 0.01, "weight_decay": 0.0}]
    optimizer = build_optimizer(name, groups, 0.8, {"betas": (0.8, 0.9)} if name == "adamw" else None)
    assert isinstance(optimizer, kind)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.1, 0.2), (0.01, 0.0)]
    assert {key: optimizer.param_groups[0][key] for key in expected} == expected


def test_optimizer_mistakes():
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": 0.1, "weight_decay": 0.0}]
    with pytest.raises(ConfigError, match="Did you mean 'adamw'"):
        build_optimizer("adamww", groups, 0.9, None)
    with pytest.raises(ConfigError, match="no_such_option"):
        build_optimizer("sgd", groups, 0.9, {"no_such_option": 1})


@pytest.mark.parametrize(("name", "options"), [("sgd", {}), ("adamw", {}), ("adamw", {"amsgrad": True}), ("adam", {})])
def test_fused_updates_are_those_of_the_plain_optimizer(name, options):
    found = []
    for fused in (True, False):
        torch.manual_seed(0)
        layer = nn.Linear(5, 4)
        group = {"params": list(layer.parameters()), "lr": 0.1, "weight_decay": 0.01}
        optimizer = build_optimizer(name, [group], 0.9, options, fused=fused)
        assert bool(optimizer.param_groups[0].get("fused")) is fused
        for step in range(5):
            layer(torch.full((2, 5), float(step))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(layer.weight.detach())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_other_optimizers_and_an_explicit_choice_are_left_alone():
    group = {"params": [nn.Parameter(torch.ones(2))], "lr": 0.1}
    assert build_optimizer("lion", [dict(group)], 0.9, None).param_groups[0].get("fused") is None
    assert not build_optimizer("sgd", [dict(group)], 0.9, {"fused": False}).param_groups[0]["fused"]
