"""Shots, fractions and folds: counts by hand, nesting, and that folds are a partition as scikit-learn's would be."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from sklearn.model_selection import StratifiedKFold

from finetune import ConfigError, DataError, FolderDataModule
from finetune.folders import Picture, PictureFolder
from finetune.loading import balanced_order
from finetune.subsets import fewer, fold_of


def folder(*counts, val=0):
    train = [Picture(f"{label}/{number}.png", label) for label, count in enumerate(counts) for number in range(count)]
    held = [Picture(f"{label}/v{number}.png", label) for label in range(len(counts)) for number in range(val)]
    names = tuple(f"class {label}" for label in range(len(counts)))
    return PictureFolder(Path("pictures"), names, {"train": train, "val": held, "test": []}, (), {})


def files(found, split="train"):
    return {picture.file for picture in found.splits[split]}


def test_shots_are_of_each_class_nested_and_drawn_by_the_seed():
    whole = folder(30, 12, val=3)
    five, ten = fewer(whole, 5, 1.0, 0), fewer(whole, 10, 1.0, 0)
    assert five.counts("train") == [5, 5]
    assert files(five) < files(ten) < files(whole)
    assert files(fewer(whole, 5, 1.0, 1)) != files(five)
    assert five.splits["val"] == whole.splits["val"]
    assert [p.label for p in five.splits["train"]] == [0] * 5 + [1] * 5


def test_a_fraction_keeps_the_proportions_and_at_least_one():
    assert fewer(folder(30, 12, 2), None, 0.25, 0).counts("train") == [8, 3, 1]


def test_too_few_pictures_for_shots_are_named():
    with pytest.raises(DataError, match="'class 1' has 4"):
        fewer(folder(9, 4), 5, 1.0, 0)


def test_folds_are_a_stratified_partition():
    whole = folder(23, 10, 7, val=2)
    parts = [fold_of(whole, 5, fold, 0) for fold in range(1, 6)]
    everything = files(whole) | files(whole, "val")
    assert Counter(file for part in parts for file in files(part, "val")) == Counter(everything)
    for part in parts:
        assert files(part) | files(part, "val") == everything
        assert not files(part) & files(part, "val")
    labels = [p.label for split in ("train", "val") for p in whole.splits[split]]
    theirs = [sorted(Counter(labels[i] for i in held).items()) for _, held in StratifiedKFold(5).split(labels, labels)]
    ours = [sorted(enumerate(part.counts("val"))) for part in parts]
    for of_class in range(3):
        assert sorted(fold[of_class][1] for fold in ours) == sorted(fold[of_class][1] for fold in theirs)
    sizes = [len(part.splits["val"]) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_more_folds_than_pictures_are_refused():
    with pytest.raises(DataError, match="'class 1' has 3"):
        fold_of(folder(9, 3), 4, 1, 0)


@pytest.mark.parametrize(
    "options",
    [{"shots": 0}, {"shots": 5, "fraction": 0.5}, {"fraction": 0}, {"folds": 1}, {"fold": 1}, {"folds": 3, "fold": 4}],
)
def test_options_out_of_range(options):
    with pytest.raises(ConfigError, match=r"data\.(shots|fraction|folds|fold)"):
        FolderDataModule("digits", **options)


def test_the_data_module_takes_them():
    assert FolderDataModule("digits", shots=7).folder.counts("train") == [7] * 10
    data = FolderDataModule("digits", folds=4, fold=2)
    test = data.folder.splits["test"]
    assert len(data.files("val")) + len(data.files("train")) + len(test) == 1797
    assert set(data.files("val")).isdisjoint(data.files("train"))


def test_a_balanced_order_has_each_class_equally_often_and_its_pictures_in_turn():
    labels = torch.tensor([0] * 40 + [1] * 5 + [2] * 2)
    order = balanced_order(labels, torch.Generator().manual_seed(1))
    assert len(order) == 47
    assert sorted(torch.bincount(labels[order]).tolist()) == [15, 16, 16]
    seen = torch.bincount(order, minlength=47)
    assert seen[:40].max() == 1
    for members in (seen[40:45], seen[45:]):
        assert members.max() - members.min() <= 1
    assert order.tolist() != balanced_order(labels, torch.Generator().manual_seed(2)).tolist()


def test_balanced_batches_are_the_same_again_for_an_epoch():
    def batches():
        data = FolderDataModule("digits", batch_size=50, image_size=8, workers=0, sampling="balanced")
        return torch.cat([batch["index"] for batch in data.train_dataloader()])

    assert torch.equal(batches(), batches())
