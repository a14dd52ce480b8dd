"""What users write without the toolkit: Lightning, ImageFolder, PIL transforms, and a frozen backbone in eval mode."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

STAGES = ["stem", "layer1", "layer2", "layer3", "layer4", "fc"]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Classifier(L.LightningModule):
    """A timm ResNet of which the last stages train; with `every`, one more stage every so many epochs."""

    def __init__(self, backbone: str, classes: int, trained: int, epochs: int, every: int = 0) -> None:
        super().__init__()
        self.model = timm.create_model(backbone, num_classes=classes)
        self.trained, self.epochs, self.every = trained, epochs, every
        self.freeze_to(trained)

    def parts(self) -> list[list[nn.Module]]:
        """Return the modules of each stage."""
        model = self.model
        return [[model.conv1, model.bn1], [model.layer1], [model.layer2], [model.layer3], [model.layer4], [model.fc]]

    def freeze_to(self, trained: int) -> None:
        """Let the last stages train, and freeze the others."""
        self.trained = trained
        for index, modules in enumerate(self.parts()):
            trains = index >= len(STAGES) - trained
            for module in modules:
                module.requires_grad_(trains)
                module.train(trains and self.training)

    def on_train_epoch_start(self) -> None:
        """Keep what is frozen in eval mode; thaw one more stage if it is time."""
        thawed = 1 + self.current_epoch // self.every if self.every else self.trained
        self.freeze_to(min(thawed, len(STAGES)))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Return the loss."""
        images, labels = batch
        loss = nn.functional.cross_entropy(self.model(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        """Log loss and accuracy."""
        images, labels = batch
        logits = self.model(images)
        self.log("val_loss", nn.functional.cross_entropy(logits, labels))
        self.log("val_acc", (logits.argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> dict[str, object]:
        """Return SGD with a cosine schedule."""
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, nesterov=True)
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs),
        }


def loaders(root: Path, size: int, batch_size: int, workers: int) -> tuple[DataLoader, DataLoader]:
    """Return training and validation batches."""
    transform = transforms.Compose(
        [
            transforms.Resize(round(size / 0.875)),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    options = {"batch_size": batch_size, "num_workers": workers, "persistent_workers": workers > 0}
    train = DataLoader(datasets.ImageFolder(str(root / "train"), transform), shuffle=True, drop_last=True, **options)
    return train, DataLoader(datasets.ImageFolder(str(root / "val"), transform), **options)
