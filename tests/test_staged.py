"""A module in stages: what is below the line, what it depends on, and that the parts make the whole."""

import pytest
import torch

from finetune import FinetuneModule, Phase
from finetune.reuse import Kept

STAGES = ["stem", "layer1", "layer2", "layer3", "layer4"]
IMAGES = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def module(backbone="test_resnet", **options):
    torch.manual_seed(0)
    return FinetuneModule(backbone, num_classes=3, weights="none", **options).eval()


@pytest.mark.parametrize("stage", STAGES)
def test_what_was_kept_stands_for_the_pictures(stage):
    model = module()
    with torch.no_grad():
        assert torch.equal(model(Kept(model.lower(IMAGES, stage), stage)), model(IMAGES))
        folded = model.folded_lower()(IMAGES, stage)
        torch.testing.assert_close(folded, model.lower(IMAGES, stage), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("train", "norms", "bn", "line"),
    [
        (("head",), False, "auto", "layer4"),
        (("layer4", "head"), False, "frozen", "layer3"),
        (("stem", "head"), False, "auto", None),
        (("layer1", "layer4", "head"), False, "auto", "stem"),
        (("head",), True, "auto", None),
        (("head",), False, "train", None),
    ],
)
def test_the_line_below_which_nothing_changes(train, norms, bn, line):
    assert module(bn=bn).frozen_line(Phase(train, norms, 0, 1)) == line


def test_without_batchnorm_its_mode_moves_nothing():
    model = module("resnet50_gn", bn="train")
    assert model.frozen_line(Phase(("head",), False, 0, 1)) == "layer4"


@pytest.mark.parametrize(
    ("name", "stage", "changes"),
    [
        ("layer1.0.conv1.weight", "layer1", True),
        ("layer1.0.conv1.weight", "stem", False),
        ("layer2.0.bn1.running_mean", "layer2", True),
        ("layer2.0.bn1.num_batches_tracked", "layer4", False),
    ],
)
def test_the_hash_follows_what_the_frozen_stages_compute_from(name, stage, changes):
    model, other = module(), module()
    assert model.frozen_hash(stage) == other.frozen_hash(stage)
    changed = module()
    changed.backbone.state_dict()[name].add_(1)
    assert (changed.frozen_hash(stage) != model.frozen_hash(stage)) is changes


def test_the_hash_follows_normalisation_and_parameters_outside_of_layers():
    model, other = module(), module()
    other.mean.add_(0.1)
    assert model.frozen_hash("stem") != other.frozen_hash("stem")
    plain, moved = module("test_vit"), module("test_vit")
    moved.backbone.pos_embed.data.add_(1)
    first = plain.stages[0].name
    assert plain.frozen_hash(first) != moved.frozen_hash(first)
