"""Keep what the toolkit makes once (the built-in digits) out of the user's cache, and tests off the network."""

import os
import shutil
import socket
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import timm
import torch
from PIL import Image

from finetune.card import write_weights
from finetune.module import FinetuneModule

VARIABLE = "RESNET_FINETUNE_CACHE"


def pytest_configure(config):
    config.own_cache = os.environ[VARIABLE] = tempfile.mkdtemp(prefix="resnet-finetune-tests-")


def pytest_unconfigure(config):
    shutil.rmtree(config.own_cache, ignore_errors=True)


@pytest.fixture
def no_network(monkeypatch):
    """Fail on any use of the network, also in threads, where the failure itself would go unnoticed."""
    used = []

    def refuse(*args, **_):
        used.append(args)
        raise AssertionError(f"network used: {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    yield
    assert not used


@pytest.fixture
def empty_caches(tmp_path, monkeypatch):
    """Let the caches of the hub and of torch be new folders below `tmp_path`."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path


INPUT = {"size": 48, "mean": [0.5, 0.4, 0.3], "std": [0.25, 0.5, 0.125], "interpolation": "bicubic", "crop": 0.75}


@pytest.fixture
def bundled(tmp_path, monkeypatch):
    """Let one backbone come along, `test_resnet` in half precision with an input of its own; return the network it is from."""
    folder = tmp_path / "bundled"
    folder.mkdir()
    torch.manual_seed(5)
    origin = timm.create_model("test_resnet", num_classes=0)
    for parameter in origin.parameters():
        parameter.data = parameter.data.half().float()  # so that nothing is lost in the file
    card = {"architecture": "test_resnet", "input": INPUT, "teacher": {"name": "a_teacher"}}
    write_weights(folder / "test_resnet.safetensors", origin.state_dict(), card, torch.float16)
    monkeypatch.setattr("finetune.bundled_weights.FOLDER", folder)
    return origin.eval()


@pytest.fixture
def offline(empty_caches, monkeypatch):
    """Nothing is cached, and the hub is not asked."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return empty_caches


# ----------------------------------------------------------------------------------------- a trained model, and pictures

CLASSES = ["bee", "ant, red", "wasp", "fly"]
SIZES = {"b/2.png": (40, 30), "b/10.png": (30, 50), "b/A.jpg": (36, 36), "c.webp": (64, 33), "a.bmp": (31, 31)}


OWN = """
from finetune import FinetuneModule


class Doubled(FinetuneModule):
    def __init__(self, factor: float = 2.0, **options):
        super().__init__(**options)
        self.factor = factor

    def forward(self, images):
        return self.factor * super().forward(images)
"""


def save(model, path):
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=path.parent)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)


def scrambled(model):
    """Give a network statistics and a head unlike those it starts with, so that its answers differ from picture to picture."""
    generator = torch.Generator().manual_seed(5)
    images = torch.nn.functional.interpolate(torch.rand(64, 3, 4, 4, generator=generator), 32, mode="bilinear")
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.weight, 0.5, 1.5, generator=generator)
    with torch.no_grad():
        for _ in range(20):
            model.train()(images)  # moves the statistics to those of pictures
        model.head.weight.copy_(torch.randn(model.head.weight.shape, generator=generator))
        model.head.weight.mul_(1 / model.eval()(images).std(0).mean())
        model.head.bias.sub_(model(images).mean(0))
    model.input_spec = replace(model.input_spec, size=32, crop=0.9)
    return model


@pytest.fixture
def own_class(world):
    """Save a model of a class of the user as a checkpoint; return its path and the model."""
    (world / "my_doubled.py").write_text(OWN)
    sys.path.insert(0, str(world))
    from my_doubled import Doubled

    model = scrambled(Doubled(factor=3.0, backbone="test_resnet", num_classes=4, weights="none"))
    save(model, world / "own.ckpt")
    yield world / "own.ckpt", model
    sys.modules.pop("my_doubled", None)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A run with two checkpoints that differ, and a folder of pictures; the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    torch.manual_seed(0)
    model = scrambled(FinetuneModule("test_resnet", num_classes=4, class_names=CLASSES, weights="none"))
    save(model, tmp_path / "runs" / "mine" / "1" / "checkpoints" / "best.ckpt")
    with torch.no_grad():
        model.head.bias.add_(torch.tensor([0.0, 50.0, 0.0, 0.0]))
    save(model, tmp_path / "runs" / "mine" / "1" / "checkpoints" / "last.ckpt")
    rng = np.random.default_rng(0)
    for name, (width, height) in SIZES.items():
        Path("new", name).parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(Path("new", name))
    return tmp_path
