"""Grey values of 10 to 14 bits in 16-bit files: what a sample says of them, and the model that keeps it."""

import json

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from finetune import FinetuneModule, FolderDataModule
from finetune.depth import Depth, depth_text, sampled_depth
from finetune.predictor import Predictor
from finetune.trained import facts
from finetune.transforms import InputSpec


@pytest.fixture
def photos(tmp_path):
    """Two classes of 16-bit images with values of 12 bits."""
    random = np.random.default_rng(0)
    for number in range(8):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = random.integers(0, 4096, (32, 32), dtype=np.uint16)
        values[0, 0] = 4095
        Image.fromarray(values).save(path)
    return tmp_path / "photos"


@pytest.mark.parametrize(
    ("highest", "white"), [(0, 65535), (255, 255), (256, 1023), (4095, 4095), (4096, 16383), (16384, 65535)]
)
def test_white_is_the_largest_value_of_the_bits_that_are_needed(tmp_path, highest, white):
    Image.fromarray(np.array([[0, highest]], np.uint16)).save(tmp_path / "a.tif")
    Image.new("L", (2, 1)).save(tmp_path / "b.png")
    Image.new("RGB", (2, 1)).save(tmp_path / "c.jpg")
    (tmp_path / "d.png").write_bytes(b"no image")
    depth = sampled_depth(tmp_path, ["a.tif", "b.png", "c.jpg", "d.png"])
    assert depth == Depth(1, highest)
    assert depth.white == white


def test_what_is_lost_is_said_and_what_to_type():
    assert depth_text(Depth(3, 4095), "full") == (
        "warning: 16-bit grey is scaled by 65535, but the largest value of 3 sampled images is 4095: 17 of 256 grey values are "
        "left. To scale it as 12 bits, also when the model predicts: --data.scale auto"
    )
    assert depth_text(Depth(3, 60000), "full") == depth_text(Depth(0, 0), "full") == ""


def fit(folder, photos, **options):
    data = FolderDataModule(photos, batch_size=2, image_size=32, workers=0, augment="none", **options)
    module = FinetuneModule("test_resnet", num_classes=2, weights="none")
    trainer = L.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=folder,
    )
    trainer.fit(module, data)
    trainer.save_checkpoint(folder / "model.ckpt")
    return data, next(iter(data.val_dataloader()))["image"], Predictor(folder / "model.ckpt", device="cpu")


def test_the_model_keeps_how_its_images_were_scaled(tmp_path, photos, capsys):
    data, images, predictor = fit(tmp_path, photos, scale="auto")
    assert "16-bit grey is scaled as 12 bits: 4095 is white" in capsys.readouterr().out
    file = data.files("val")[0]
    wanted = np.rint(np.asarray(Image.open(file)).astype(float) * 255 / 4095)
    spec = predictor.trained.input_spec
    assert spec.white == json.loads(facts(predictor.trained))["input"]["white"] == 4095
    resized = predictor.transform(torch.from_numpy(wanted.astype(np.uint8)).expand(3, -1, -1))
    assert torch.equal(images[0], resized)
    with torch.inference_mode():
        logits = predictor.trained.module(resized[None])
    assert np.allclose(predictor.probabilities([file]), logits.softmax(1).numpy(), atol=1e-6)
    (streamed,) = (answer for batch in predictor.stream([str(file)], workers=0) for answer in batch)
    assert np.allclose(streamed.values, predictor.probabilities([file])[0], atol=1e-6)


def test_by_default_16_bits_are_scaled_by_all_of_them(tmp_path, photos, capsys):
    _, _, predictor = fit(tmp_path, photos)
    assert "--data.scale auto" in capsys.readouterr().out
    assert predictor.trained.input_spec.white == 65535
    plain = {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "crop": 0.875}
    assert InputSpec.from_plain(plain).white == 65535  # a checkpoint of an older version
