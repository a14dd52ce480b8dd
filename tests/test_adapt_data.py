"""Two domains side by side: what a batch holds, what of the target's labels gets in, and that order is a function."""

from collections import Counter

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from finetune import AdaptDataModule, AdaptModule, ConfigError, DataError, FolderDataModule
from finetune.pairs import PairSampler
from finetune.target import UNKNOWN


def folder(root, classes, number=6, split="", base=0):
    """Make pictures whose every pixel tells which one they are."""
    for label, name in enumerate(classes):
        place = root / split / name
        place.mkdir(parents=True, exist_ok=True)
        for i in range(number):
            Image.new("RGB", (8, 8), (base + 20 * label, base + i, 7)).save(place / f"{i}.png")
    return root


@pytest.fixture
def domains(tmp_path):
    folder(tmp_path / "photo", ["cat", "dog", "owl"], number=9)
    folder(tmp_path / "sketch", ["cat", "owl"], number=5, base=100)
    return tmp_path


def module(domains, **options):
    given = {"target": str(domains / "sketch"), "batch_size": 4, "image_size": 8, "workers": 0, "augment": "none"}
    return AdaptDataModule(domains / "photo", **{**given, "val_fraction": 0.34, **options})


def batches(data):
    return list(data.train_dataloader())


# -- what a batch holds -------------------------------------------------------------------------------------------------------


def test_the_smaller_domain_is_gone_through_as_often_as_it_takes(domains):
    data = module(domains)
    assert len(data.target.splits["train"]) == 10
    assert len(data.folder.splits["train"]) == 18
    found = batches(data)
    assert len(found) == data.steps == 18 // 4
    seen = Counter(index for batch in found for index in batch["target"]["index"].tolist())
    assert set(seen) == set(range(10))
    assert set(seen.values()) <= {1, 2}
    assert max(Counter(index for batch in found for index in batch["index"].tolist()).values()) == 1
    assert len(batches(module(domains, steps_per_epoch=11))) == 11


def test_labels_are_numbers_of_the_sources_classes_and_those_of_the_target_stay_out_of_training(domains):
    data = module(domains)
    assert data.classes == ["cat", "dog", "owl"]
    for batch in batches(data):
        assert set(batch["target"]) == {"image", "index", "known"}
        assert batch["target"]["known"].tolist() == [UNKNOWN] * 4
        assert (batch["image"][:, 0, 0, 0] // 20).tolist() == batch["label"].tolist()
        assert (batch["target"]["image"][:, 0, 0, 0] >= 100).all()
    (domains / "sketch" / "cat" / "up").symlink_to("..")  # would make every picture a cat
    data = module(domains)
    watched = next(iter(data.val_dataloader()[1]))
    assert set(watched) == {"target"}
    assert sorted(set(watched["target"]["label"].tolist())) == [0, 2]  # owl is 2 although the target has no dog
    assert [path.parent.name for path in data.files("target")] == ["cat"] * 5 + ["owl"] * 5


def test_few_labels_of_the_target(domains):
    data = module(domains, target_shots=2, steps_per_epoch=9)
    assert len(data.labelled_target) == 4
    pictures = data.target.splits["train"]
    for batch in batches(data):
        labels, index = batch["target"]["known"].tolist(), batch["target"]["index"].tolist()
        assert sum(label != UNKNOWN for label in labels) == 1  # a quarter of 4
        for label, place in zip(labels, index, strict=True):
            assert (place in data.labelled_target) == (label != UNKNOWN)
            assert label in (UNKNOWN, pictures[place].label)
    assert module(domains, target_shots=2).labelled_target == data.labelled_target


def test_several_targets_are_one(domains):
    folder(domains / "more" / "cartoon", ["dog"], number=3, base=150)
    data = module(domains, target=[str(domains / "sketch"), str(domains / "more" / "cartoon")])
    assert len(data.files("target")) == 13
    assert all(path.is_file() for path in data.files("target"))
    values = {int(v) for batch in data.val_dataloader()[1] for v in batch["target"]["image"][:, 0, 0, 0]}
    assert values == {100, 120, 150}


def test_a_target_without_classes(domains):
    (domains / "plain" / "deep").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(domains / "plain" / f"{i}.png")
    data = module(domains, target=str(domains / "plain"))
    assert data.target.splits["train"] == [(f"{i}.png", UNKNOWN) for i in range(3)]
    assert "not known" in data.target.summary()
    deep = module(domains, target=str(domains / "sketch"), target_labels=False)
    assert len(deep.target.splits["train"]) == 10
    assert not deep.target.labelled("train")
    with pytest.raises(DataError, match="target_shots 1 needs 1 labelled pictures of each class in the target"):
        module(domains, target=str(domains / "plain"), target_shots=1).labelled_target  # noqa: B018


def test_splits_of_a_target_are_for_training_watching_and_the_test(domains):
    for split, number in (("train", 4), ("val", 2), ("test", 3)):
        folder(domains / "split", ["cat", "owl"], number, split, base=100)
    data = module(domains, target=str(domains / "split"))
    assert (data.watched, data.has_test) == ("val", True)
    assert {len(data.target.splits[split]) for split in ("train", "val", "test")} == {8, 4, 6}
    assert sum(len(batch["target"]["label"]) for batch in data.val_dataloader()[1]) == 4
    (test,) = data.test_dataloader()  # the source has none
    assert sum(len(batch["target"]["label"]) for batch in test) == 6
    assert not module(domains).has_test


# -- the order ----------------------------------------------------------------------------------------------------------------


def places(sampler):
    return [key[1:] for key in sampler]


def test_order_is_a_function_of_seed_and_epoch_and_goes_on_where_it_stood(domains):
    pairs = module(domains).train_dataloader().dataset

    def sampler(epoch, done=0, **options):
        return PairSampler(pairs, 4, 5, position=lambda: (epoch, done), **options)

    whole = places(sampler(3))
    assert len(whole) == len(sampler(3)) == 20
    assert places(sampler(3)) == whole != places(sampler(4))
    assert places(sampler(3, done=2)) == whole[8:]
    assert places(sampler(3, seed=1)) != whole
    halves = [places(sampler(3, world=2, rank=rank)) for rank in (0, 1)]
    assert [len(half) for half in halves] == [20, 20]
    first = [{pair[0] for pair in half[:9]} for half in halves]
    assert not first[0] & first[1]  # 18 pictures of the source, before any comes again


class Writer(L.LightningModule):
    """A model that writes down what it is given."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(1)), []

    def training_step(self, batch, batch_idx):
        self.seen.append((batch["index"].tolist(), batch["target"]["index"].tolist(), int(batch["target"]["image"].sum())))
        return self.weight.sum()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], 0.1)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_that_is_resumed_within_an_epoch_sees_the_same_pairs(domains, tmp_path):
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    options |= {"default_root_dir": tmp_path, "limit_val_batches": 0, "max_epochs": 3}
    given = {"augment": "light", "steps_per_epoch": 4}
    whole, resumed = Writer(), Writer()
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    L.Trainer(**options, callbacks=[keep]).fit(whole, module(domains, **given))
    L.Trainer(**options, enable_checkpointing=False).fit(
        resumed, module(domains, **given), ckpt_path=tmp_path / "step=6.ckpt", weights_only=True
    )
    assert resumed.seen == whole.seen[6:]
    assert len(whole.seen) == 12


# -- what a user may get wrong ------------------------------------------------------------------------------------------------


def test_messages(domains):
    folder(domains / "wrong", ["cat", "dgo"])
    with pytest.raises(
        DataError, match=r"holds 'dgo', which is no class of the source\. Did you mean 'dog'\?.*Rename or remove"
    ):
        module(domains, target=str(domains / "wrong")).target  # noqa: B018
    (domains / "empty" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match="empty holds no picture to train with: expected files ending in"):
        module(domains, target=str(domains / "empty")).target  # noqa: B018
    with pytest.raises(DataError, match="no folder"):
        module(domains, target=str(domains / "nowhere")).target  # noqa: B018
    with pytest.raises(DataError, match="are the same folder"):
        module(domains, target=str(domains / "photo")).target  # noqa: B018
    with pytest.raises(ConfigError, match="the target is still the built-in digits_m: name the folder of yours"):
        AdaptDataModule(domains / "photo")
    with pytest.raises(
        ConfigError, match=r"target_shots to be 0 or more and data\.steps_per_epoch at least 1, found -1 and None"
    ):
        module(domains, target_shots=-1)


def test_a_broken_picture_of_either_domain_is_named_before_training(domains):
    for name in ("photo", "sketch"):
        broken = min((domains / name).rglob("*.png"))
        kept = broken.read_bytes()
        broken.write_bytes(b"no picture")
        trainer = L.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
        )
        data = module(domains)
        options = {"weights": "none", "num_classes": data.num_classes}
        with pytest.raises(DataError, match=f"1 of .* pictures of .*{name} cannot be read: .*Replace or remove them") as caught:
            trainer.fit(AdaptModule(backbone="test_resnet", adaptation="MCC", **options), data)
        assert "--data.on_error skip" in str(caught.value)
        broken.write_bytes(kept)


def test_broken_images_of_either_domain_are_left_out_by_choice(domains, capsys):
    broken = [min((domains / name).rglob("*.png")) for name in ("photo", "sketch")]
    for path in broken:
        path.write_bytes(b"no image")
    data = module(domains, on_error="skip", max_errors=0.1, shots=2, fraction=1.0)
    data.setup("fit")
    said = capsys.readouterr().out
    assert all(f"{path.relative_to(path.parents[1])} (" in said for path in broken)
    used = {*data.files("train"), *data.files("val"), *data.files("target")}
    assert not used & set(broken)
    assert len(data.target.splits["train"]) == 9
    assert Counter(data.labels("train")) == {0: 2, 1: 2, 2: 2}
    assert len(batches(data)) == data.steps
    with pytest.raises(DataError, match=r"1 of 10 pictures of .*sketch cannot be used, more than data\.max_errors allows"):
        _ = module(domains, on_error="skip", max_errors=0.05).target


def test_classes_of_the_source_are_shown_equally_often(domains):
    for number in range(3, 9):
        (domains / "photo" / "owl" / f"{number}.png").unlink()
    options = {"batch_size": 2, "augment": "light", "image_size": 32}  # an epoch is all 14 images of the source
    balanced = batches(module(domains, sampling="balanced", steps_per_epoch=7, **options))
    seen = Counter(label for batch in balanced for label in batch["label"].tolist())
    assert max(seen.values()) - min(seen.values()) <= 1
    owls = [image for batch in balanced for image, label in zip(batch["image"], batch["label"], strict=True) if label == 2]
    assert len(owls) > 2  # of two images
    plain, decoded = (batches(module(domains, decoded=kept)) for kept in (None, 8))
    for one, other in zip(plain, decoded, strict=True):  # images of 8 pixels stay what they are
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["target"]["image"], other["target"]["image"])


def test_folds_of_the_source_hold_out_each_image_once(domains):
    held = [file for fold in (1, 2, 3) for file in module(domains, folds=3, fold=fold).files("val")]
    assert sorted(held) == sorted((domains / "photo").rglob("*.png"))


def test_grey_pictures_become_rgb(domains):
    (domains / "grey").mkdir()
    Image.fromarray(np.full((8, 8), 9, np.uint8)).save(domains / "grey" / "0.png")
    data = module(domains, target=str(domains / "grey"))
    assert batches(data)[0]["target"]["image"].shape == (4, 3, 8, 8)


# -- built-in data ------------------------------------------------------------------------------------------------------------


def test_digits_on_photographs_share_no_training_picture_with_the_digits():
    data = AdaptDataModule("digits", "digits_m", workers=0)
    source = {path.stem for path in data.files("train")}
    target = {path.stem for path in data.files("target")}
    assert len(target) == 538
    assert not source & target
    assert data.target.labelled("train")
    names = {path.stem: path for path in data.files("target")}
    plain = {path.stem: path for split in ("val", "test") for path in FolderDataModule("digits").files(split)}
    assert {stem: path.parent.name for stem, path in names.items()} == {stem: path.parent.name for stem, path in plain.items()}
    shares = []
    for stem in sorted(names)[:20]:
        with Image.open(names[stem]) as picture, Image.open(plain[stem]) as digit:
            dark = np.asarray(digit) == 0  # there it is half of the photograph, so at most 128
            assert (picture.size, picture.mode) == ((32, 32), "RGB")
            shares.append(np.asarray(picture)[dark].max())
    assert 60 < max(shares) <= 128
