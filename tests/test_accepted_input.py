"""What a backbone takes in: refused where the options say it, and said by which option it goes."""

import pytest
import timm
import torch

from finetune import FinetuneModule, FolderDataModule
from finetune.accepted_input import require_size
from finetune.errors import ConfigError


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet18.a1_in1k", "hf_hub:timm/resnet18.a1_in1k", "local-dir:models/resnet18"])
def test_a_place_of_weights_is_no_backbone(name):
    with pytest.raises(ConfigError, match=r"--model\.backbone resnet18 --model\.weights hub"):
        FinetuneModule(name, num_classes=2, weights="none")


def test_images_have_three_channels():
    with pytest.raises(ConfigError, match=r"in_chans 1, but images come with 3 channels"):
        FinetuneModule("test_resnet", num_classes=2, weights="none", backbone_args={"in_chans": 1})


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "test_vit", "test_resnet", "test_convnext"])
def test_only_a_size_that_the_network_cannot_take_is_refused(name):
    model = timm.create_model(name).eval()
    for size in (64, 224):
        takes = True
        try:
            model(torch.zeros(1, 3, size, size))
        except AssertionError:
            takes = False
        if takes:
            require_size(model, size)
        else:
            with pytest.raises(ConfigError, match=rf"found {size}\. Set --data.image_size 224.*img_size: {size}"):
                require_size(model, size)


@pytest.mark.parametrize("value", [[64, 96], "64", 64.0, True])
def test_a_size_is_one_whole_number(value):
    with pytest.raises(ConfigError, match=r"data\.image_size to be one whole number, as images are square; found"):
        FolderDataModule("photos", image_size=value)
