"""Keep what the toolkit makes once (the built-in digits) out of the user's cache, and tests off the network."""

import os
import shutil
import socket
import tempfile

import pytest
import timm
import torch

from finetune.card import write_weights

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
