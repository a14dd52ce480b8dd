"""A loss that is not finite: the pictures and the stage by name, nothing touched by the step, and an end if it goes on."""

import sys

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import nn

from finetune import FinetuneModule, FolderDataModule, TrainingError
from finetune.main import main
from finetune.nonfinite import NonFiniteLoss, first_stage

BACKBONE = '''
import torch
from torch import nn


class Contrast(nn.Module):
    """Divide by the contrast of a picture, which is 0 where all pixels are alike."""

    def forward(self, x):
        return (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), correction=0, keepdim=True)


class Fragile(nn.Module):
    def __init__(self, num_classes: int = 2):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.middle = nn.Sequential(Contrast(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.top = nn.Sequential(nn.Conv2d(6, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(8, num_classes)

    def forward(self, images):
        return self.fc(self.top(self.middle(self.stem(images))))
'''
FIT = ["fit", "--model.backbone", "fragile_backbone.Fragile", "--model.weights", "none", "--data.root", "photos"]
FIT += ["--data.image_size", "16", "--data.batch_size", "4", "--data.workers", "0", "--data.augment", "none"]
FIT += [
    "--trainer.accelerator",
    "cpu",
    "--run.name",
    "x",
    "--run.gradients_every",
    "0",
    "--trainer.enable_progress_bar",
    "false",
]
QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
pytestmark = pytest.mark.filterwarnings("ignore:.*smaller than the logging interval")


@pytest.fixture(autouse=True)
def photos(tmp_path, monkeypatch):
    """Pictures of noise, one of them of a single colour."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "fragile_backbone.py").write_text(BACKBONE)
    generator = torch.Generator().manual_seed(0)
    for split, number in (("train", 8), ("val", 2)):
        for name in ("a", "b"):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for index in range(number):
                pixels = torch.randint(256, (16, 16, 3), generator=generator, dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(folder / f"{index}.png")
    Image.new("RGB", (16, 16), (90, 90, 90)).save(tmp_path / "photos" / "train" / "b" / "=flat.png")
    return tmp_path


def test_stop_names_picture_and_stage_and_keeps_the_last_checkpoint(photos, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*FIT, "--trainer.max_epochs", "3", "--data.batch_size", "2"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "loss is not finite in epoch 1, step " in said
    assert "it began in middle." in said
    assert "photos/train/b/=flat.png" in said
    assert "--model.lr" in said
    assert "--run.on_nonfinite skip" in said
    assert "Traceback" not in said


def test_skip_goes_on(photos, capsys):
    main([*FIT, "--trainer.max_epochs", "2", "--run.on_nonfinite", "skip"])
    said = capsys.readouterr().out
    assert said.count("The step is left out") == 2  # once in each epoch
    assert "=flat.png" in said
    assert "nan" not in said
    (last,) = photos.glob("runs/x/*/checkpoints/last.ckpt")
    assert all(value.isfinite().all() for value in torch.load(last, weights_only=True)["state_dict"].values())


class Compare(Callback):
    """Everything before and after each step."""

    def __init__(self):
        self.same = []

    def state(self, trainer, module):
        momentum = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
        tensors = [*module.parameters(), *(b for b in module.buffers() if b.is_floating_point()), *momentum]
        return [value.detach().clone() for value in tensors if isinstance(value, torch.Tensor)]

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.before = self.state(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, *_):
        after = self.state(trainer, pl_module)
        self.same.append(len(after) == len(self.before) and all(map(torch.equal, self.before, after)))


@pytest.mark.parametrize("window", [1, 2])
def test_a_step_that_is_left_out_changes_nothing(window):
    data = FolderDataModule("photos", batch_size=2, augment="none", image_size=16, workers=0)
    model = FinetuneModule("fragile_backbone.Fragile", num_classes=2, weights="none", bn="train", lr=0.1)
    compare, watch = Compare(), NonFiniteLoss("skip")
    L.Trainer(max_epochs=2, callbacks=[watch, compare], accumulate_grad_batches=window, **QUIET).fit(model, data)
    assert watch.skipped == 2
    if window == 1:
        assert compare.same.count(True) == 2
        assert compare.same.index(True) > 0  # there was momentum to keep
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_many_in_a_row_stop():
    for path in ("a", "b"):
        for index in range(8):
            Image.new("RGB", (16, 16)).save(f"photos/train/{path}/{index}.png")
    data = FolderDataModule("photos", batch_size=1, augment="none", image_size=16, workers=0)
    model = FinetuneModule("fragile_backbone.Fragile", num_classes=2, weights="none", bn="frozen")
    watch = NonFiniteLoss("skip")
    with pytest.raises(TrainingError, match=r"10 steps in a row were left out\."):
        L.Trainer(max_epochs=2, callbacks=[watch], **QUIET).fit(model, data)
    assert watch.skipped == 10


class Breaks(Callback):
    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.is_last_batch and trainer.current_epoch == self.epoch:
            with torch.no_grad():
                pl_module.backbone.top[0].weight[0] = float("inf")


def test_weights_that_are_not_finite_are_never_kept(photos):
    (photos / "photos" / "train" / "b" / "=flat.png").unlink()
    data = FolderDataModule("photos", batch_size=2, augment="none", image_size=16, workers=0)
    model = FinetuneModule("fragile_backbone.Fragile", num_classes=2, weights="none")
    options = {**QUIET, "enable_checkpointing": True, "default_root_dir": photos / "kept"}
    with pytest.raises(TrainingError, match=r"weights of top are not finite after step 16\. No checkpoint is written"):
        L.Trainer(max_epochs=3, callbacks=[NonFiniteLoss("skip"), Breaks(1)], **options).fit(model, data)
    (kept,) = photos.glob("kept/**/*.ckpt")
    assert torch.load(kept, weights_only=True)["epoch"] == 0

    model = FinetuneModule("fragile_backbone.Fragile", num_classes=2, weights="none")
    with pytest.raises(TrainingError, match=r"epoch 2, step 9: the weights of top are not finite already"):
        L.Trainer(max_epochs=3, callbacks=[NonFiniteLoss("skip"), Breaks(0)], **QUIET).fit(model, data)


def test_the_stage_where_it_begins():
    model = FinetuneModule("fragile_backbone.Fragile", num_classes=2, weights="none").train()
    noise = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(2, dtype=torch.long)
    before = [buffer.clone() for buffer in model.buffers()]
    assert first_stage(model, (noise, labels)) is None
    assert first_stage(model, (torch.full_like(noise, 0.5), labels)) == "middle"
    assert first_stage(model, (torch.full_like(noise, float("nan")), labels)) == "the input"
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    assert first_stage(model, (noise, labels)) == "head"
    assert all(map(torch.equal, before, model.buffers()))  # it left no trace
    assert first_stage(L.LightningModule(), (noise, labels)) is None


def test_a_module_of_somebody_else():
    class Theirs(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch).sum() / 0

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-3)

    loader = torch.utils.data.DataLoader(torch.ones(4, 1))
    with pytest.raises(TrainingError, match=r"epoch 1, step 1\. The last checkpoint"):
        L.Trainer(max_epochs=1, callbacks=[NonFiniteLoss()], **QUIET).fit(Theirs(), loader)
