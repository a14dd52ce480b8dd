"""Keep what the toolkit makes once (the built-in digits) out of the user's cache, and tests off the network."""

import csv
import json
import os
import re
import shutil
import socket
import sys
import tempfile
from dataclasses import replace
from html.parser import HTMLParser
from importlib import metadata
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from finetune import package_weights
from finetune.card import write_weights
from finetune.module import FinetuneModule
from finetune.outcomes import Outcome, write_outcome

VARIABLE = "RESNET_FINETUNE_CACHE"


def pytest_configure(config):
    if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes that share the cores
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)
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


_INSTALLED = {Path(entry).resolve() for entry in sys.path}  # before a test adds folders of its own


class _MetadataWithoutOffline:
    """Metadata of installed packages, but for one that the extra `offline` may have brought; a test's own is found."""

    PackageNotFoundError = metadata.PackageNotFoundError

    @staticmethod
    def distribution(name):
        found = metadata.distribution(name)
        if Path(found.locate_file("")).resolve() in _INSTALLED:
            raise metadata.PackageNotFoundError(name)
        return found


@pytest.fixture(autouse=True)
def _without_offline_package(monkeypatch):
    """Whether the extra `offline` is installed makes no difference to any test."""
    monkeypatch.setattr(package_weights, "metadata", _MetadataWithoutOffline)


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


# ------------------------------------------------------------------------------------------------- the files of a past run

STAGES = ["stem", "layer1", "head"]


def _write_rows(path, rows):
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def _predictions(classes, files, seed):
    """Predictions that are right about three times out of four."""
    numbers = np.random.default_rng(seed)
    labels = np.arange(len(files)) % len(classes)
    scores = numbers.normal(size=(len(files), len(classes)))
    scores[np.arange(len(files)), labels] += 2.0
    shares = np.exp(scores)
    return Outcome(files, labels, shares / shares.sum(1, keepdims=True), tuple(classes))


@pytest.fixture
def past_run(tmp_path):
    """Return a function that writes the files of a run: 4 epochs of 10 steps, the head first, then everything."""

    def write(name="small/2026-01-31", classes=("cat", "dog", "owl"), pictures=60, lr=0.001, seed=0):
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        root = tmp_path / "photos"
        (root / "val").mkdir(parents=True, exist_ok=True)
        files = [f"val/{number}.png" for number in range(pictures)]
        for number, file in enumerate(files[:-5]):  # the last are not there
            Image.new("RGB", (20, 10), (number % 256, 99, 50)).save(root / file)
        model = {"class_path": "finetune.FinetuneModule", "init_args": {"backbone": "resnet18", "lr": lr, "freezing": "lp_ft"}}
        data = {"class_path": "finetune.FolderDataModule", "init_args": {"root": str(root), "augment": "light"}}
        run_options = {"monitor": "val/acc", "mode": None}
        config = {"seed_everything": 0, "trainer": {"max_epochs": 4}, "model": model, "data": data, "run": run_options}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        rates = [{"step": step, **_rates(step, lr)} for step in range(0, 40, 5)]
        ends = [
            {"step": 10 * epoch + 9, "epoch": epoch, **values}
            for epoch in range(4)
            for values in (
                {"val/loss": 1 / (epoch + 1), "val/acc": [0.5, 0.75, 0.8, 0.7][epoch]},
                {"train/loss": 1.5 / (epoch + 1), "train/acc": 0.2 * epoch},
            )
        ]
        _write_rows(run / "metrics.csv", [*rates, *ends, {"step": 40, "epoch": 4, "test/acc": 0.65}])
        gradients = [
            {"step": step, "stage": stage, "grad_norm": 0.1 * (place + 1), "update_ratio": 0.001, "distance": 0.01 * step}
            for step in range(0, 40, 10)
            for place, stage in enumerate(STAGES)
            if step >= 20 or stage == "head"
        ]
        _write_rows(run / "gradients.csv", gradients)
        (run / "record.json").write_text(json.dumps(_record(root, classes, lr)))
        write_outcome(_predictions(classes, files, seed), run / "predictions.val.csv")
        return run

    return write


def _rates(step, lr):
    return {"lr/stem": 0.0 if step < 20 else lr / 4, "lr/layer1": 0.0 if step < 20 else lr / 2, "lr/head": lr}


def _record(root, classes, lr):
    return {
        "format": 1,
        "command": ["fit", "--config", "small", "--data.root", str(root)],
        "state": "finished",
        "seconds": 75.0,
        "version": "0.1.0",
        "versions": {"torch": "2.9"},
        "git": {"commit": "abc123", "dirty": True},
        "hardware": "cpu, 2 cores",
        "data": {"root": str(root), "classes": list(classes), "counts": {"train": [40] * len(classes)}, "fingerprint": "beef"},
        "weights": {"source": "bundled", "summary": "weights: bundled resnet18"},
        "stages": [{"stage": stage, "parameters": 1000, "lr": lr, "trains_from_epoch": 0} for stage in STAGES],
        "phases": [{"start": 0, "end": 2, "train": ["head"]}, {"start": 2, "end": 4, "train": STAGES}],
        "monitor": "val/acc",
        "mode": "max",
        "best": {"value": 0.8, "epoch": 2, "checkpoint": "best.ckpt"},
        "test": {"test/acc": 0.65},
    }


_VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Elements with their attributes, the text, the rows of tables; fails where a tag is closed that is not open."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text, self.rows = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data.strip()

    def ids(self):
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]

    def assert_self_contained(self):
        """No element asks for anything outside, and none runs what the page did not ship; a link may lead to another file."""
        for tag, attributes in self.elements:
            for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster", "background"):
                value = attributes.get(name)
                link = tag == "a" and ":" not in (value or ":")
                assert value is None or link or value.startswith(("data:", "#")), (tag, name, value)
            assert not any(name.startswith("on") for name in attributes), (tag, attributes)
            assert "url(" not in (attributes.get("style") or "").replace("url(#", "")
        assert len(self.ids()) == len(set(self.ids()))
        styles = " ".join(self.text)
        assert "@import" not in styles
        assert not re.search(r"url\((?!#)", styles)


@pytest.fixture
def read_page():
    """Return a function that reads an HTML file with the parser of the standard library."""
    return lambda path: Page(path.read_text(encoding="utf-8"))
