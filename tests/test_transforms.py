"""Sizes, values and randomness of the transforms."""

import resource
import sys
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.errors import ConfigError
from finetune.transforms import Augmentation, InputSpec, eval_transform, train_transform

SPEC = InputSpec(32, (0.5, 0.25, 0.75), (0.2, 0.2, 0.2), "bilinear", 0.8)
LEVELS = get_args(Augmentation)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1), (2, 900), (31, 33), (64, 48)])
def test_any_picture_becomes_one_size(level, shape):
    image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    for transform in (train_transform(SPEC, level, hflip=True), eval_transform(SPEC)):
        result = transform(image)
        assert result.dtype == torch.uint8
        assert result.shape == (3, 32, 32)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_a_long_picture_needs_no_gigabyte():
    spec = InputSpec.default()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for level in LEVELS:
        train_transform(spec, level)(torch.zeros(3, 1, 3000, dtype=torch.uint8))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # resized whole it would be 590 MB


@pytest.mark.parametrize(("shape", "interpolation"), [((90, 120), "bicubic"), ((90, 120), "bilinear"), ((200, 60), "bilinear")])
def test_evaluation_is_pillows_resize_and_centre_crop(shape, interpolation):
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize(shape[::-1], Image.Resampling.BICUBIC)
    spec = InputSpec(32, SPEC.mean, SPEC.std, interpolation, 0.8)
    height, width = shape
    scale = 40 / min(shape)  # 32 / 0.8
    resized = image.resize((int(width * scale), int(height * scale)), Image.Resampling[interpolation.upper()])
    left, top = round((resized.width - 32) / 2), round((resized.height - 32) / 2)
    theirs = np.array(resized.crop((left, top, left + 32, top + 32)))
    ours = eval_transform(spec)(torch.from_numpy(np.array(image)).permute(2, 0, 1)).permute(1, 2, 0).numpy()
    assert np.abs(ours.astype(int) - theirs).max() <= 2


def test_evaluation_of_a_long_picture_keeps_its_centre():
    image = torch.zeros(3, 10, 1000, dtype=torch.uint8)
    image[:, :, 500:] = 200
    result = eval_transform(SPEC)(image)
    assert (result[..., :14] == 0).all()
    assert (result[..., 18:] == 200).all()


def test_none_is_the_transform_of_evaluation():
    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8)
    state = torch.get_rng_state()
    assert torch.equal(train_transform(SPEC, "none")(image), eval_transform(SPEC)(image))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("level", ["light", "medium", "strong"])
def test_randomness_is_that_of_torchs_generator(level):
    image = torch.randint(0, 256, (3, 60, 60), dtype=torch.uint8)
    transform = train_transform(SPEC, level)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed + len(results))
        results.append(transform(image))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_levels_grow_in_strength():
    """A ramp shows how much of the picture a crop keeps: the range of its values."""
    ramp = torch.arange(200, dtype=torch.uint8).expand(3, 200, 200)
    kept = {}
    for level in ("light", "medium"):
        torch.manual_seed(0)
        results = [train_transform(SPEC, level, hflip=False)(ramp)[0].float() for _ in range(60)]
        kept[level] = min(float(r.max() - r.min()) for r in results)
    assert kept["light"] > 0.6 * 0.75 * 200 - 5
    assert kept["medium"] < kept["light"]


@pytest.mark.parametrize("level", ["light", "medium", "strong"])
def test_mirror_images_only_if_wanted(level):
    ramp = torch.arange(200, dtype=torch.uint8).expand(3, 200, 200)

    def mirrored(hflip):
        torch.manual_seed(0)
        results = [train_transform(SPEC, level, hflip)(ramp)[0].float() for _ in range(40)]
        return sum(bool(result[16, :8].mean() > result[16, -8:].mean()) for result in results)

    # turning by up to 135 degrees is one of TrivialAugment's 14 operations
    assert mirrored(False) == 0 if level != "strong" else mirrored(False) < 8
    assert 8 < mirrored(True) < 32


def test_strong_erases_with_the_mean():
    white = torch.full((3, 64, 64), 255, dtype=torch.uint8)
    torch.manual_seed(0)
    transform = train_transform(SPEC, "strong")
    erased = sum(bool((transform(white).permute(1, 2, 0) == torch.tensor([128, 64, 191])).all(2).any()) for _ in range(100))
    assert erased > 10


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match=r"Unknown augmentation 'stong'\. Did you mean 'strong'\? Expected none, light"):
        train_transform(SPEC, "stong")
    for wrong in ({"size": 0}, {"crop": 0.0}, {"crop": 1.5}, {"interpolation": "nearest"}):
        values = {"size": 32, "mean": SPEC.mean, "std": SPEC.std, "interpolation": "bilinear", "crop": 1.0} | wrong
        with pytest.raises(ConfigError, match="Expected"):
            InputSpec(**values)
