"""Runs in W&B, read back by the wandb package itself (`wandb leet inspect`); and what happens when W&B cannot be had."""

import csv
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import wandb
import yaml
from PIL import Image
from tiny import TINY

from finetune.defaults import RunOptions
from finetune.main import main
from finetune.outcomes import Outcome, write_outcome
from finetune.recipe_files import recipes_folder
from finetune.record import read_record
from finetune.tracking import trackers_among
from finetune.wandb_tracking import WandbTracker

SHORT = [*TINY, "--trainer.limit_train_batches", "2", "--trainer.log_every_n_steps", "1"]
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4", "head")
COMMAND = [sys.executable, "-c", "from finetune.main import main; main()"]
KEY = "0123456789" * 4  # nobody's


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Let W&B find no account and no settings, and keep what it writes besides the run in a folder of the test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "home"
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(folder))
    monkeypatch.setenv("NETRC", str(folder / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    (folder / "work").mkdir(parents=True)
    monkeypatch.chdir(folder / "work")
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield folder / "work"
    wandb.teardown()


@pytest.fixture
def offline(home, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    return home


def runs(folder, name="run"):
    return sorted((folder / "runs" / name).iterdir())


def files(run):
    return sorted((run / "wandb").glob("*run-*/*.wandb"))


def inspect(file, *words):
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *words, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def history(file):
    records = [json.loads(line) for line in inspect(file).splitlines()]
    return [record["history"]["item"] for record in records if record["type"] == "history"]


def artifacts(file):
    records = [json.loads(line) for line in inspect(file).splitlines()]
    return {r["artifact"]["name"]: r["artifact"]["manifest"]["contents"] for r in records if r["type"] == "artifact"}


def column(rows, name):
    return [(row["trainer/global_step"], row[name]) for row in rows if name in row]


def metrics(run, name):
    with (run / "metrics.csv").open() as file:
        return [(int(row["step"]), pytest.approx(float(row[name]))) for row in csv.DictReader(file) if row.get(name)]


def test_a_run_two_runs_and_a_resumed_run_are_read_back(offline, capsys):
    words = ["fit", *SHORT, "--trainer.max_epochs", "2", "--model.freezing", "lp_ft:1", "--track", "wandb"]
    main([*words, "--run.tags", "[first, tiny]", "--run.group", "mine"])
    (run,) = runs(offline)
    (file,) = files(run)
    said = json.loads(inspect(file, "--summary"))
    assert (said["project"], said["tags"], said["state"]) == ("resnet-finetune", ["first", "tiny"], "finished")
    assert said["name"] == f"run {run.name}"

    config, record = said["config"], read_record(run)
    options = yaml.safe_load((run / "config.yaml").read_text())
    for name, value in options["model"]["init_args"].items():
        if value is not None and not isinstance(value, dict):
            assert config[f"model.{name}"] == value
    assert (config["model.num_classes"], config["model.class_names"]) == (10, record["data"]["classes"])  # linked
    assert config["data.root"] == "digits"
    assert config["trainer.max_epochs"] == 2
    assert config["record"]["data"]["fingerprint"] == record["data"]["fingerprint"]
    assert config["record"]["weights"]["source"] == "none"
    assert config["record"]["stages"] == record["stages"]
    assert not {"lr", "model_lr", "num_classes", "init_args"} & set(config)  # in one place

    rows = history(file)
    for name in (*(f"lr/{stage}" for stage in STAGES), "val/acc", "train/loss", "test/acc", "test/f1", "best/val/acc"):
        assert column(rows, name) == metrics(run, name) != [], name
    assert said["summary"]["best/val/acc"] == pytest.approx(record["best"]["value"])
    assert said["summary"]["best/epoch"] == record["best"]["epoch"]
    assert said["summary"]["val/acc"] == {"max": pytest.approx(record["best"]["value"])}
    drawn = {path.stem for path in (run / "figures").iterdir()}
    media = {key.partition(".")[0] for row in rows for key in row}
    assert {f"figures/{name}" for name in drawn} == {key for key in media if key.startswith("figures/")}
    assert {"run/stages", "run/classes", "predictions"} <= media
    pictures = [
        entry["path"] for entry in artifacts(file)[f"run-{said['run_id']}-predictions"] if entry["path"].endswith(".png")
    ]
    assert 1 < len(pictures) <= 64  # mistakes are shown as pictures, so many at most
    assert {path.name for path in offline.iterdir()} == {"runs"}  # nothing lies in the working folder

    (hint,) = re.findall(r"wandb sync .*", capsys.readouterr().out)
    bytes_before = file.read_bytes()
    main(words)
    first, second = runs(offline)
    assert first == run
    assert files(second)[0].name != file.name
    assert file.read_bytes() == bytes_before

    main(["fit", "--ckpt_path", str(run), "--trainer.max_epochs", "3"])  # tracked as before, says the run's configuration
    again = [other for other in files(run) if other != file]
    assert [other.name for other in again] == [file.name]  # the same run of W&B
    assert file.read_bytes() == bytes_before
    resumed = history(again[0])
    assert column(resumed, "val/acc") == metrics(run, "val/acc")[-1:]
    assert json.loads(inspect(again[0], "--summary"))["config"]["trainer.max_epochs"] == 3
    assert len(files(second)) == 1

    command = [sys.executable, "-m", *shlex.split(hint), "--dry-run"]
    assert "Would sync 2 run(s)" in subprocess.run(command, capture_output=True, text=True, check=True).stderr


def test_the_sweep_starts_a_command_that_fit_understands(offline, monkeypatch):
    """The command is put together by W&B's own function, from values at the ends of what the sweep may choose."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    sweep = yaml.safe_load((recipes_folder() / "sweep.yaml").read_text())
    assert sweep["metric"] == {"name": "best/val/acc", "goal": "maximize"}
    for end in (min, max):
        values = {
            name: end(choice.get("values") or (choice["min"], choice["max"])) for name, choice in sweep["parameters"].items()
        }
        arguments = create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})["args"]
        words = [each for word in sweep["command"] for each in (arguments if word == "${args}" else [word])]
        assert words.pop(0) == sweep["program"] == "resnet-finetune"
        main([*words, *SHORT, "--trainer.max_epochs", "3", "--run.name", end.__name__])
        (run,) = runs(offline, end.__name__)
        config = json.loads(inspect(files(run)[0], "--summary"))["config"]
        assert {name: config[name] for name in values} == values


@pytest.mark.filterwarnings("ignore:unclosed file .*parameters.yaml:ResourceWarning")  # wandb leaves it open
def test_the_agent_of_a_sweep_says_which_run_it_is(offline, monkeypatch):
    (offline / "parameters.yaml").write_text("wandb_version: 1\nmodel.lr: {value: 0.002}\n")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_RUN_ID", "agentsrun")
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(offline / "parameters.yaml"))
    main(["fit", *SHORT, "--trainer.max_epochs", "1", "--track", "wandb", "--model.lr=0.002"])
    (run,) = runs(offline)
    said = json.loads(inspect(files(run)[0], "--summary"))
    assert (said["run_id"], said["project"]) == ("agentsrun", "theirs")
    assert said["config"]["model.lr"] == 0.002
    assert isinstance(said["summary"]["best/val/acc"], float)


def test_a_run_of_somebody_else_in_this_process_goes_on(offline):
    theirs = wandb.init(dir=offline, project="theirs", settings=wandb.Settings(silent=True))
    main(["fit", *SHORT, "--trainer.max_epochs", "1", "--track", "wandb"])
    assert wandb.run is theirs
    theirs.log({"x": 1})
    theirs.finish()
    (run,) = runs(offline)
    assert json.loads(inspect(files(run)[0], "--summary"))["run_id"] != theirs.id


def test_mistakes_with_pictures_and_the_best_checkpoint(offline):
    run = offline / "runs" / "a" / "1"
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "best.ckpt").write_bytes(b"weights")
    (run / "config.yaml").touch()
    Image.new("RGB", (400, 200)).save(offline / "0.png")
    outcome = Outcome(["0.png", "1.png"], np.array([0, 1]), np.array([[0.25, 0.75], [0.5, 0.5]]), ("ant", "bee"))
    write_outcome(outcome, run / "predictions.val.csv")
    record = {
        "data": {"root": str(offline), "classes": ["ant", "bee"], "counts": {"train": [3, 4], "val": [1, 1], "test": [0, 0]}},
        "best": {"value": 0.5, "epoch": 1, "checkpoint": "checkpoints/best.ckpt"},
        "monitor": "val/acc",
        "mode": "max",
    }
    tracker = WandbTracker(run, RunOptions(artifact=True))
    assert trackers_among([tracker]) == [tracker]
    tracker.describe({}, record)
    tracker.conclude(record, 7)
    tracker.close(finished=True)
    (file,) = files(run)
    tables = {path.name.split("_")[0]: json.loads(path.read_text()) for path in file.parent.glob("files/media/table/**/*.json")}
    assert tables["classes"]["data"] == [["ant", 3, 1, 0], ["bee", 4, 1, 0]]
    shown, missing = tables["predictions"]["data"]  # the second picture is not there any more
    assert shown[1:] == ["0.png", "ant", "bee", 0.75, 0.25, "worst mistakes"]
    assert missing[1] == "1.png"
    sent = artifacts(file)
    (picture,) = [entry for entry in sent[f"run-{file.stem[4:]}-predictions"] if entry["path"].endswith(".png")]
    with Image.open(picture["local_path"]) as image:
        assert image.size == (160, 80)
    checkpoint = {entry["path"]: entry["local_path"] for entry in sent[f"model-{file.stem[4:]}"]}
    assert checkpoint == {
        name: str(run / place / name) for name, place in {"best.ckpt": "checkpoints", "config.yaml": ""}.items()
    }


def whole(run):
    """All files that a run leaves without W&B are there."""
    names = {"config.yaml", "record.json", "metrics.csv", "predictions.val.csv", "checkpoints", "figures"}
    assert names <= {path.name for path in run.iterdir()}
    assert read_record(run)["state"] == "finished"
    return bool(metrics(run, "test/acc"))


def test_with_a_dead_address_fit_ends_well_and_says_how_to_send_the_run(home):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens there
        address = {"WANDB_BASE_URL": f"http://127.0.0.1:{closed.getsockname()[1]}", "WANDB_API_KEY": KEY}
        done = subprocess.run(
            [*COMMAND, "fit", *SHORT, "--trainer.max_epochs", "1", "--track", "wandb"],
            env={**os.environ, "OMP_NUM_THREADS": "1", **address},
            stdin=subprocess.PIPE,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr
    (run,) = runs(home)
    assert whole(run)
    assert "does not answer" in done.stdout
    assert f"wandb sync runs/run/{run.name}/wandb" in done.stdout
    assert column(history(files(run)[0]), "test/acc") == metrics(run, "test/acc")
    assert {path.name for path in home.iterdir()} == {"runs"}


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({}, "no account is set up here"),
        ({"WANDB_API_KEY": KEY}, "Failed to authenticate"),  # as no answer comes
        ({"WANDB_API_KEY": "short"}, "WANDB_API_KEY invalid"),
    ],
)
def test_training_goes_on_without_an_account_or_an_answer(home, monkeypatch, capsys, environment, says):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        main(["fit", *SHORT, "--trainer.max_epochs", "1", "--track", "wandb"])
    (run,) = runs(home)
    assert whole(run)
    said = capsys.readouterr().out
    assert says in said
    assert f"wandb sync runs/run/{run.name}/wandb" in said
    assert column(history(files(run)[0]), "test/acc") == metrics(run, "test/acc")


def test_training_goes_on_when_the_process_behind_wandb_cannot_be_had(offline, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_SERVICE", "3-1-tcp-localhost-9")  # nobody listens there
    main(["fit", *SHORT, "--trainer.max_epochs", "1", "--track", "wandb"])
    (run,) = runs(offline)
    assert whole(run)
    assert capsys.readouterr().out.count("training goes on") == 1


def test_switched_off_in_the_environment_nothing_is_written(home, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    main(["fit", *SHORT, "--trainer.max_epochs", "1", "--track", "wandb"])
    (run,) = runs(home)
    assert not {"wandb", "wandb.json"} & {path.name for path in run.iterdir()}
    assert metrics(run, "test/acc")
    said = capsys.readouterr()
    assert "W&B" not in said.out
    assert "wandb" not in said.out + said.err


def test_identity_is_kept_in_the_run(offline):
    run = offline / "runs" / "a" / "1"
    run.mkdir(parents=True)
    tracker = WandbTracker(run, RunOptions(project="p", entity="us"))
    identity = tracker.experiment.id
    tracker.close(finished=False)
    assert json.loads((run / "wandb.json").read_text())["id"] == identity
    assert json.loads(inspect(files(run)[0], "--summary"))["exit_code"] == 1
    again = WandbTracker(run, RunOptions())
    assert again.version == identity
    assert Path(again.save_dir) == run
