"""Keep what the toolkit makes once (the built-in digits) out of the user's cache, and tests off the network."""

import os
import shutil
import socket
import tempfile

import pytest

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
