"""Weights with a card: what is written is what is read, by us and by safetensors itself."""

import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finetune import FinetuneModule, WeightsError
from finetune.card import KEY, describe, read_card, write_weights

INPUT = {"size": 40, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bilinear", "crop": 1.0}


def tensors():
    return {"a": torch.tensor([[0.5, 3.0], [1.0, 2.0]]).T, "b.count": torch.tensor(7)}


def test_the_file_holds_the_tensors_and_the_card(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"what was there before")
    complete = write_weights(path, tensors(), {"architecture": "net", "size": 3}, torch.float16)
    stored = load_file(path)
    assert stored["a"].dtype == torch.float16
    assert stored["b.count"].dtype == torch.int64
    assert all(torch.equal(stored[name].to(tensor.dtype), tensor) for name, tensor in tensors().items())
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()[KEY]) == {"architecture": "net", "size": 3}
    assert complete["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert complete["bytes"] == len(path.read_bytes())
    assert json.loads(path.with_suffix(".json").read_text()) == complete
    assert read_card(path) == {"architecture": "net", "size": 3}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w.json", "w.safetensors"]


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {KEY: "{"}, {KEY: "[1]"}])
def test_no_card(tmp_path, metadata):
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors", metadata)
    assert read_card(tmp_path / "w.safetensors") == {}


def test_no_file_of_that_kind(tmp_path):
    torch.save({}, tmp_path / "w.pth")
    assert read_card(tmp_path / "w.pth") == read_card(tmp_path / "nothing") == {}


@pytest.mark.parametrize(
    ("card", "text"),
    [
        ({}, ""),
        ({"input": INPUT}, ""),
        ({"teacher": {"name": "big"}}, "distilled from big"),
        ({"teacher": {"name": "big"}, "input": INPUT}, "distilled from big, for pictures of 40 px"),
    ],
)
def test_in_a_few_words(card, text):
    assert describe(card) == text


@pytest.mark.parametrize("given", [INPUT, {**INPUT, "size": 0}, {"size": 40}, [1], {**INPUT, "mean": 3}, {**INPUT, "other": 1}])
def test_a_file_of_the_users_brings_its_input(tmp_path, given):
    state = FinetuneModule("test_resnet", num_classes=2, weights="none").backbone.state_dict()
    write_weights(tmp_path / "w.safetensors", state, {"input": given}, torch.float32)
    if given is not INPUT:
        with pytest.raises(WeightsError, match="does not describe an input: expected size, mean, std"):
            FinetuneModule("test_resnet", num_classes=2, weights=tmp_path / "w.safetensors")
        return
    made = FinetuneModule("test_resnet", num_classes=2, weights=tmp_path / "w.safetensors")
    assert (made.input_spec.size, made.input_spec.mean, made.input_spec.crop) == (40, (0.5, 0.5, 0.5), 1.0)
    assert made.weights_report.source == "file"


def test_without_a_card_the_input_is_that_of_timm(tmp_path):
    plain = FinetuneModule("test_resnet", num_classes=2, weights="none")
    save_file({name: tensor.contiguous() for name, tensor in plain.backbone.state_dict().items()}, tmp_path / "w.safetensors")
    assert FinetuneModule("test_resnet", num_classes=2, weights=tmp_path / "w.safetensors").input_spec == plain.input_spec
