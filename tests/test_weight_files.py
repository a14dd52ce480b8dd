"""Reading files with weights: every format gives its tensors, and code in a file is never run."""

import argparse
import hashlib
import os
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from finetune.errors import WeightsError
from finetune.weight_files import read_file, read_state_dict, require_file, sha256_of


@pytest.mark.parametrize("nest", ["state_dict", "model", "model_state_dict", "state_dict_ema"])
def test_nested_files(tmp_path, nest):
    origin = timm.create_model("test_resnet", num_classes=5)
    torch.save({nest: origin.state_dict(), "epoch": 3}, tmp_path / "w.pth")
    assert set(read_state_dict(tmp_path / "w.pth")) == set(origin.state_dict())


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("kind", ["zip", "old", "pickle"])
def test_code_in_a_file_is_not_run(tmp_path, kind):
    content, path = {"fc.weight": Harmful(str(tmp_path / "proof"))}, tmp_path / "w.pth"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(WeightsError, match=r"would run code \((posix|nt)\.mkdir\)"):
        read_state_dict(path)
    assert not (tmp_path / "proof").exists()
    if kind == "pickle":  # the file does what the test says, where it is let
        pickle.loads(path.read_bytes())
        assert (tmp_path / "proof").exists()


def test_whole_network_in_a_file_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"torch\.save\(model\.state_dict\(\)"):
        read_state_dict(tmp_path / "w.pth")


def test_training_arguments_of_timm_are_no_code(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}, "args": argparse.Namespace(lr=0.1)}, tmp_path / "w.pth.tar")
    assert list(read_state_dict(tmp_path / "w.pth.tar")) == ["a"]


@pytest.mark.parametrize("kind", ["safetensors", "safetensors header", "zip", "old"])
def test_truncated_file(tmp_path, kind):
    state = {"a": torch.ones(1000)}
    path = tmp_path / ("w.safetensors" if kind.startswith("safe") else "w.pth")
    save_file(state, path) if kind.startswith("safe") else torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.write_bytes(content[:20] if "header" in kind else content[:-1000])
    with pytest.raises(WeightsError, match="damaged or incomplete"):
        read_state_dict(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "a web page"),
        (b"just some text, no weights", "not a format of weights"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "damaged"),
    ],
)
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_what_is_not_a_file_of_weights(tmp_path, content, message, name):
    (tmp_path / name).write_bytes(content)
    message = "damaged" if name == "w.safetensors" and "format" in message else message  # safetensors has its own words
    with pytest.raises(WeightsError, match=message):
        read_state_dict(tmp_path / name)


def test_safetensors_under_another_name(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "w.pth")
    assert list(read_state_dict(tmp_path / "w.pth")) == ["a"]


def test_file_without_tensors(tmp_path):
    for content in ({"epoch": 3}, [torch.ones(1)], {}):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(WeightsError, match="Expected named tensors"):
            read_state_dict(tmp_path / "w.pth")


def test_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "resnet18.pth").touch()
    with pytest.raises(WeightsError, match=r"Did you mean 'resnet18\.pth'"):
        read_state_dict(tmp_path / "resnet-18.pth")
    with pytest.raises(WeightsError, match="does not exist"):
        read_state_dict(tmp_path / "nowhere" / "resnet18.pth")
    with pytest.raises(WeightsError, match=r"found the folder .* It holds resnet18\.pth"):
        read_state_dict(tmp_path)
    with pytest.raises(WeightsError, match="Did you mean 'auto'"):
        require_file("atuo")


@pytest.mark.parametrize("kind", ["safetensors", "zip", "old"])
def test_tensors_come_back_bit_for_bit_and_on_the_cpu(tmp_path, kind):
    state = {"a": torch.rand(3, 4), "b": torch.arange(5), "c": torch.rand(2).half(), "d": nn.Parameter(torch.rand(2))}
    if kind == "safetensors":
        save_file({name: value.detach() for name, value in state.items()}, tmp_path / "w.safetensors")
    else:
        torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=kind == "zip")
    found = read_state_dict(next(tmp_path.iterdir()))
    assert set(found) == set(state)
    for name, value in state.items():
        assert torch.equal(found[name], value)
        assert (found[name].dtype, found[name].device.type, found[name].requires_grad) == (value.dtype, "cpu", False)


def test_averaged_weights_go_before_the_others_and_plain_content_is_kept(tmp_path):
    content = {"state_dict": {"a": torch.zeros(1)}, "state_dict_ema": {"a": torch.ones(1)}, "epoch": 3, "names": ["x", "y"]}
    torch.save(content, tmp_path / "w.pth")
    assert read_state_dict(tmp_path / "w.pth")["a"] == 1
    raw = read_file(tmp_path / "w.pth")
    assert (raw["epoch"], raw["names"]) == (3, ["x", "y"])


def test_sha256_is_that_of_other_programs(tmp_path):
    content = os.urandom(3_000_001)
    (tmp_path / "w.pth").write_bytes(content)
    assert sha256_of(tmp_path / "w.pth") == hashlib.sha256(content).hexdigest()
    (tmp_path / "abc").write_bytes(b"abc")  # the example of FIPS 180-2
    assert sha256_of(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_home_folder_may_be_written_short(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "w.pth").touch()
    assert require_file("~/w.pth") == tmp_path / "w.pth"
