"""Prediction against Pillow, a plain forward pass and the csv module; and a table that is whole or not there."""

import csv
import sys
from dataclasses import replace
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from finetune import CheckpointError, ConfigError, DataError, FinetuneModule
from finetune.main import main
from finetune.predict import load_model, predict, predict_to_csv

CLASSES = ["bee", "ant, red", "wasp", "fly"]
SIZES = {"b/2.png": (40, 30), "b/10.png": (30, 50), "b/A.jpg": (36, 36), "c.webp": (64, 33), "a.bmp": (31, 31)}
ORDER = ["a.bmp", "b/10.png", "b/2.png", "b/A.jpg", "c.webp"]
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


def by_hand(model, path):
    """Do with Pillow and numpy what the model's input asks for, and with the bare layers what the model does."""
    spec = model.input_spec
    with Image.open(path) as image:
        rgb = image.convert("RGB")
    shorter = int(spec.size / spec.crop)
    width, height = rgb.size
    size = [max(shorter, int(side * shorter / min(width, height))) for side in (width, height)]
    rgb = rgb.resize(size, getattr(Image.Resampling, spec.interpolation.upper()))
    left, top = (round((side - spec.size) / 2) for side in rgb.size)
    pixels = np.asarray(rgb.crop((left, top, left + spec.size, top + spec.size))) / 255
    normalised = torch.from_numpy((pixels - spec.mean) / spec.std).float().permute(2, 0, 1)[None]
    with torch.no_grad():
        logits = model.head(model.backbone(normalised))[0].double()
    return (logits.exp() / logits.exp().sum()).tolist()


def rows(path="predictions.csv"):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def fails(words, capsys):
    with pytest.raises(SystemExit) as left:
        main(["predict", *words])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


RUN = "runs/mine/1"


@pytest.mark.usefixtures("world")
def test_probabilities_are_those_of_a_forward_pass_by_hand(capsys):
    main(["predict", RUN, "new", "--topk", "9", "--batch_size", "2"])
    assert capsys.readouterr().out == "5 pictures: predictions.csv\n"
    found = rows()
    assert [row["file"] for row in found] == [str(Path("new", name)) for name in ORDER]
    columns = ["file", "label", "probability"]
    assert list(found[0]) == [*columns, *(f"{c}_{rank}" for rank in (2, 3, 4) for c in columns[1:]), "error"]
    model = load_model(RUN)
    assert not any(module.training for module in model.modules())
    for row in found:
        said = {row[f"label{rank}"]: float(row[f"probability{rank}"]) for rank in ("", "_2", "_3", "_4")}
        expected = dict(zip(CLASSES, by_hand(model, row["file"]), strict=True))
        assert said == pytest.approx(expected, abs=0.01)
        assert list(said.values()) == sorted(said.values(), reverse=True)
        assert row["error"] == ""
    assert len({row["label"] for row in found}) > 1


@pytest.mark.usefixtures("world")
def test_the_number_of_columns_and_of_batches_and_of_workers_changes_no_number():
    tables = {}
    for name, options in {
        "one": ["--topk", "1", "--batch_size", "1", "--workers", "0"],
        "two": ["--topk", "2", "--workers", "0"],
        "workers": ["--topk", "2", "--batch_size", "2", "--workers", "2", "--device", "cpu"],
    }.items():
        main(["predict", RUN, "new", "--out", f"{name}.csv", *options])
        tables[name] = rows(f"{name}.csv")
    assert list(tables["one"][0]) == ["file", "label", "probability", "error"]
    assert list(tables["two"][0]) == ["file", "label", "probability", "label_2", "probability_2", "error"]
    for table in (tables["one"], tables["workers"]):
        for row, other in zip(table, tables["two"], strict=True):
            assert (row["file"], row["label"]) == (other["file"], other["label"])
            assert float(row["probability"]) == pytest.approx(float(other["probability"]), abs=2e-6)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_unreadable_picture_is_a_row_with_an_error(capsys, workers):
    Path("new/b/3.png").write_bytes(b"no picture")
    Path("new/z.jpg").write_bytes(b"")
    main(["predict", RUN, "new", "--out", "with.csv", "--batch_size", "3", "--workers", workers])
    assert "7 pictures, 2 of them unreadable (see the column 'error'): with.csv" in capsys.readouterr().out
    found = {Path(row["file"]).name: row for row in rows("with.csv")}
    assert "not a picture in a known format" in found["3.png"]["error"]
    assert "is empty" in found["z.jpg"]["error"]
    for name in ("3.png", "z.jpg"):
        assert {value for column, value in found[name].items() if column not in ("file", "error")} == {""}
    main(["predict", RUN, "new/a.bmp", "new/b/2.png", "new/z.jpg", "--out", "alone.csv"])
    assert [row["label"] for row in rows("alone.csv")] == [found["a.bmp"]["label"], found["2.png"]["label"], ""]


@pytest.mark.usefixtures("world")
def test_every_picture_unreadable(capsys):
    Path("bad").mkdir()
    for name in ("1.png", "2.png"):
        Path("bad", name).write_bytes(b"no picture")
    main(["predict", RUN, "bad", "--batch_size", "1"])
    assert [bool(row["error"]) for row in rows()] == [True, True]
    assert "2 of them unreadable" in capsys.readouterr().out


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(
    ("checkpoint", "kind"), [(RUN, "best"), (f"{RUN}/checkpoints/last.ckpt", "last"), ("last", "last")], ids=str
)
def test_which_checkpoint_is_meant(checkpoint, kind):
    main(["predict", checkpoint, "new"])
    labels = {row["label"] for row in rows()}
    assert (labels == {"ant, red"}) == (kind == "last")  # its bias says so whatever the picture
    assert load_model(checkpoint).class_names == CLASSES


def test_a_class_of_the_user_is_loaded_as_such(world, capsys):
    (world / "my_doubled.py").write_text(OWN)
    sys.path.insert(0, str(world))
    from my_doubled import Doubled

    model = scrambled(Doubled(factor=3.0, backbone="test_resnet", num_classes=4, weights="none"))
    save(model, world / "own.ckpt")
    loaded = load_model("own.ckpt")
    assert type(loaded) is Doubled
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), 3 * FinetuneModule.forward(model.eval(), images))
    (picture,) = predict(loaded, ["new/a.bmp"], topk=1)
    assert picture.labels[0] in ("0", "1", "2", "3")  # no names: their numbers

    del sys.modules["my_doubled"]
    sys.path.remove(str(world))
    (world / "my_doubled.py").unlink()
    said = fails(["own.ckpt", "new"], capsys)
    assert "own.ckpt was written by my_doubled.Doubled, which cannot be imported here" in said
    assert "backbone" not in said


def test_a_checkpoint_that_names_another_kind_of_class_is_refused(world):
    path = world / RUN / "checkpoints" / "best.ckpt"
    content = torch.load(path, weights_only=True)
    content["finetune"]["class_path"] = "collections.OrderedDict"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"collections\.OrderedDict, which is no FinetuneModule"):
        load_model(path)


@pytest.mark.usefixtures("world")
def test_an_output_is_not_overwritten_unless_that_is_said(capsys):
    Path("predictions.csv").write_text("mine")
    assert "predictions.csv exists already and is not overwritten" in fails([RUN, "new"], capsys)
    assert Path("predictions.csv").read_text() == "mine"
    main(["predict", RUN, "new", "--overwrite"])
    assert len(rows()) == 5


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([RUN, "new", "--out", "new/a.bmp/x.csv"], "new/a.bmp/x.csv cannot be written: Not a directory"),
        ([RUN, "new", "--out", "nowhere/x.csv"], "nowhere/x.csv cannot be written: No such file or directory"),
        ([RUN, "new", "--out", "new", "--overwrite"], "new cannot be written: Is a directory"),
        ([RUN, "new", "--topk", "0"], "at least 1, found 0 and 64"),
        ([RUN, "new", "--device", "warp"], "device 'warp' cannot be used"),
        ([RUN, "nowhere"], "nowhere"),
        (["runs/mine", "new"], "runs/mine holds no checkpoint"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_leaves_nothing_behind(world, capsys, words, says):
    before = sorted(world.rglob("*"))
    assert says in fails(words, capsys)
    assert sorted(world.rglob("*")) == before


@pytest.mark.parametrize("previous", [None, "mine"])
def test_a_disk_that_is_full_leaves_what_was_there(world, capsys, previous):
    resource = pytest.importorskip("resource")
    if previous:
        Path("predictions.csv").write_text(previous)
    before = sorted(world.rglob("*"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # fewer bytes than the table has
    try:
        said = fails([RUN, "new", "--workers", "0", "--overwrite"], capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "predictions.csv cannot be written: File too large" in said
    assert sorted(world.rglob("*")) == before
    assert previous is None or Path("predictions.csv").read_text() == previous


@pytest.mark.usefixtures("world")
def test_in_python_a_generator_that_begins_at_once():
    model = load_model(RUN)
    first = next(predict(model, ["new"], batch_size=1))
    assert first.file == str(Path("new", "a.bmp"))
    assert len(first.labels) == len(first.probabilities) == 3
    with pytest.raises(DataError, match="no picture"):
        list(predict(model, []))
    with pytest.raises(ConfigError, match="cannot be used"):
        predict_to_csv(RUN, ["new"], device="cuda:99")
    with pytest.raises(ConfigError, match="Not a directory"):
        predict_to_csv(RUN, ["new"], out="new/a.bmp/x.csv")
