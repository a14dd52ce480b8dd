"""Stages, boundaries and one training step with per-stage rates, for every family that the toolkit promises."""

import pytest
import timm
import torch
from torch import nn

from finetune.backbones import create_model
from finetune.boundaries import Boundaries
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


def test_the_attention_pool_is_the_neck_and_the_head_is_the_classifier_alone():
    # regression: timm's last coarse group of resnet50_clip holds the attention pool (trap 47)
    model = create_model("resnet50_clip", 10)
    classifier, stages = split_head(model)
    neck = stages[-1]
    assert classifier.name == "head.proj"
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    assert sum(sizes[n] for n in neck.parameters) / 1e6 == pytest.approx(12.7, abs=0.1)


def test_norm_parameters_finds_group_and_batch_norm():
    for name in ("resnet50_gn", "resnet18"):
        model = create_model(name, 2)
        found = norm_parameters(model)
        assert found == {n for n, _ in model.named_parameters() if ".bn" in n or n.startswith("bn") or "downsample.1" in n}


def test_unknown_stage_names_the_nearest():
    with pytest.raises(ConfigError, match=r"no stage 'layr4'\. Did you mean 'layer4'\? The stages are: stem, layer4"):
        require_stage("layr4", ["stem", "layer4"])
