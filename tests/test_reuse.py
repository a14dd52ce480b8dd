"""What a frozen network makes of pictures is computed once, and anew when anything changes that it depends on."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.folders import Picture
from finetune.loading import PictureDataset
from finetune.reuse import dataset_key, keep, weights_hash
from finetune.store import Store
from finetune.transforms import InputSpec, eval_transform, random_crop

SPEC = InputSpec(8, (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0)
COUNT = 70  # more than a block


@pytest.fixture
def folder(tmp_path):
    for number in range(COUNT):
        Image.new("RGB", (8, 8), (number, 2 * number, 100)).save(tmp_path / f"{number:02}.png")
    return tmp_path


def dataset(folder, transform=None, seed=None):
    return PictureDataset(folder, [Picture(f"{n:02}.png", 0) for n in range(COUNT)], transform or eval_transform(SPEC), seed)


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_are_in_the_order_of_the_pictures_and_made_once(folder, workers):
    calls = []

    def mean(images):
        calls.append(len(images))
        return images.float().mean((2, 3))

    for computed in (COUNT, COUNT + 4):  # found again, four are compared with a fresh pass
        rows = keep(Store({"k": 1}, (COUNT, 3), root=folder / "kept"), mean, dataset(folder), workers=workers)
        assert np.array_equal(rows, [[n, 2 * n, 100] for n in range(COUNT)])
        assert sum(calls) == computed


def test_the_view_reaches_the_transform(folder):

    def store(view):
        return Store({"view": view}, (COUNT, 3), root=folder / "kept")

    def transform(image):
        return image * 0 + int(torch.randint(0, 256, ()))

    data = dataset(folder, transform, seed=3)
    first, second = (keep(store(v), lambda x: x.float().amax((2, 3)), data, v) for v in range(2))
    assert not np.array_equal(first, second)
    assert np.array_equal(first[5], data[(0, 5)]["image"].amax((1, 2)))
    assert np.array_equal(second[5], data[(1, 5)]["image"].amax((1, 2)))


def test_the_key_follows_files_transform_seed_and_view(folder):
    key = dataset_key(dataset(folder), 0)
    assert key == dataset_key(dataset(folder), 0)
    assert key == dataset_key(dataset(folder), 1), "without randomness all views are the same"
    crop = random_crop(SPEC, "light")
    keys = [
        key,
        dataset_key(dataset(folder, eval_transform(InputSpec(9, (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0))), 0),
        dataset_key(dataset(folder, crop, seed=1), 0),
        dataset_key(dataset(folder, crop, seed=1), 1),
        dataset_key(dataset(folder, crop, seed=2), 0),
        dataset_key(dataset(folder, random_crop(SPEC, "strong"), seed=1), 0),
    ]
    Image.new("RGB", (9, 8)).save(folder / "00.png")
    keys.append(dataset_key(dataset(folder), 0))
    status = os.stat(folder / "01.png")
    os.utime(folder / "01.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
    keys.append(dataset_key(dataset(folder), 0))
    assert len({str(k) for k in keys}) == len(keys)


def test_the_hash_of_weights_follows_names_shapes_kinds_and_values():
    base = {"a": torch.arange(6.0), "b": torch.tensor(3)}
    changed = base["a"].clone()
    changed[5] = torch.nextafter(changed[5], torch.tensor(9.0))
    variants = [
        base,
        {**base, "a": changed},
        {**base, "a": base["a"].view(2, 3)},
        {**base, "a": base["a"].double()},
        {"c": base["a"], "b": base["b"]},
        {"a": base["a"]},
    ]
    assert len({weights_hash(tensors) for tensors in variants}) == len(variants)
    assert weights_hash(base) == weights_hash({name: tensor.clone() for name, tensor in base.items()})
    assert weights_hash({"a": torch.ones(2, 4, 4, 4).to(memory_format=torch.channels_last)}) == weights_hash(
        {"a": torch.ones(2, 4, 4, 4)}
    ), "the layout in memory is no difference"


def test_half_precision_is_hashed_too():
    assert weights_hash({"a": torch.ones(3, dtype=torch.bfloat16)}) != weights_hash({"a": torch.zeros(3, dtype=torch.bfloat16)})
