"""timm's weights: found in the caches without the network, or asked for within seconds."""

import socket
import threading
import time

import pytest
import timm
import torch
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError
from timm.models import PretrainedCfg
from torch import nn

from finetune import hub
from finetune.errors import WeightsError
from finetune.hub import available, cached_file, download, pretrained_cfg
from finetune.stages import split_head
from finetune.weights import load_weights

pytestmark = pytest.mark.usefixtures("empty_caches")


def load(source, name="test_resnet"):
    model = timm.create_model(name, num_classes=3)
    classifier, stages = split_head(model)
    head = nn.Linear(classifier.in_features, 3)
    return load_weights(model, head, source=source, backbone_name=name, classifier=classifier.name, stages=stages)


def test_hanging_name_resolution_is_not_waited_for(tmp_path, monkeypatch):
    released = threading.Event()

    def hang(*_, **__):
        released.wait(60)
        raise OSError("name resolution failed")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.5)
    start = time.monotonic()
    try:
        with pytest.raises(WeightsError, match=r"(?s)does not answer.*--model.weights FILE.*--model.weights none") as caught:
            load("auto")
        assert not available("test_resnet")
    finally:
        released.set()
    assert time.monotonic() - start < 5  # the requirement is itself a limit
    assert str(tmp_path / "hub" / "models--timm--test_resnet.r160_in1k") in str(caught.value)


@pytest.mark.usefixtures("no_network")
def test_offline_is_not_asked(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not available("test_resnet")
    with pytest.raises(WeightsError, match="HF_HUB_OFFLINE is set"):
        load("hub")


@pytest.mark.parametrize(("status", "expected"), [(200, True), (405, True), (403, False), (503, False)])
def test_the_hub_is_asked_once(monkeypatch, status, expected):
    asked = []

    class Session:
        def head(self, url, timeout):
            asked.append((url, timeout))
            return type("Response", (), {"status_code": status})()

    monkeypatch.setattr(hub.hf, "get_session", Session)
    monkeypatch.setattr(constants, "ENDPOINT", "https://mirror.invalid")
    assert available("test_resnet") is expected
    assert asked == [("https://mirror.invalid", hub.PROBE_SECONDS)]


def test_download_prefers_safetensors_and_reports_failure(tmp_path, monkeypatch):
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "w.bin")
    wanted = []

    def download(repository, filename, **_):
        wanted.append(filename)
        if filename.endswith(".safetensors"):
            raise EntryNotFoundError.__new__(EntryNotFoundError)
        return str(tmp_path / "w.bin")

    monkeypatch.setattr(hub, "_answers", lambda _: True)
    monkeypatch.setattr(hub.hf, "hf_hub_download", download)
    assert load("auto").source == "hub"
    assert wanted == ["model.safetensors", "pytorch_model.bin"]

    def fail(*_, **__):
        raise ConnectionResetError("reset by peer")

    monkeypatch.setattr(hub.hf, "hf_hub_download", fail)
    with pytest.raises(WeightsError, match="the download failed: ConnectionResetError: reset by peer"):
        load("auto")


def test_names_without_weights(monkeypatch):
    with pytest.raises(WeightsError, match=r"resnet18\.a1_in1k"):
        load_weights(nn.Linear(1, 1), nn.Linear(1, 1), source="auto", backbone_name="resnet18.none", classifier="fc", stages=())
    with pytest.raises(WeightsError, match=r"Near names with weights: .*resnet50"):
        load_weights(nn.Linear(1, 1), nn.Linear(1, 1), source="hub", backbone_name="resnet50t", classifier="fc", stages=())
    with pytest.raises(WeightsError, match="a network of your own"):
        load_weights(nn.Linear(1, 1), nn.Linear(1, 1), source="auto", backbone_name="my.Net", classifier="fc", stages=())
    assert not available("my.Net")
    assert not available("resnet50t")


def lay(folder, repository, commit, name, reference="main"):
    """Lay a file out the way huggingface_hub keeps it."""
    root = folder / "hub" / f"models--{repository.replace('/', '--')}"
    path = root / "snapshots" / commit / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / reference).write_text(commit)
    return path


@pytest.mark.usefixtures("no_network")
def test_which_file_of_the_cache_is_taken(tmp_path):
    plain = PretrainedCfg(hf_hub_id="timm/some.net")
    assert cached_file(plain) is None
    old = lay(tmp_path, "timm/some.net", "abc", "pytorch_model.bin")
    assert cached_file(plain) == old
    new = lay(tmp_path, "timm/some.net", "abc", "model.safetensors")
    assert cached_file(plain) == new
    pinned = PretrainedCfg(hf_hub_id="timm/some.net@v2")
    assert cached_file(pinned) is None
    other = lay(tmp_path, "timm/some.net", "def", "model.safetensors", reference="v2")
    assert cached_file(pinned) == other
    assert cached_file(plain) == new
    named = PretrainedCfg(hf_hub_id="timm/some.net", hf_hub_filename="special.bin")
    assert cached_file(named) is None
    assert cached_file(PretrainedCfg(hf_hub_id="timm/some.net", hf_hub_filename="model.safetensors")) == new


@pytest.mark.usefixtures("no_network")
def test_the_cache_of_torch_holds_what_has_an_address_of_its_own(tmp_path):
    cfg = PretrainedCfg(url="https://example.invalid/releases/net-0123abcd.pth?download=1")
    assert cached_file(cfg) is None
    file = tmp_path / "torch" / "hub" / "checkpoints" / "net-0123abcd.pth"
    file.parent.mkdir(parents=True)
    file.touch()
    assert cached_file(cfg) == file


@pytest.mark.usefixtures("no_network")
def test_an_error_names_where_the_file_would_lie(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folders = []
    for cfg in (PretrainedCfg(hf_hub_id="timm/some.net@v2"), PretrainedCfg(url="https://example.invalid/net-0123abcd.pth")):
        with pytest.raises(WeightsError) as caught:
            download(cfg, "net")
        folders.append(str(caught.value).partition("in its cache to '")[2].partition("'")[0])
    expected = ["hub/models--timm--some.net", "torch/hub/checkpoints/net-0123abcd.pth"]
    assert folders == [str(tmp_path / place) for place in expected]


def test_a_file_that_is_fetched_lies_where_it_is_looked_for(tmp_path, monkeypatch):
    (tmp_path / "served.pth").write_bytes(b"content")
    cfg = PretrainedCfg(url=(tmp_path / "served.pth").as_uri())
    monkeypatch.setattr(hub, "_answers", lambda _: True)
    path = download(cfg, "net")
    assert path.read_bytes() == b"content"
    assert cached_file(cfg) == path


def test_a_description_comes_with_its_tag():
    assert pretrained_cfg("resnet18").hf_hub_id == timm.models.get_pretrained_cfg("resnet18").hf_hub_id
    assert pretrained_cfg("resnet18.tv_in1k").tag == "tv_in1k"
