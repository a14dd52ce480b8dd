"""Trainer.predict, in every form that Lightning offers: the probabilities that Predictor finds for the same images."""

from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from finetune import FinetuneModule, FolderDataModule, Predictor
from finetune.calibration import store_temperature
from finetune.distill import DistillModule
from finetune.errors import CheckpointError, ConfigError, DataError
from finetune.images import read_image
from finetune.predicting import images_of
from finetune.trained import load_model
from finetune.transforms import eval_transform
from finetune.walk import Pictures

RUN = "runs/mine/1"
BEST = f"{RUN}/checkpoints/best.ckpt"
pytestmark = [pytest.mark.filterwarnings("ignore:.*does not have many workers"), pytest.mark.usefixtures("world")]


def trainer():
    return L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)


def fresh():
    torch.manual_seed(77)
    return FinetuneModule("test_resnet", num_classes=4, weights="none")


def probabilities(batches):
    return torch.cat(batches).numpy()


def labelled(world):
    """A folder of the model's classes with two images each, and the files in the order of the data module."""
    for place, name in enumerate(("bee", "ant, red", "wasp", "fly")):
        for number, picture in enumerate(sorted((world / "new").rglob("*.*"))[place : place + 2]):
            target = world / "photos" / "test" / name / f"{number}{picture.suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(picture.read_bytes())
            other = world / "photos" / "train" / name / target.name
            other.parent.mkdir(parents=True, exist_ok=True)
            other.write_bytes(picture.read_bytes())
    return FolderDataModule("photos", batch_size=3, eval_batch_size=3, workers=0)


@pytest.fixture
def images():
    spec = load_model(RUN).input_spec
    files = [f"new/{name}" for name in ("b/2.png", "b/10.png", "b/A.jpg", "c.webp", "a.bmp")]
    return files, torch.stack([eval_transform(spec)(read_image(file)) for file in files])


def test_a_data_module(world):
    data = labelled(world)
    model = load_model(RUN)
    model.class_names = None  # the folder's order of classes is another one, which says nothing about images
    found = probabilities(trainer().predict(model, data))
    files = [str(path) for path in data.files("test")]
    assert len(files) == 8
    np.testing.assert_allclose(found, Predictor(RUN).probabilities(files), atol=1e-6)


def test_a_data_module_with_a_checkpoint_that_expects_another_input(world):
    data = labelled(world)
    model = fresh()
    assert model.input_spec != load_model(RUN).input_spec
    found = probabilities(trainer().predict(model, datamodule=data, ckpt_path=BEST, weights_only=True))
    np.testing.assert_allclose(found, Predictor(BEST).probabilities([str(path) for path in data.files("test")]), atol=1e-6)


def test_a_folder_without_classes(images):
    data = FolderDataModule("new/b", eval_batch_size=2, workers=0)
    loaded = trainer()
    found = probabilities(loaded.predict(load_model(RUN), data))
    np.testing.assert_allclose(found, Predictor(RUN).probabilities(Pictures(["new/b"]).all()), atol=1e-6)
    assert "label" not in next(iter(data.predict_dataloader()))


@pytest.mark.parametrize("form", ["images", "pairs", "mappings", "mappings with labels", "two loaders"])
def test_dataloaders(images, form):
    files, stack = images
    labels = torch.zeros(len(stack), dtype=torch.long)
    items = {
        "images": list(stack),
        "pairs": TensorDataset(stack, labels),
        "mappings": [{"image": image} for image in stack],
        "mappings with labels": [{"image": image, "label": 0} for image in stack],
        "two loaders": TensorDataset(stack),
    }[form]
    loader = DataLoader(items, batch_size=2)
    expected = Predictor(RUN).probabilities(files)
    if form == "two loaders":
        for found in trainer().predict(load_model(RUN), dataloaders=[loader, loader]):
            np.testing.assert_allclose(probabilities(found), expected, atol=1e-6)
    else:
        np.testing.assert_allclose(probabilities(trainer().predict(load_model(RUN), dataloaders=loader)), expected, atol=1e-6)


def test_a_checkpoint_brings_its_temperature(images):
    files, stack = images
    loader = DataLoader(TensorDataset(stack), batch_size=2)
    plain = probabilities(trainer().predict(fresh(), loader, ckpt_path=BEST, weights_only=True))
    np.testing.assert_allclose(plain, Predictor(BEST).probabilities(files), atol=1e-6)
    store_temperature(Path(BEST), 2.5, step=0, details={})
    calibrated = probabilities(trainer().predict(fresh(), loader, ckpt_path=BEST, weights_only=True))
    np.testing.assert_allclose(calibrated, Predictor(BEST).probabilities(files), atol=1e-6)
    assert np.abs(calibrated - plain).max() > 0.01


def test_a_module_of_the_user(own_class, images):
    path, model = own_class
    files, stack = images
    found = probabilities(trainer().predict(model, DataLoader(TensorDataset(stack))))
    np.testing.assert_allclose(found, Predictor(path).probabilities(files), atol=1e-6)


def test_what_cannot_be_predicted_says_why(world, images):
    loader = DataLoader(TensorDataset(images[1]))
    with pytest.raises(ConfigError, match="its head names no classes"):
        trainer().predict(DistillModule(backbone="test_resnet", num_classes=2, weights="none"), loader)
    with pytest.raises(DataError, match=r"'image', or a pair \(images, labels\); found a mapping with \['x'\]"):
        images_of({"x": 1})
    with pytest.raises(DataError, match=r"found Tensor of shape \(3, 8, 8\)"):
        images_of(torch.zeros(3, 8, 8))
    (world / "empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        trainer().predict(load_model(RUN), FolderDataModule("empty", workers=0))
    model = FinetuneModule("test_resnet", num_classes=4, class_names=list("abcd"), weights="none")
    with pytest.raises(CheckpointError, match="was trained on 4 classes"):
        trainer().predict(model, loader, ckpt_path=BEST, weights_only=True)
