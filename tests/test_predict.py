"""Prediction against Pillow, a plain forward pass and the csv module; and a table that is whole or not there."""

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune import CheckpointError, ConfigError, DataError, FinetuneModule
from finetune.images import read_image
from finetune.main import main
from finetune.predict import predict_to_file
from finetune.predictor import Predictor
from finetune.trained import load_model
from finetune.transforms import eval_transform

CLASSES = ["bee", "ant, red", "wasp", "fly"]
ORDER = ["a.bmp", "b/10.png", "b/2.png", "b/A.jpg", "c.webp"]


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
    pixels = np.asarray(rgb.crop((left, top, left + spec.size, top + spec.size))).astype(int)
    seen = eval_transform(spec)(read_image(path)).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(seen - pixels).max() <= 2  # torch and Pillow round in between, by instruction set, and a steep head shows it
    normalised = torch.from_numpy((seen / 255 - spec.mean) / spec.std).float().permute(2, 0, 1)[None]
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
    assert capsys.readouterr().out == (
        "model  runs/mine/1/checkpoints/best.ckpt (4 classes: bee, ant, red, wasp, fly)\n5 pictures: predictions.csv\n"
    )
    found = rows()
    assert [row["file"] for row in found] == [str(Path("new", name)) for name in ORDER]
    columns = ["file", "label", "probability"]
    assert list(found[0]) == [*columns, *(f"{c}_{rank}" for rank in (2, 3, 4) for c in columns[1:]), "error"]
    model = load_model(RUN)
    assert not any(module.training for module in model.modules())
    for row in found:
        said = {row[f"label{rank}"]: float(row[f"probability{rank}"]) for rank in ("", "_2", "_3", "_4")}
        expected = dict(zip(CLASSES, by_hand(model, row["file"]), strict=True))
        assert said == pytest.approx(expected, abs=1e-4)
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
    assert "7 pictures, 2 of them unreadable (see 'error'): with.csv" in capsys.readouterr().out
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
    with pytest.raises(SystemExit) as stop:
        main(["predict", RUN, "bad", "--batch_size", "1"])
    assert stop.value.code not in (None, 0), "a script goes on only where something was predicted"
    assert [bool(row["error"]) for row in rows()] == [True, True]
    assert "None of the 2 pictures can be read" in capsys.readouterr().err


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize(
    ("checkpoint", "kind"), [(RUN, "best"), (f"{RUN}/checkpoints/last.ckpt", "last"), ("last", "last")], ids=str
)
def test_which_checkpoint_is_meant(checkpoint, kind, capsys):
    main(["predict", checkpoint, "new"])
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith(f"model  runs/mine/1/checkpoints/{kind}.ckpt (4 classes: bee, ant, red, wasp, fly")
    assert ("this is the last epoch, and runs/mine/1 means the best" in said) == (kind == "last")
    labels = {row["label"] for row in rows()}
    assert (labels == {"ant, red"}) == (kind == "last")  # its bias says so whatever the picture
    assert load_model(checkpoint).class_names == CLASSES


def test_a_class_of_the_user_is_loaded_as_such(world, own_class, capsys):
    path, model = own_class
    loaded = load_model(path)
    assert type(loaded) is type(model)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), 3 * FinetuneModule.forward(model.eval(), images))
    (picture,) = Predictor("own.ckpt")("new/a.bmp")
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
    for name, message in {
        "finetune.data.FolderDataModule": r"FolderDataModule, which is no FinetuneModule",
        "collections.OrderedDict": r"'collections\.OrderedDict' is named .* part of Python itself",
    }.items():
        content["finetune"]["class_path"] = name
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=message):
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
        ([RUN, "new", "--out", "new", "--overwrite"], "new is a folder, expected the name of a file"),
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
def test_lines_of_json_say_the_same_as_columns():
    Path("new/z.jpg").write_bytes(b"")
    main(["predict", RUN, "new", "--probabilities", "--topk", "2"])
    main(["predict", RUN, "new", "--probabilities", "--topk", "2", "--out", "p.jsonl"])
    lines = [json.loads(line) for line in Path("p.jsonl").read_text().splitlines()]
    for line, row in zip(lines, rows(), strict=True):
        assert line["file"] == row["file"]
        if row["error"]:
            assert line == {"file": row["file"], "error": row["error"]}
            continue
        assert line["error"] is None
        assert (line["label"], line["probability"]) == (row["label"], float(row["probability"]))
        assert line["top"][1] == {"label": row["label_2"], "probability": float(row["probability_2"])}
        assert line["probabilities"] == {name: float(row[f"p:{name}"]) for name in CLASSES}
        assert max(line["probabilities"], key=line["probabilities"].get) == line["label"]
        assert sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.usefixtures("world")
def test_features_are_what_the_head_sees():
    Path("new/b/3.png").write_bytes(b"no picture")
    main(["predict", RUN, "new", "--embed"])
    model, found = load_model(RUN), rows()
    assert list(found[0]) == ["file", *(f"f{index}" for index in range(model.head.in_features)), "error"]
    assert [bool(row["error"]) for row in found] == [False, False, False, True, False, False]
    features = torch.tensor([[float(row[f"f{i}"]) for i in range(model.head.in_features)] for row in found if not row["error"]])
    with torch.no_grad():
        logits = model.head(features)
    np.testing.assert_allclose(logits.softmax(1).numpy(), Predictor(RUN).probabilities([f"new/{n}" for n in ORDER]), atol=1e-5)
    main(["predict", RUN, "new/a.bmp", "--embed", "--out", "p.jsonl"])
    assert json.loads(Path("p.jsonl").read_text())["features"] == pytest.approx(features[0].tolist(), abs=1e-5)


@pytest.mark.usefixtures("world")
def test_patterns_and_lists():
    main(["predict", RUN, "new/b/*.png"])
    assert [row["file"] for row in rows()] == ["new/b/10.png", "new/b/2.png"]
    Path("list.txt").write_text("new/c.webp\nnew/gone.png\n")
    main(["predict", RUN, "--files_from", "list.txt", "--out", "listed.csv"])
    assert [(row["file"], bool(row["error"])) for row in rows("listed.csv")] == [("new/c.webp", False), ("new/gone.png", True)]


INTERRUPTED = """
import os, signal, sys
from finetune.rows import GrowingFile
append, pieces = GrowingFile.append, int(sys.argv.pop(1))
def until(self, content, rows, last, failed=0):
    if self.rows >= pieces:
        self._handle.write(content[: len(content) // 2])  # as far as the system got
        self._handle.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    append(self, content, rows, last, failed)
GrowingFile.append = until
from finetune.main import main
main(sys.argv[1:])
"""


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("out", ["p.csv", "p.jsonl"])
def test_after_a_kill_the_same_command_repeats_no_row_and_loses_none(capsys, out):
    for name in ("new/d\nd.png", "new/e,é.png"):
        Path(name).write_bytes(Path("new/b/2.png").read_bytes())
    Path("new/b/bad.png").write_bytes(b"no")
    words = ["predict", RUN, "new", "--batch_size", "2", "--workers", "0", "--device", "cpu"]
    main([*words, "--out", f"whole-{out}"])
    words += ["--out", out]
    for pieces in (2, 6):
        code = [sys.executable, "-c", INTERRUPTED, str(pieces), *words]
        assert subprocess.run(code, capture_output=True, check=False).returncode == -signal.SIGKILL
        assert not Path(out).exists()
    capsys.readouterr()
    assert "topk: 3 then, 2 now" in fails([*words[1:], "--topk", "2"], capsys)
    main([*words, "--workers", "2"])
    said = capsys.readouterr().out
    assert f"{out}.part holds 6 of 8 rows" in said
    assert f"8 pictures, 1 of them unreadable (see 'error'): {out}" in said
    assert Path(out).read_bytes() == Path(f"whole-{out}").read_bytes()
    assert not list(Path().glob("*.part*"))


@pytest.mark.usefixtures("world")
def test_pictures_that_changed_in_between_are_not_mixed_up(capsys):
    words = ["predict", RUN, "new", "--batch_size", "2", "--workers", "0", "--out", "p.csv"]
    subprocess.run([sys.executable, "-c", INTERRUPTED, "2", *words], capture_output=True, check=False)
    Path("new/Aa.bmp").write_bytes(Path("new/a.bmp").read_bytes())
    assert "is of new/b/10.png, and there is now new/a.bmp" in fails(words[1:], capsys)
    main([*words, "--overwrite"])
    assert len(rows("p.csv")) == 6


@pytest.mark.usefixtures("world")
def test_mistakes_in_python():
    with pytest.raises(DataError, match=r"No images were named\. Expected a folder"):
        predict_to_file(RUN, [])
    with pytest.raises(ConfigError, match="cannot be used"):
        predict_to_file(RUN, ["new"], device="cuda:99")
    with pytest.raises(ConfigError, match="Not a directory"):
        predict_to_file(RUN, ["new"], out="new/a.bmp/x.csv")
    with pytest.raises(ConfigError, match="Did you mean 'flip'"):
        predict_to_file(RUN, ["new"], tta="flap")
