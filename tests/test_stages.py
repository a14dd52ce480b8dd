"""Stages, boundaries and one training step with per-stage rates, for every family that the toolkit promises."""

import pytest
import timm
import torch
from torch import nn

from finetune.backbones import create_model
from finetune.boundaries import Boundaries, describe
from finetune.errors import ConfigError
from finetune.optim import StageRates, build_groups, build_optimizer
from finetune.stages import HEAD, norm_parameters, require_stage, split_head

RESNET = ["stem", "layer1", "layer2", "layer3", "layer4"]
PREACT = ["stem", "stages.0", "stages.1", "stages.2", "stages.3", "neck"]
EFFICIENT = ["stem", *(f"blocks.{i}" for i in range(7))]
# name, stages before the head, millions of parameters with the 1000-way head (published by timm)
FAMILIES = [
    ("resnet18", RESNET, 11.69),
    ("resnet34", RESNET, 21.80),
    ("resnet50", RESNET, 25.56),
    ("resnet101", RESNET, 44.55),
    ("resnet152", RESNET, 60.19),
    ("resnetv2_50", PREACT, 25.55),
    ("resnext50_32x4d", RESNET, 25.03),
    ("res2net50_26w_4s", RESNET, 25.70),
    ("efficientnet_b0", EFFICIENT, 5.29),
    ("efficientnet_cc_b0_4e", EFFICIENT, 13.31),
    ("resnet50_clip", PREACT, 38.27),
    ("skresnet18", RESNET, 11.96),
    ("resnest14d", RESNET, 10.61),
    ("resnet50_gn", RESNET, 25.56),
]


class OwnNet(nn.Module):
    """A user's own network: it knows nothing of timm."""

    def __init__(self, num_classes: int = 4):
        super().__init__()
        self.entry = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.out = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, num_classes))

    def forward(self, x):
        return self.out(self.pool(self.body(self.entry(x))).flatten(1))


def _published(name: str) -> float:
    """timm's own count, on the meta device."""
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(name, num_classes=1000).parameters())


@pytest.mark.parametrize(("name", "stages", "millions"), FAMILIES, ids=[f[0] for f in FAMILIES])
def test_family(name, stages, millions):
    torch.manual_seed(0)
    model = create_model(name, num_classes=3)
    classifier, found = split_head(model)
    assert [stage.name for stage in found] == stages

    # every parameter in exactly one stage, and together with a 1000-way head the published number
    placed = [parameter for stage in found for parameter in stage.parameters]
    assert sorted(placed) == sorted(n for n, _ in model.named_parameters())
    count = sum(p.numel() for p in model.parameters()) + (classifier.in_features + 1) * 1000
    assert round(count / 1e6, 2) == pytest.approx(millions, abs=0.011)
    assert count == _published(name)

    # the network can be cut after every stage without changing a bit
    assert Boundaries(model, found, size=64).check() == dict.fromkeys(stages, True)

    # one training step moves each stage by its own learning rate: SGD without momentum moves a weight by lr * gradient
    head = nn.Linear(classifier.in_features, 3)
    parameters = {
        **{f"backbone.{n}": p for n, p in model.named_parameters()},
        "head.weight": head.weight,
        "head.bias": head.bias,
    }
    members = {**{s.name: [f"backbone.{n}" for n in s.parameters] for s in found}, HEAD: ["head.weight", "head.bias"]}
    groups = build_groups(parameters, members, [*stages, HEAD], StageRates(lr=0.1, lr_decay=0.5))
    optimizer = build_optimizer("sgd", groups, momentum=0.0, options={"nesterov": False})
    before = {n: p.detach().clone() for n, p in parameters.items()}
    head(model(torch.rand(2, 3, 64, 64)).flatten(1)).square().sum().backward()
    optimizer.step()
    for distance, stage in enumerate(reversed([*stages, HEAD])):
        moved = False
        for n in members[stage]:
            gradient = parameters[n].grad
            if gradient is None:
                continue
            expected = before[n] - 0.1 * 0.5**distance * gradient
            torch.testing.assert_close(parameters[n].detach(), expected, rtol=1e-4, atol=1e-6)
            moved = moved or bool((gradient != 0).any())
        assert moved, f"{stage} got no gradient"


def test_own_network_by_class_path():
    model = create_model(f"{__name__}.OwnNet", num_classes=5)
    classifier, stages = split_head(model)
    assert classifier.name == "out.2"
    assert classifier.in_features == 12
    assert [(s.name, len(s.parameters)) for s in stages] == [("entry", 3), ("body", 4), ("neck", 2)]
    assert all(Boundaries(model, stages, 32).check().values())
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 12)


def test_own_function_that_returns_a_timm_resnet():
    model = create_model("torchvision.models.resnet18", num_classes=7)
    classifier, stages = split_head(model)
    assert classifier.name == "fc"
    assert [s.name for s in stages] == ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]


def test_table_of_resnet50_has_the_published_multiply_adds():
    model = create_model("resnet50", 1000)
    classifier, stages = split_head(model)
    rows = {row["stage"]: row for row in describe(model, stages, nn.Linear(classifier.in_features, 1000), 224)}
    # 4.09 G at 224 px; strides and channels as in He et al. 2015, table 1
    assert sum(row["multiply-adds"] for row in rows.values()) / 1e9 == pytest.approx(4.09, abs=0.01)
    assert [rows[s]["stride"] for s in RESNET] == [4, 4, 8, 16, 32]
    assert [rows[s]["channels"] for s in RESNET] == [64, 256, 512, 1024, 2048]
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)


def test_the_attention_pool_is_the_neck_and_the_head_is_the_classifier_alone():
    # regression: timm's last coarse group of resnet50_clip holds the attention pool (trap 47)
    model = create_model("resnet50_clip", 10)
    classifier, stages = split_head(model)
    neck = stages[-1]
    assert classifier.name == "head.proj"
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    assert sum(sizes[n] for n in neck.parameters) / 1e6 == pytest.approx(12.7, abs=0.1)


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


def test_norm_parameters_finds_group_and_batch_norm():
    for name in ("resnet50_gn", "resnet18"):
        model = create_model(name, 2)
        found = norm_parameters(model)
        assert found == {n for n, _ in model.named_parameters() if ".bn" in n or n.startswith("bn") or "downsample.1" in n}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnt50", "Did you mean 'resnet50'"),
        ("no_module.Net", "cannot be imported"),
        (f"{__name__}.OwnNat", "Did you mean 'OwnNet'"),
    ],
)
def test_unknown_backbone(name, says):
    with pytest.raises(ConfigError, match=says):
        create_model(name, 2)


def test_unknown_stage_names_the_nearest():
    with pytest.raises(ConfigError, match=r"no stage 'layr4'\. Did you mean 'layer4'\? The stages are: stem, layer4"):
        require_stage("layr4", ["stem", "layer4"])


def test_unknown_backbone_option():
    with pytest.raises(ConfigError, match="drop_rat"):
        create_model("test_resnet", 2, drop_rat=0.1)
