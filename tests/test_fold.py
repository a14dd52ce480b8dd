"""A folded network computes what the network computes, and less."""

import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from finetune.fold import TOLERANCE, folded


def lively(network):
    """Give BatchNorm statistics and weights that are not those of the start."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            for tensor in (module.running_mean, module.weight, module.bias):
                tensor.data.add_(0.1 * torch.randn(tensor.shape, generator=generator))
            module.running_var.data.mul_(0.5 + torch.rand(module.running_var.shape, generator=generator))
    return network


IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["test_resnet", "resnet18", "tf_efficientnet_lite0", "mobilenetv2_100", "resnest14d"])
def test_every_batchnorm_is_folded_and_the_output_is_the_same(name):
    network = lively(timm.create_model(name, num_classes=0))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    quick = folded(network, IMAGES)
    assert not any(isinstance(module, _BatchNorm) for module in quick.modules())
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    network.eval()
    other = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted, found = network(other), quick(other)
    assert (wanted - found).abs().max() <= 2 * TOLERANCE * wanted.abs().max()


def test_norms_that_stand_before_a_convolution_stay():
    network = lively(timm.create_model("resnetv2_50", num_classes=0))
    quick = folded(network, IMAGES)
    kept = [module for module in quick.modules() if isinstance(module, _BatchNorm)]
    assert kept  # the first of each block normalises a sum
    with torch.no_grad():
        wanted = network.eval()(IMAGES)
        assert (quick(IMAGES) - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


class Tapped(nn.Module):
    """The convolution's output is used beside BatchNorm, too: folding would change that use."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, images):
        found = self.conv(images)
        return self.norm(found) + found


def test_where_folding_would_change_the_result_it_is_left():
    network = lively(Tapped())
    quick = folded(network, IMAGES)
    assert isinstance(quick.norm, nn.BatchNorm2d)
    with torch.no_grad():
        assert torch.equal(quick(IMAGES), network.eval()(IMAGES))
