"""Reading pictures and ordering them: functions of (seed, epoch, picture), shared evenly among processes."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from finetune.data import FolderDataModule
from finetune.folders import Picture
from finetune.loading import EvalSampler, PictureDataset, PictureError, TrainSampler, even_batch_size


def sampler(n, world, rank, batch_size=2, position=None):
    return TrainSampler(PictureDataset(Path(), [("", 0)] * n, lambda image: image), batch_size, 0, position, world, rank)


@pytest.mark.parametrize(("n", "world", "each"), [(10, 2, 5), (11, 2, 5), (3, 4, 1), (7, 1, 7)])
def test_ranks_share_an_epoch_evenly(n, world, each):
    parts = [[index for _, index in sampler(n, world, rank)] for rank in range(world)]
    assert [len(part) for part in parts] == [each] * world == [len(sampler(n, world, rank)) for rank in range(world)]
    counts = Counter(index for part in parts for index in part)
    assert max(counts.values()) == (1 if n >= world else 2)
    assert set(counts) <= set(range(n))


@pytest.mark.parametrize(("n", "world"), [(9, 2), (10, 3), (4, 4)])
def test_evaluation_sees_every_picture_once(n, world):
    dataset = PictureDataset(Path(), [("", 0)] * n, lambda image: image)
    samplers = [EvalSampler(dataset, world, rank) for rank in range(world)]
    assert sorted(index for part in samplers for index in part) == list(range(n))
    for batch_size in range(1, 7):
        batches = {-(-len(part) // even_batch_size(n, world, batch_size)) for part in samplers}
        assert len(batches) == 1


def test_a_position_within_the_epoch():
    whole = list(sampler(10, 1, 0))
    assert whole == [(0, index) for _, index in whole]
    assert list(sampler(10, 1, 0, position=lambda: (0, 3))) == whole[6:]
    assert [epoch for epoch, _ in sampler(10, 1, 0, position=lambda: (4, 0))] == [4] * 10
    # combined with a longer loader it starts again after its 5 batches, in another order
    again = list(sampler(10, 1, 0, position=lambda: (0, 5)))
    assert sorted(again) == sorted(whole)
    assert again != whole
    assert list(sampler(10, 1, 0, position=lambda: (0, 7))) == again[4:]


def test_seeds_and_epochs_give_other_orders():
    orders = []
    for seed in (0, 1):
        order = TrainSampler(PictureDataset(Path(), [("", 0)] * 50, lambda image: image), 5, seed)
        for epoch in (0, 1):
            order.set_epoch(epoch)
            orders.append([index for _, index in order])
            assert orders[-1] == [index for _, index in order]
    assert len(set(map(tuple, orders))) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)


@pytest.mark.parametrize("workers", [0, 2])
def test_items_are_what_pillow_reads_after_the_transform(tmp_path, workers):
    rng = np.random.default_rng(0)
    pictures = [Picture(f"{number}.png", number % 3) for number in range(5)]
    arrays = [rng.integers(0, 256, (6, 7, 3), dtype=np.uint8) for _ in pictures]
    for picture, array in zip(pictures, arrays, strict=True):
        Image.fromarray(array).save(tmp_path / picture.file)
    batches = list(DataLoader(PictureDataset(tmp_path, pictures, lambda image: 255 - image), 2, num_workers=workers))
    images = torch.cat([batch["image"] for batch in batches]).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(images, 255 - np.stack(arrays))
    assert torch.cat([batch["label"] for batch in batches]).tolist() == [0, 1, 2, 0, 1]
    assert torch.cat([batch["index"] for batch in batches]).tolist() == [0, 1, 2, 3, 4]


def test_an_error_that_a_worker_wrapped_into_its_traceback_is_unwrapped():
    inside = (
        "Caught PictureError in DataLoader worker process 0.\nTraceback ...\nfinetune.loading.PictureError: a.png is empty.\n"
    )
    assert str(PictureError(inside)) == str(PictureError("a.png is empty.")) == "a.png is empty."


def test_a_picture_that_stands_in_an_epoch_several_times_looks_different_each_time(tmp_path):
    for name, number in (("many", 24), ("few", 3)):
        (tmp_path / name).mkdir()
        for i in range(number):
            pixels = np.random.default_rng((len(name), i)).integers(0, 255, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    data = FolderDataModule(
        tmp_path, image_size=32, val_fraction=0, augment="strong", sampling="balanced", batch_size=9, workers=0
    )
    batches = list(data.train_dataloader())
    shown = [image.numpy().tobytes() for batch in batches for image in batch["image"][batch["label"] == 0]]
    assert len(shown) in (13, 14)  # of three pictures
    assert len(set(shown)) == len(shown)
    again = [image.numpy().tobytes() for batch in data.train_dataloader() for image in batch["image"][batch["label"] == 0]]
    assert again == shown


@pytest.mark.parametrize("world", [1, 2, 3])
def test_an_epoch_that_began_with_other_batches_goes_on_with_the_images_that_are_left(world):
    pictures = PictureDataset(Path(), [("", 0)] * 48, lambda image: image)
    whole = [index for _, index in TrainSampler(pictures, 2, 0, lambda: (3, 0))]
    # 10 images were shown; 2 batches of `world` x 4 say 8 x world, so the rest begins 10 - 8 x world further on
    ranks = [
        [index for _, index in TrainSampler(pictures, 4, 0, lambda: (3, 2), world, rank, shift=lambda _: 10 - 8 * world)]
        for rank in range(world)
    ]
    together = [index for several in zip(*ranks, strict=False) for index in several]
    assert together == whole[10 : 10 + len(together)]
    assert len(together) > 38 - world
