"""Runs that are followed, read back with TensorBoard's own reader and from the files."""

import csv
import json
import sys

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import TINY

from finetune.errors import ConfigError
from finetune.main import main
from finetune.record import read_record
from finetune.tracking import flat_options, parse_names, rasterise

SHORT = [*TINY, "--trainer.limit_train_batches", "2", "--trainer.log_every_n_steps", "1"]
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4", "head")


@pytest.fixture(autouse=True)
def _working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])


def only_run(tmp_path, name="run"):
    (run,) = (tmp_path / "runs" / name).iterdir()
    return run


def test_names_of_trackers():
    assert parse_names("tensorboard,csv") == ["tensorboard", "csv"]
    assert parse_names(["wandb", "WandB "]) == ["wandb"]
    with pytest.raises(ConfigError, match="Did you mean 'wandb'"):
        parse_names("tensorboard,wandbb")


def test_a_missing_package_is_named_with_its_extra(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("finetune.tracking.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["fit", *SHORT, "--track", "wandb"])
    assert 'pip install "resnet-finetune[wandb]"' in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()  # nothing is left behind


def test_options_have_the_names_of_the_command_line():
    config = {
        "model": {"class_path": "a.Model", "init_args": {"lr": 0.1, "lr_scale": {"stem": 0.5}, "betas": (0.9, 0.99)}},
        "trainer": {"max_epochs": 3, "logger": None, "callbacks": [{"class_path": "b.C", "init_args": {"x": 1}}]},
        "seed_everything": 0,
        "config": ["somewhere.yaml"],
    }

    class Model:
        hparams = {"lr": 0.1, "lr_scale": {"stem": 0.5}, "num_classes": 3, "l": 1}  # noqa: RUF012

    assert flat_options(config, Model()) == {
        "model": "a.Model",
        "model.lr": 0.1,
        "model.lr_scale.stem": 0.5,
        "model.betas": [0.9, 0.99],
        "trainer.max_epochs": 3,
        "trainer.logger": None,
        "trainer.callbacks": [{"class_path": "b.C", "init_args": {"x": 1}}],
        "seed_everything": 0,
        "model.num_classes": 3,
        "model.l": 1,
    }


def read_tensorboard(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events


def test_tensorboard_and_csv_are_told_the_same(tmp_path):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    main(["fit", *SHORT, "--trainer.max_epochs", "2", "--model.freezing", "head", "--track", "tensorboard"])
    run = only_run(tmp_path)
    events = read_tensorboard(run)
    scalars = set(events.Tags()["scalars"])
    assert {f"lr/{stage}" for stage in STAGES} <= scalars
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) - {"step"} == {name for name in scalars if not name.startswith("gradients/")}  # gradients.csv has those
    for name in ("val/acc", "train/loss", "test/acc", "best/val/acc", "lr/head"):
        written = [(int(row["step"]), pytest.approx(float(row[name]))) for row in rows if row[name]]
        assert [(event.step, event.value) for event in events.Scalars(name)] == written, name
    record = read_record(run)
    assert events.Scalars("best/val/acc")[-1].value == pytest.approx(record["best"]["value"])

    figures = {path.stem: np.asarray(Image.open(path)) for path in (run / "figures").iterdir()}
    assert {"loss", "learning_rates"} <= set(figures)
    assert {f"figures/{name}" for name in figures} == set(events.Tags()["images"])
    for name, pixels in figures.items():
        (image,) = events.Images(f"figures/{name}")
        assert (image.height, image.width) == pixels.shape[:2]

    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    options = HParamsPluginData.FromString(content).session_start_info.hparams
    assert options["model.lr"].number_value == 0.01
    assert options["model.num_classes"].number_value == 10
    assert options["model.freezing"].string_value == "head"
    assert not (run / "tensorboard" / "hparams.yaml").exists()


def test_steps_that_are_done_again_are_there_once(tmp_path):
    main(["fit", *SHORT, "--trainer.max_epochs", "2", "--track", "tensorboard"])
    run = only_run(tmp_path)
    before = [(event.step, event.value) for event in read_tensorboard(run).Scalars("val/acc")]
    # the configuration of the run says how it is tracked; the epoch after the best checkpoint's is done again
    best = run / "checkpoints" / "best.ckpt"
    main(["fit", "--ckpt_path", str(best), "--trainer.max_epochs", "3"])
    after = [(event.step, event.value) for event in read_tensorboard(run).Scalars("val/acc")]
    assert len(before) == 2
    assert len(after) == 3
    assert [step for step, _ in after] == [1, 3, 5]
    with (run / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/acc"]]
    assert [(int(row["step"]), pytest.approx(float(row["val/acc"]))) for row in rows] == after


def test_figures_become_pixels():
    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(2, 1), dpi=50, facecolor="red")
    pixels = rasterise(figure)
    assert (pixels.shape, pixels.dtype) == ((50, 100, 3), np.uint8)
    assert (pixels == [255, 0, 0]).all()


def test_a_logger_of_the_user_gets_the_metrics_too(tmp_path):
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "own"}}
    main(["fit", *SHORT, "--trainer.max_epochs", "1", "--trainer.logger", json.dumps(logger)])
    (own,) = (tmp_path / "own").rglob("metrics.csv")
    with own.open() as file:
        assert "val/acc" in next(csv.reader(file))
    config = yaml.safe_load((only_run(tmp_path) / "config.yaml").read_text())
    assert config["run"]["track"] == "csv"
