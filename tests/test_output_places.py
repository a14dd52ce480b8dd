"""A training writes into its own run only, not where a configuration, a link or a name leads."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from finetune.errors import CheckpointError, ConfigError
from finetune.output_places import is_run, require_no_links, require_own_places
from finetune.runs import find_checkpoint, new_run, run_home


@pytest.fixture
def run(tmp_path):
    """The folder of a run."""
    run = tmp_path / "runs" / "small" / "1"
    (run / "checkpoints").mkdir(parents=True)
    (run / "record.json").write_text(json.dumps({"state": "finished", "command": ["fit"]}))
    for name in ("config.yaml", "metrics.csv", "checkpoints/best.ckpt"):
        (run / name).write_text("x")
    return run


@pytest.mark.parametrize("name", ["birds", "birds/small", "a.b", "-x", "..a", "a b", "ä"])
def test_names_of_runs(tmp_path, name):
    run = new_run(tmp_path / "runs", name)
    assert run.parent == tmp_path / "runs" / name
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.ckpt").write_text("x")
    assert find_checkpoint("last", tmp_path / "runs", name) == run / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize("name", ["..", "../x", "a/../../x", "a/..", "/tmp/x", "", ".", "a\0b", "a\nb"])
def test_names_that_lead_out_of_the_folder_of_runs(tmp_path, name):
    with pytest.raises(ConfigError, match=r"set --run\.folder"):
        new_run(tmp_path / "runs", name)
    with pytest.raises(ConfigError, match=r"set --run\.folder"):
        run_home(tmp_path / "runs", name)
    assert not list(tmp_path.iterdir())


def test_a_name_is_no_pattern(tmp_path):
    (tmp_path / "a" / "1" / "checkpoints").mkdir(parents=True)
    (tmp_path / "a" / "1" / "checkpoints" / "last.ckpt").write_text("x")
    with pytest.raises(CheckpointError, match="no run with a checkpoint"):
        find_checkpoint("last", tmp_path, "*")


def test_a_logger_in_another_run_is_refused(run, tmp_path):
    for logger in (
        CSVLogger(run.parent.parent, "small", "1"),
        CSVLogger(run, "x"),
        TensorBoardLogger(run, "tensorboard"),
        SimpleNamespace(save_dir=str(run / "deeper")),
    ):
        with pytest.raises(ConfigError, match="belongs to the run"):
            require_own_places([logger], [])
    (tmp_path / "link").symlink_to(run)
    with pytest.raises(ConfigError, match="belongs to the run"):
        require_own_places([CSVLogger(tmp_path / "link")], [])
    require_own_places([CSVLogger(tmp_path / "theirs"), TensorBoardLogger(tmp_path), SimpleNamespace(save_dir=None)], [])
    require_own_places([TensorBoardLogger(run, "more")], [], run / "checkpoints" / "best.ckpt")  # a resume of that run


@pytest.mark.parametrize("link", [False, True])
def test_a_logger_that_would_delete_metrics_is_refused(tmp_path, link):
    (tmp_path / "logs" / "version_0").mkdir(parents=True)
    file = tmp_path / "logs" / "version_0" / "metrics.csv"
    file.symlink_to(tmp_path / "nowhere") if link else file.write_text("mine")
    with pytest.raises(ConfigError, match="CSVLogger would delete it"):
        require_own_places([CSVLogger(tmp_path, "logs", 0)], [])
    require_own_places([CSVLogger(tmp_path, "logs")], [])  # which takes the next version
    assert os.path.lexists(file)


def test_a_callback_that_would_replace_checkpoints_is_refused(run, tmp_path):
    with pytest.raises(ConfigError, match="belongs to the run"):
        require_own_places([], [ModelCheckpoint(run / "checkpoints")])
    mine = tmp_path / "models"
    mine.mkdir()
    require_own_places([], [ModelCheckpoint(mine, enable_version_counter=False), OnExceptionCheckpoint(mine)])
    for name in ("mine.ckpt", "on_exception.ckpt"):
        (mine / name).write_text("mine")
    for callback in (ModelCheckpoint(mine, enable_version_counter=False), OnExceptionCheckpoint(mine)):
        with pytest.raises(ConfigError, match="would replace checkpoints"):
            require_own_places([], [callback])
    require_own_places([], [ModelCheckpoint(mine), ModelCheckpoint()])


def test_the_folder_of_a_checkpoint_is_that_of_a_run_or_it_is_left_alone(run, tmp_path):
    assert is_run(run)
    assert is_run(tmp_path / "runs")  # nothing there would be replaced
    for text in ("{}", "[]", "mine", "[" * 100_000):
        (run / "record.json").write_text(text)
        assert not is_run(run)
    (run / "record.json").unlink()
    assert not is_run(run)
    (run / "config.yaml").write_text("data: {}\nmodel: {}\nrun: {}\ntrainer: {}\n")
    assert is_run(run), "a run from before there were records"
    (run / "config.yaml").unlink()
    assert not is_run(run), "its metrics.csv would be rewritten"


@pytest.mark.parametrize("name", ["metrics.csv", ".lock", "checkpoints/best.ckpt", "checkpoints", "figures/a.png", "new"])
@pytest.mark.parametrize("kind", ["link", "broken", "pipe"])
def test_a_run_with_links_is_not_resumed(run, tmp_path, name, kind):
    require_no_links(run)
    (tmp_path / "mine").mkdir()
    path = run / name
    path.parent.mkdir(exist_ok=True)
    if path.is_dir():
        path.rename(tmp_path / "checkpoints")
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / ("mine" if kind == "link" else "nowhere"))
    with pytest.raises(CheckpointError, match="would be written through"):
        require_no_links(run)
    assert not list(Path(tmp_path / "mine").iterdir())
