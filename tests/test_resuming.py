"""What a resumed run is told: which checkpoint it starts from, how far that came, and which options differ."""

import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint
from tiny import NETWORK

import finetune
from finetune import CheckpointError
from finetune.checkpoints import run_facts
from finetune.main import main
from finetune.resuming import compare_data, compare_run, progress_text

TINY = [*NETWORK, "--data.workers", "0", "--data.image_size", "32"]
TINY += [
    "--data.batch_size",
    "32",
    "--data.augment",
    "light",
    "--trainer.limit_train_batches",
    "3",
    "--trainer.limit_val_batches",
    "1",
    "--trainer.accelerator",
    "cpu",
]
TINY += ["--run.gradients_every", "0", "--trainer.enable_progress_bar", "false"]
PROGRAM = str(Path(finetune.__file__).parent.parent / "cli.py")
QUICK = ["--trainer.fast_dev_run", "1"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a run of two epochs, in a folder that is not called runs; its best.ckpt is of the first epoch."""
    home = tmp_path_factory.mktemp("home")
    (home / "a.yaml").write_text("data:\n  batch_size: 32\n")  # a recipe would be chosen without one
    words = ["--config", "a.yaml", *TINY, "--trainer.max_epochs", "2", "--run.folder", "mine"]
    subprocess.run([sys.executable, PROGRAM, "fit", *words], cwd=home, check=True, capture_output=True)
    (kept,) = home.glob("mine/a/*/checkpoints")
    first = torch.load(kept / "last.ckpt", weights_only=True)
    first["global_step"], first["epoch"] = 3, 0
    for name in ("total", "current"):
        first["loops"]["fit_loop"]["epoch_progress"][name] |= {"ready": 1, "started": 1, "processed": 1, "completed": 0}
    torch.save(first, kept / "best.ckpt")
    return home


@pytest.fixture
def run(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (run,) = Path("mine/a").iterdir()
    return run


def test_an_older_checkpoint_of_a_run_is_told(run, capsys):
    main(["fit", "--ckpt_path", str(run / "checkpoints" / "best.ckpt"), *QUICK])
    said = capsys.readouterr().out
    assert "best.ckpt: 1 epoch is done." in said
    assert "best.ckpt is not the last checkpoint of its run: in last.ckpt 2 epochs are done." in said
    assert f"--ckpt_path {run}" in said
    main(["fit", "--ckpt_path", str(run), *QUICK])
    assert "not the last" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ckpt_path: RUN", []),
        ("ckpt_path: RUN/checkpoints/last.ckpt", []),
        ("ckpt_path: last\nrun:\n  folder: mine", []),
        ("run:\n  folder: mine\n  name: a", ["--ckpt_path", "last"]),
        ("run:\n  folder: wrong", ["--ckpt_path", "last", "--run.folder", "mine"]),
    ],
)
def test_a_checkpoint_that_a_configuration_names(run, tmp_path, capsys, text, words):
    (tmp_path / "a.yaml").write_text("data:\n  batch_size: 32\n" + text.replace("RUN", str(run)))  # its name is that of the run
    options = [*TINY, "--trainer.max_epochs", "2", *QUICK]
    main(["fit", "--config", str(tmp_path / "a.yaml"), *options, *words])
    assert f"Resuming {run / 'checkpoints' / 'last.ckpt'}: 2 epochs are done." in capsys.readouterr().out


def test_options_that_differ_are_named(run, capsys):
    words = ["--data.batch_size", "16", "--data.augment", "none", "--data.workers", "1", "--data.split_seed", "1"]
    words += ["--seed_everything", "7", "--trainer.accumulate_grad_batches", "2"]
    main(["fit", "--ckpt_path", str(run), *words, *QUICK])
    said = capsys.readouterr().out
    for line in ("batch_size: 32 in the checkpoint, 16 now", "augment: 'light' in the checkpoint, 'none' now"):
        assert line in said.partition("with other data options than its checkpoint")[2]
    for line in ("seed: 0 in the checkpoint, 7 now", "accumulate_grad_batches: 1 in the checkpoint, 2 now"):
        assert line in said.partition("does not go on exactly")[2]
    assert "workers: " not in said
    assert "split_seed: " not in said  # these pictures are divided already


def facts(monitor="val/acc", patience=None, **options):
    """What a checkpoint of a run with these options says of it."""
    kept = [ModelCheckpoint(monitor=monitor, mode="min" if "loss" in monitor else "max")]
    kept += [EarlyStopping(monitor, patience=patience)] if patience else []
    given = {"accelerator": "cpu", "logger": False, "callbacks": kept, "max_epochs": 6, **options}
    return run_facts(L.Trainer(**given))


@pytest.mark.parametrize(
    ("then", "now", "lines"),
    [
        ({}, {"precision": "bf16-mixed"}, ["precision: '32-true' in the checkpoint, 'bf16-mixed' now"]),
        (
            {},
            {"gradient_clip_val": 0.5},
            [
                "gradient_clip_val: None in the checkpoint, 0.5 now",
                "gradient_clip_algorithm: None in the checkpoint, 'norm' now",
            ],
        ),
        (
            {"gradient_clip_val": 1},
            {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"},
            ["gradient_clip_algorithm: 'norm' in the checkpoint, 'value' now"],
        ),
        ({}, {"limit_train_batches": 1}, ["limit_train_batches: '1.0' in the checkpoint, '1' now"]),  # one batch, not all
        ({}, {"limit_val_batches": 0.5}, ["limit_val_batches: '1.0' in the checkpoint, '0.5' now"]),
        (
            {},
            {"monitor": "val/loss"},
            [
                "monitor: 'val/acc' in the checkpoint, 'val/loss' now",
                "mode: 'max' in the checkpoint, 'min' now",
                "best.ckpt becomes the best of the epochs from here on.",
            ],
        ),
        ({"patience": 3}, {"patience": 5}, ["patience: 3 in the checkpoint, 5 now"]),
        (
            {},
            {"max_epochs": 9},
            [
                "max_epochs: 6 in the checkpoint, 9 now",
                "The schedule of the learning rate, and what is a share of the run, follow the new length.",
            ],
        ),
        (
            {"accumulate_grad_batches": 4},
            {"callbacks": [GradientAccumulationScheduler({0: 4, 2: 1})]},
            [
                "accumulate_grad_batches: 4 in the checkpoint, {'0': 4, '2': 1} now",
                "monitor: 'val/acc' in the checkpoint, None now",
                "mode: 'max' in the checkpoint, None now",
                "best.ckpt becomes the best of the epochs from here on.",
            ],
        ),
        ({}, {}, None),
        ({"gradient_clip_val": 0}, {}, None),
    ],
)
def test_facts_of_the_run_that_differ_are_named_and_no_others(then, now, lines):
    said = compare_run({"finetune": {"run": facts(**then)}}, facts(**now))
    head = "warning: The run does not go on exactly as it would have:"
    assert said == (lines and "\n  ".join([head, *lines]))
    some = {"seed": 0, "precision": "32-true"}  # an older version wrote only these
    assert compare_run({"finetune": {"run": some}}, {**some, "max_epochs": 9}) is None


def test_the_command_names_facts_that_differ(run, capsys):
    words = ["--trainer.precision", "bf16-mixed", "--trainer.gradient_clip_val", "1", "--run.monitor", "val/loss"]
    main(["fit", "--ckpt_path", str(run), *words])  # nothing is left to train
    said = capsys.readouterr().out.partition("does not go on exactly")[2]
    for line in (
        "precision: '32-true' in the checkpoint, 'bf16-mixed' now",
        "monitor: 'val/acc' in the checkpoint, 'val/loss'",
    ):
        assert line in said
    assert "gradient_clip_val: None in the checkpoint, 1" in said
    assert "limit_train_batches" not in said


class Data:
    def __init__(self, drawn, **hparams):
        self.hparams = hparams
        self.folder = type("Folder", (), {"drawn": drawn})


def test_another_draw_of_held_out_pictures_is_refused():
    checkpoint = {"datamodule_hyper_parameters": {"split_seed": 0, "root": "a", "workers": 1}}
    with pytest.raises(CheckpointError, match=r"(?s)another draw.*split_seed: 0 in the checkpoint, 1 now.*measured on"):
        compare_data(checkpoint, Data(("val",), split_seed=1, root="a"))
    assert "root: 'a' in the checkpoint, 'b' now" in compare_data(checkpoint, Data(("val",), split_seed=0, root="b"))
    assert compare_data(checkpoint, Data(("val",), split_seed=0, root=Path("a"), workers=8, new=1)) is None
    assert compare_data({}, Data(())) is None
    assert compare_run({}, {"seed": 1}) is None


def test_the_number_of_classes_comes_from_the_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["fit", *TINY, "--model.num_classes", "7"])
    assert "model.num_classes is 7, but the data has 10 classes" in capsys.readouterr().err
    assert not Path("runs").exists()
    main(["fit", *TINY, "--model.num_classes", "10", *QUICK])


def test_progress_for_people():
    def at(processed, started, batches, last=False):
        progress = {"current": {"processed": processed, "started": started}}
        batch = {"current": {"processed": batches}, "is_last_batch": last}
        return {"loops": {"fit_loop": {"epoch_progress": progress, "epoch_loop.batch_progress": batch}}}

    assert progress_text(at(1, 1, 9, True)) == "1 epoch is done"
    assert progress_text(at(3, 3, 9, True)) == "3 epochs are done"
    assert progress_text(at(0, 1, 1)) == "0 epochs and 1 batch of the next are done"
    assert progress_text(at(1, 2, 5)) == "1 epoch and 5 batches of the next are done"
    assert progress_text({"epoch": 4}) == "5 epochs are done"
