"""Mixup and CutMix against mixtures computed from the pictures and the labels that come out."""

import lightning as L
import pytest
import torch

from finetune import ConfigError, FinetuneModule, FolderDataModule
from finetune.mixing import Mixing


def pictures(number=6, size=8):
    images = torch.randint(0, 256, (number, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    return images, torch.arange(number)  # each picture is its own class, so that targets say what was mixed with what


def test_mixup_is_the_convex_combination_that_its_targets_say_also_behind_the_normalisation():
    images, labels = pictures()
    torch.manual_seed(5)
    mixed, targets = Mixing(0.4, 0, 6, 1.0)(images, labels)
    assert torch.allclose(targets.sum(1), torch.ones(6))
    assert (targets > 0).sum(1).max() == 2
    shares = targets.double()
    expected = torch.einsum("nk,kchw->nchw", shares, images.double() / 255)
    assert torch.allclose(mixed.double(), expected, atol=1e-6)
    module = FinetuneModule("test_resnet", num_classes=6, weights="none")
    behind = torch.einsum("nk,kchw->nchw", shares, module.normalise(images).double())
    assert torch.allclose(module.normalise(mixed).double(), behind, atol=1e-5)


def test_cutmix_pastes_the_share_of_pixels_that_its_targets_say():
    images, labels = pictures(size=16)
    torch.manual_seed(1)
    mixed, targets = Mixing(0, 1.0, 6, 1.0)(images, labels)
    for picture, target, label in zip(mixed, targets, labels, strict=True):
        own = (picture == images[label].float() / 255).all(0)
        assert own.float().mean().item() == pytest.approx(target[label].item(), abs=1e-6)


def test_both_take_turns():
    images, labels = pictures()
    mixing = Mixing(0.4, 1.0, 6, 1.0)
    ways = set()
    for seed in range(20):
        torch.manual_seed(seed)
        mixed, _ = mixing(images, labels)
        ways.add(
            bool(
                (mixed == images.float() / 255).flatten(1).all(1).any() or (mixed == images.float() / 255).float().mean() > 0.2
            )
        )
    assert ways == {True, False}


class Seen(FinetuneModule):
    """Keeps what the loss gets."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen = []

    def loss(self, logits, labels):
        self.seen.append((self.training, self.current_epoch, labels.ndim))
        return super().loss(logits, labels)


def test_the_last_epochs_and_validation_see_plain_pictures():
    data = FolderDataModule("digits", batch_size=256, image_size=32, workers=0, augment="none")
    module = Seen(backbone="test_resnet", num_classes=10, weights="none", mixup=0.2, mix_share=0.5)
    trainer = L.Trainer(
        max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(module, datamodule=data)
    assert {(training, epoch, ndim) for training, epoch, ndim in module.seen} == {
        (True, 0, 2),
        (True, 1, 1),
        (False, 0, 1),
        (False, 1, 1),
    }


def test_a_run_that_is_limited_by_steps_is_mixed_too():
    L.seed_everything(0, verbose=False)
    data = FolderDataModule("digits", batch_size=64, image_size=32, workers=0, shots=20)
    module = FinetuneModule("test_resnet", num_classes=10, weights="none", mixup=0.4)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    seen = []
    module.loss = lambda logits, labels: seen.append(labels.ndim) or FinetuneModule.loss(module, logits, labels)
    L.Trainer(max_steps=6, limit_train_batches=2, limit_val_batches=0, **quiet).fit(module, datamodule=data)
    assert seen == [2, 2, 2, 2, 1, 1]


def test_what_is_kept_cannot_be_mixed():
    data = FolderDataModule("digits", batch_size=256, image_size=32, workers=0, augment="none", reuse="exact")
    module = FinetuneModule("test_resnet", num_classes=10, weights="none", freezing="head", mixup=0.2)
    trainer = L.Trainer(
        max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    with pytest.raises(ConfigError, match=r"set data\.reuse off"):
        trainer.fit(module, datamodule=data)
