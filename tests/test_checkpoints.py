"""What travels in a checkpoint and how one is read: plain values only, no code, no surprise."""

import enum
import os
import pickle
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune import CheckpointError, FinetuneModule, InputSpec
from finetune.checkpoint_file import require_optimizer_fits
from finetune.checkpoints import plain, read, read_own, refuse_other_options


class Colour(enum.Enum):
    RED = Path("red")


class Level(enum.IntEnum):
    HIGH = 3


class Word(str):
    __slots__ = ()


PLAIN = [
    (None, None),
    (True, True),
    (np.bool_(True), True),
    (np.int64(3), 3),
    (np.float32(0.5), 0.5),
    (np.float64(0.1), 0.1),
    (np.str_("a"), "a"),
    (np.arange(4).reshape(2, 2), [[0, 1], [2, 3]]),
    (torch.tensor([1.5, 2.0]), [1.5, 2.0]),
    (torch.float16, "torch.float16"),
    (Colour.RED, "red"),
    (Level.HIGH, 3),
    (Word("a"), "a"),
    (Path("a") / "b", os.path.join("a", "b")),
    ((1, (2.0, "x")), [1, [2.0, "x"]]),
    (frozenset({5}), [5]),
    (OrderedDict({"a": {3: Path("c")}, "b": [Level.HIGH, np.int8(-1)]}), {"a": {"3": "c"}, "b": [3, -1]}),
]


def types(value):
    if isinstance(value, list | dict):
        inner = value.values() if isinstance(value, dict) else value
        return {type(value)}.union(*map(types, inner))
    return {type(value)}


@pytest.mark.parametrize(("value", "expected"), PLAIN, ids=lambda value: f"{type(value).__name__}")
def test_plain_values(tmp_path, value, expected):
    result = plain(value)
    assert result == expected
    assert types(result) <= {type(None), bool, int, float, str, list, dict}
    assert type(result) is type(expected)
    torch.save(result, tmp_path / "a.pth")
    assert torch.load(tmp_path / "a.pth", weights_only=True) == expected


# -- reading ----------------------------------------------------------------------------------------------------------------


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("kind", ["zip", "old", "pickle"])
def test_code_in_a_checkpoint_is_not_run(tmp_path, kind):
    content = {"state_dict": {}, "finetune": {}, "callbacks": Harmful(str(tmp_path / "proof"))}
    path = tmp_path / "a.ckpt"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError, match=r"would run code \((posix|nt)\.mkdir\)"):
        read(path)
    assert not (tmp_path / "proof").exists()
    if kind != "pickle":  # the file does what the test says, where it is let
        torch.load(path, weights_only=False)
        assert (tmp_path / "proof").exists()


@pytest.mark.parametrize("kind", ["zip", "old"])
def test_a_checkpoint_that_is_cut_off_anywhere(tmp_path, kind):
    content = {"state_dict": {"a": torch.ones(30)}, "finetune": {"format": 2, "class_names": ["a", "b"]}}
    torch.save(content, tmp_path / "whole.ckpt", _use_new_zipfile_serialization=kind == "zip")
    whole, path = (tmp_path / "whole.ckpt").read_bytes(), tmp_path / "cut.ckpt"
    assert read(tmp_path / "whole.ckpt")["finetune"]["class_names"] == ["a", "b"]
    for length in range(0, len(whole) - 8, 23):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.ckpt") as caught:
            read(path)
        assert "\n" not in str(caught.value)
        if kind == "zip":  # the old format may be cut off within the name of a class, which is then an unknown one
            assert "damaged or incomplete" in str(caught.value) or "an empty file" in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"hello world", b"<html></html>", b"\x89PNG\r\n\x1a\n" + bytes(100), b"PK\x03\x04abc"]
)
def test_what_is_no_checkpoint_at_all(tmp_path, content):
    (tmp_path / "a.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.ckpt.*(found|damaged)"):
        read(tmp_path / "a.ckpt")


def test_checkpoints_of_others_and_missing_ones(tmp_path):
    for content in ({"finetune": {"format": 2}}, [1, 2]):
        torch.save(content, tmp_path / "best.ckpt")
        with pytest.raises(CheckpointError, match="lacks the entry 'state_dict'"):
            read(tmp_path / "best.ckpt")
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "best.ckpt")
    assert read(tmp_path / "best.ckpt")["state_dict"]["a"] == 1
    with pytest.raises(CheckpointError, match=r"not written by a FinetuneModule.*--model\.weights"):
        read_own(tmp_path / "best.ckpt")
    with pytest.raises(CheckpointError, match=r"no checkpoint .*bets\.ckpt\. Did you mean 'best\.ckpt'"):
        read(tmp_path / "bets.ckpt")
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        read(tmp_path / "nowhere" / "best.ckpt")


# -- what a module takes from one -------------------------------------------------------------------------------------------


def module(**options):
    return FinetuneModule(**{"backbone": "test_resnet", "num_classes": 3, "weights": "none", **options})


def stamped(origin):
    checkpoint = {"state_dict": origin.state_dict(), "hyper_parameters": dict(origin.hparams)}
    origin.on_save_checkpoint(checkpoint)
    return checkpoint


def test_names_input_and_origin_go_from_module_to_module(tmp_path):
    origin = module(class_names=["a", "b", "c"])
    origin.input_spec = InputSpec(48, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 0.75)
    origin.weights_report = replace(origin.weights_report, source="file", location="w.pth", missing=("x",))
    torch.save(stamped(origin), tmp_path / "a.ckpt")
    other = module()
    other.on_load_checkpoint(read(tmp_path / "a.ckpt"))
    assert other.class_names == ["a", "b", "c"]
    assert other.input_spec == origin.input_spec
    assert other.weights_report == origin.weights_report
    stamp = read(tmp_path / "a.ckpt")["finetune"]
    assert (stamp["format"], stamp["class_path"]) == (2, "finetune.module.FinetuneModule")


def test_a_newer_format_says_how_to_update():
    checkpoint = stamped(module())
    checkpoint["finetune"] |= {"format": 3, "version": "9.8.7"}
    with pytest.raises(CheckpointError, match=r"format 3 \(written by version 9\.8\.7\).*pip install -U resnet-finetune"):
        module().on_load_checkpoint(checkpoint)


@pytest.mark.parametrize("names", [["a", "c", "b"], ["a", "b", "d"], ["c", "b", "a"]])
def test_other_classes_are_refused_also_in_another_order(names):
    other = module(class_names=names)
    with pytest.raises(CheckpointError, match=rf"3 classes \(a, b, c\), the data has 3 \({', '.join(names)}\)"):
        other.on_load_checkpoint(stamped(module(class_names=["a", "b", "c"])))
    assert other.class_names == names


def test_a_checkpoint_without_names_leaves_those_of_the_data():
    other = module(class_names=["a", "b", "c"])
    other.on_load_checkpoint(stamped(module()))
    assert other.class_names == ["a", "b", "c"]
    other.on_load_checkpoint({"state_dict": {}})  # of another project: nothing to take over
    assert other.class_names == ["a", "b", "c"]


def test_options_of_a_resumed_run():
    old = {"lr": 0.1, "freezing": "full", "lr_scale": {"stem": 0.1}, "weights": "auto", "gone": 1, "root": "photos"}
    same = {**old, "weights": "none", "root": Path("photos"), "lr_scale": OrderedDict(stem=np.float64(0.1)), "new": 2}
    del same["gone"]
    refuse_other_options(old, same)
    with pytest.raises(CheckpointError) as caught:
        refuse_other_options(old, {**same, "lr": 0.2, "freezing": [{"train": ("head",)}]})
    lines = str(caught.value).splitlines()[1:-1]
    assert lines == [
        "  lr: 0.1 in the checkpoint, 0.2 now",
        "  freezing: 'full' in the checkpoint, [{'train': ['head']}] now",
    ]


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "adafactor"])
def test_a_state_of_the_optimizer_fits_its_parameters(name):
    import timm.optim

    parameter = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = timm.optim.create_optimizer_v2([parameter], name, lr=0.1)
    parameter.sum().backward()
    optimizer.step()
    require_optimizer_fits([optimizer])
    key = next((key for key in ("momentum_buffer", "exp_avg") if key in optimizer.state[parameter]), None)
    if key:
        optimizer.state[parameter][key] = torch.zeros(3)
        with pytest.raises(CheckpointError, match=rf"'{key}' .* expected the shape \(3, 4\), found \(3,\)"):
            require_optimizer_fits([optimizer])
