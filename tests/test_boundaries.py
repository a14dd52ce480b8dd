"""Cutting a network and the table of its stages, against published figures and plain PyTorch."""

import pytest
import timm
import torch
from torch import nn

from finetune.backbones import create_model
from finetune.boundaries import Boundaries, describe, evaluating, stage_table
from finetune.errors import ConfigError
from finetune.stages import Stage, split_head

RESNET = ["stem", "layer1", "layer2", "layer3", "layer4"]


@pytest.fixture
def cut():
    """A small ResNet with statistics that differ from how they start, and its boundaries."""
    torch.manual_seed(0)
    model = create_model("test_resnet", 3)
    _, stages = split_head(model)
    model.train()(torch.rand(4, 3, 64, 64))
    return model, stages, Boundaries(model, stages, 64)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_table_of_resnet50_has_the_published_multiply_adds():
    model = create_model("resnet50", 1000)
    classifier, stages = split_head(model)
    rows = {row["stage"]: row for row in describe(model, stages, nn.Linear(classifier.in_features, 1000), 224)}
    # 4.09 G at 224 px; strides and channels as in He et al. 2015, table 1
    assert sum(row["multiply-adds"] for row in rows.values()) / 1e9 == pytest.approx(4.09, abs=0.01)
    assert [rows[s]["stride"] for s in RESNET] == [4, 4, 8, 16, 32]
    assert [rows[s]["channels"] for s in RESNET] == [64, 256, 512, 1024, 2048]
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)


def test_boundary_check_notices_a_network_that_cannot_be_cut():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Linear(3, 2)

        def forward(self, x):
            y = self.a(x)
            return self.out((self.b(y) + y).mean((2, 3)))  # y crosses the boundary between a and b

    model = Skips()
    _, stages = split_head(model)
    assert Boundaries(model, stages, 8).check() == {"a": False, "b": True}


def test_activations_are_those_that_timm_hands_out(cut):
    model, _, boundaries = cut
    images = torch.rand(2, 3, 64, 64)
    model.eval()
    with torch.no_grad():
        _, maps = model.forward_intermediates(images)
        for stage, expected in zip(RESNET[1:4], maps[1:4], strict=True):
            assert torch.equal(boundaries.lower(images, stage), expected)
        assert torch.equal(boundaries.lower(images, "layer4"), model(images))
        assert boundaries.upper(boundaries.lower(images, "layer2"), "layer2").shape == (2, 96)


def test_gradients_reach_the_activation_and_what_lies_above_the_cut_only(cut):
    model, _, boundaries = cut
    images = torch.rand(2, 3, 64, 64)
    model.eval()(images).sum().backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    activation = boundaries.lower(images, "layer2").detach().requires_grad_()
    boundaries.upper(activation, "layer2").sum().backward()
    assert activation.grad.abs().sum() > 0
    for name, parameter in model.named_parameters():
        if name.startswith(("layer3", "layer4")):
            assert torch.equal(parameter.grad, whole[name])
        else:
            assert parameter.grad is None


def test_the_part_below_a_cut_is_left_alone_in_train_mode(cut):
    # regression: the blank picture that starts the upper part moved the BatchNorm statistics of the lower one
    model, _, boundaries = cut
    activation = torch.rand(4, *boundaries.lower(torch.rand(1, 3, 64, 64), "layer2").shape[1:])
    before = state(model)
    boundaries.upper(activation, "layer2")
    changed = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"layer3", "layer4"}
    assert all(module.training for module in model.modules())


def test_looking_leaves_modes_statistics_and_hooks_as_they_were(cut):
    model, stages, boundaries = cut
    model.train()
    model.layer1.eval()
    modes, before = [m.training for m in model.modules()], state(model)
    boundaries.check()
    describe(model, stages, nn.Linear(96, 3), 64)
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_a_stage_that_is_never_called_and_one_that_is_unknown(cut):
    model, stages, boundaries = cut
    model.unused = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="The stages unused are never called"):
        Boundaries(model, [*stages, Stage("unused", ("unused",), ("unused.weight", "unused.bias"))], 64)
    for use in (boundaries.lower, boundaries.upper):
        with pytest.raises(ConfigError, match="Did you mean 'layer3'"):
            use(torch.rand(1, 3, 64, 64), "layr3")


def test_the_printed_table_has_the_sizes_that_timm_counts():
    table = stage_table("test_resnet", 10, 64).splitlines()
    assert table[0] == "test_resnet"
    rows = {line.split()[0]: line.split() for line in table[3:]}
    assert list(rows) == [*RESNET, "head", "total"]
    model = timm.create_model("test_resnet", num_classes=10)
    for name, module in (*((n, getattr(model, n)) for n in RESNET[1:]), ("head", model.fc), ("total", model)):
        column = 1 if name == "total" else 2
        assert rows[name][column] == f"{sum(p.numel() for p in module.parameters()):,}"
    assert [rows[name][4] for name in RESNET] == ["4", "4", "8", "16", "32"]
    with pytest.raises(ConfigError, match="at least 1, found -5"):
        stage_table("test_resnet", 10, -5)
