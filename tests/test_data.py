"""The data module: what batches hold, and that order and augmentation are functions of (seed, epoch, picture)."""

import csv
import warnings
from collections import Counter
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from finetune.data import FolderDataModule
from finetune.errors import ConfigError, DataError
from finetune.images import read_image
from finetune.loading import PictureError
from finetune.transforms import InputSpec, eval_transform

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),  # Lightning 2.6 under torch 2.14, in every fit
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks"),  # the resumed run keeps none
]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes of 12 pictures of 9 x 8 pixels, all different."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for i in range(12):
            Image.fromarray(rng.integers(0, 256, (8, 9, 3), dtype=np.uint8)).save(root / name / f"{i:02d}.png")
    return root


class Recorder(L.LightningModule):
    """A model that writes down what it is given."""

    def __init__(self, early=False):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.early = early
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, batch["index"].tolist(), int(batch["image"].long().sum())))
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.weight.detach().sum())

    def test_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        if self.early:
            assert self.trainer.estimated_stepping_batches  # makes the loaders before the loops are restored
        return torch.optim.SGD([self.weight], 0.1)


def trainer(folder, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return L.Trainer(**quiet | {"accelerator": "cpu", "devices": 1, "default_root_dir": folder, "max_epochs": 1} | options)


def module(root, **options):
    return FolderDataModule(root, **{"batch_size": 4, "image_size": 8, "workers": 0} | options)


# ----------------------------------------------------------------------------------------------------- without a trainer


def test_classes_need_no_setup(pictures):
    data = module(pictures)
    assert data.classes == ["cat", "dog"]
    assert data.num_classes == 2
    assert not data.has_test


def test_evaluation_batches_are_the_pictures_in_order(pictures):
    data = module(pictures, val_fraction=0.25, eval_batch_size=4)
    batches = list(data.val_dataloader())
    assert [len(batch["label"]) for batch in batches] == [4, 2]
    together = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    assert {key: (value.dtype, tuple(value.shape)) for key, value in together.items()} == {
        "image": (torch.uint8, (6, 3, 8, 8)),
        "label": (torch.int64, (6,)),
        "index": (torch.int64, (6,)),
    }
    assert together["index"].tolist() == list(range(6))
    transform = eval_transform(InputSpec(8, (0, 0, 0), (1, 1, 1), "bilinear", 0.875))
    for image, label, file in zip(together["image"], together["label"], data.files("val"), strict=True):
        assert torch.equal(image, transform(read_image(file)))
        assert data.classes[label] == file.parent.name
    assert data.labels("val") == together["label"].tolist()


def test_an_epoch_holds_each_training_picture_at_most_once(pictures):
    data = module(pictures, val_fraction=0.2)  # 20 training pictures
    loader = data.train_dataloader()
    first, again = ([batch["index"].tolist() for batch in loader] for _ in range(2))
    assert first == again  # without a trainer the epoch is that of set_epoch
    assert sorted(index for batch in first for index in batch) == list(range(20))
    loader.sampler.set_epoch(1)
    assert [batch["index"].tolist() for batch in loader] != first


@pytest.mark.parametrize(("batch_size", "sizes"), [(3, [3] * 6), (19, [19]), (20, [20]), (100, [20])])
def test_an_incomplete_last_batch_is_left_out(pictures, batch_size, sizes):
    """BatchNorm fails on a batch of one picture."""
    loader = module(pictures, batch_size=batch_size).train_dataloader()
    assert [len(batch["label"]) for batch in loader] == sizes
    assert len(loader) == len(sizes)


@pytest.mark.parametrize("augment", ["light", "strong"])
def test_augmentation_depends_on_seed_epoch_and_picture_alone(pictures, augment, monkeypatch):
    dataset = module(pictures, augment=augment).train_dataloader().dataset
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = [dataset[(epoch, 3)]["image"] for epoch in (0, 1)]
    assert torch.equal(torch.get_rng_state(), state)  # the run's own stream is left alone
    torch.manual_seed(6)
    dataset[(0, 7)]
    assert torch.equal(dataset[(0, 3)]["image"], first[0])
    assert not torch.equal(first[0], first[1])
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert torch.equal(dataset[(0, 3)]["image"], first[0])  # the seed is that of when the loader was made
    other = module(pictures, augment=augment).train_dataloader().dataset
    assert not torch.equal(other[(0, 3)]["image"], first[0])


def test_workers_change_nothing(pictures):
    loaders = [module(pictures, augment="strong", workers=workers).train_dataloader() for workers in (0, 2)]
    for ours, theirs in zip(*loaders, strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_number_of_workers(pictures, monkeypatch):
    monkeypatch.setattr("finetune.data.worker_count", lambda: 1)
    few, many = module(pictures, workers=None), FolderDataModule()
    assert few.train_dataloader().num_workers == 0
    assert many.train_dataloader().num_workers == 1
    assert module(pictures, workers=2).train_dataloader().num_workers == 2


def test_built_in_digits():
    data = FolderDataModule(workers=0)
    assert data.classes == [str(digit) for digit in range(10)]
    assert [len(data.files(split)) for split in ("train", "val", "test")] == [1259, 269, 269]
    assert data.has_test
    assert data.input_spec.size == 64
    assert data.hflip is False
    batch = next(iter(data.test_dataloader()))
    assert batch["image"].shape == (64, 3, 64, 64)
    assert FolderDataModule("digits", image_size=32, hflip=True).input_spec.size == 32


def test_a_path_is_a_folder_also_if_it_is_called_like_built_in_data(tmp_path, monkeypatch, pictures):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").symlink_to(pictures)
    assert FolderDataModule(Path("digits")).num_classes == 2
    assert FolderDataModule("./digits").num_classes == 2
    assert FolderDataModule("digits").num_classes == 10


def test_mistakes_are_named(pictures, tmp_path):
    for options, message in [
        ({"batch_size": 0}, "Expected data.batch_size to be at least 1, found 0"),
        ({"eval_batch_size": 0}, "Expected data.eval_batch_size to be at least 1, found 0"),
        ({"image_size": -1}, "Expected data.image_size to be at least 1, found -1"),
        ({"workers": -1}, "Expected data.workers to be 0 or more, found -1"),
        ({"augment": "strnog"}, r"Unknown data.augment 'strnog'\. Did you mean 'strong'"),
        ({"val_fraction": 0.6, "test_fraction": 0.4}, r"together below 1, found 0\.6 and 0\.4"),
        ({"val_fraction": 20}, "together below 1, found 20"),
    ]:
        with pytest.raises(ConfigError, match=message):
            FolderDataModule(pictures, **options)
    with pytest.raises(DataError, match=r"has no test split: expected a folder .*/test/<class>/, or data.test_fraction"):
        module(pictures).test_dataloader()
    with pytest.raises(
        DataError, match=r"no folder digtis .* Did you mean 'digits'\? Expected a folder, or built-in data: digits"
    ):
        FolderDataModule("digtis").num_classes  # noqa: B018


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_cannot_be_read_is_named_without_a_traceback(tmp_path, workers):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "empty.png").touch()
    with pytest.raises(DataError) as caught:
        list(module(tmp_path, val_fraction=0, workers=workers).train_dataloader())
    assert type(caught.value) is PictureError
    assert str(caught.value).startswith(str(tmp_path))
    assert "Traceback" not in str(caught.value)


# -------------------------------------------------------------------------------------------------------- with a trainer


class Other(ModelCheckpoint):
    """A second callback that keeps checkpoints must be of another class."""


@pytest.fixture(scope="module", params=[0.17, 0.0], ids=["validation", "no_validation"])
def whole_run(request, pictures, tmp_path_factory):
    """Three epochs, with a checkpoint after every batch and every epoch."""
    folder = tmp_path_factory.mktemp("run")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        kept = [
            ModelCheckpoint(folder / "kept", filename="batch{step}", every_n_train_steps=1, save_top_k=-1),
            Other(folder / "kept", filename="epoch{step}", every_n_epochs=1, save_top_k=-1),
        ]
        model, data = Recorder(), module(pictures, augment="medium", batch_size=6, val_fraction=request.param)
        L.seed_everything(3, verbose=False)
        trainer(folder, max_epochs=3, callbacks=kept, enable_checkpointing=True).fit(model, data)
    return folder / "kept", model.seen, request.param


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("early", [False, True], ids=["", "early_loaders"])
@pytest.mark.parametrize("kept", ["batchstep=1", "batchstep=3", "epochstep=3", "batchstep=5"])
def test_a_resumed_run_sees_what_the_whole_run_saw(pictures, tmp_path, whole_run, kept, early, workers):
    """Trap 41, and with `early` also what a module does that asks for the number of steps in `configure_optimizers`."""
    folder, seen, val_fraction = whole_run
    per_epoch = len(seen) // 3
    assert len(seen) == 3 * per_epoch
    assert [entry[:2] for entry in seen] == [(epoch, batch) for epoch in range(3) for batch in range(per_epoch)]
    assert seen[0][2] != seen[per_epoch][2]
    steps = int(kept.partition("=")[2])
    if "epoch" in kept:
        steps = per_epoch * (steps // 3)
        kept = f"epochstep={steps}"
    model = Recorder(early)
    data = module(pictures, augment="medium", batch_size=6, val_fraction=val_fraction, workers=workers)
    L.seed_everything(3, verbose=False)
    torch.manual_seed(99)
    trainer(tmp_path, max_epochs=3).fit(model, data, ckpt_path=folder / f"{kept}.ckpt", weights_only=True)
    assert model.seen == seen[steps:]


def test_a_resumed_run_with_other_pictures_says_so(pictures, tmp_path, whole_run):
    folder, _, val_fraction = whole_run
    L.seed_everything(4, verbose=False)  # another order; another batch size alone shows each picture once
    data = module(pictures, batch_size=5, val_fraction=val_fraction)
    with pytest.warns(UserWarning, match="some pictures are seen twice or not at all"):
        trainer(tmp_path, max_epochs=1).fit(Recorder(), data, ckpt_path=folder / "batchstep=1.ckpt", weights_only=True)


def test_checkpoints_hold_plain_values_and_bring_the_module_back(pictures, whole_run):
    """Trap 21: a Path among the hyper-parameters cannot be loaded."""
    folder, _, val_fraction = whole_run
    checkpoint = torch.load(folder / "batchstep=1.ckpt", weights_only=True)
    assert checkpoint["datamodule_hyper_parameters"]["root"] == str(pictures)
    data = FolderDataModule.load_from_checkpoint(folder / "batchstep=1.ckpt")
    assert (data.root, data.batch_size, data.val_fraction) == (str(pictures), 6, val_fraction)


def test_size_comes_from_the_model_unless_it_is_given(pictures, tmp_path):
    class Sized(Recorder):
        input_spec = InputSpec(12, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), "bicubic", 0.9)

    for image_size, size in ((None, 12), (10, 10)):
        data = FolderDataModule(pictures, batch_size=4, image_size=image_size, workers=0)
        trainer(tmp_path, limit_train_batches=1).fit(Sized(), data)
        assert data.input_spec == InputSpec(size, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), "bicubic", 0.9)
        assert next(iter(data.train_dataloader()))["image"].shape == (4, 3, size, size)
    data = FolderDataModule(pictures)
    trainer(tmp_path, limit_train_batches=1).fit(Recorder(), data)
    assert data.input_spec == InputSpec.default()


def test_a_drawn_split_is_written_into_the_runs_folder(pictures, tmp_path):
    logger = CSVLogger(tmp_path, name="run", version="one")
    data = module(pictures)
    trainer(tmp_path, logger=logger, log_every_n_steps=1).fit(Recorder(), data)
    with (tmp_path / "run/one/split.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["file"] for row in rows if row["split"] == "val"} == {
        path.relative_to(pictures).as_posix() for path in data.files("val")
    }
    assert Counter(row["split"] for row in rows) == {"train": 20, "val": 4}


def test_nothing_is_written_into_the_working_folder(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer(None).fit(Recorder(), module(pictures))
    trainer(None, fast_dev_run=True).fit(Recorder(), module(pictures))
    assert list(tmp_path.iterdir()) == []


def test_the_table_is_printed_for_fit_alone(pictures, tmp_path, capsys):
    data = module(pictures, test_fraction=0.1)
    fit = trainer(tmp_path)
    fit.fit(Recorder(), data)
    assert ["total", "18", "4", "2"] in [line.split() for line in capsys.readouterr().out.splitlines()]
    fit.validate(fit.lightning_module, data, verbose=False)
    fit.test(fit.lightning_module, data, verbose=False)
    assert "total" not in capsys.readouterr().out


def test_overfitting_one_batch_needs_no_warning(pictures, tmp_path):
    model = Recorder()
    data = module(pictures)
    trainer(tmp_path, overfit_batches=1, max_epochs=2).fit(model, data)
    first, second = (entry[2] for entry in model.seen)
    assert first == second
    assert sorted(data.labels("train")[index] for index in first) == [0, 0, 1, 1]
