"""Words in, words out: a table of what the command's words become."""

import os
from pathlib import Path

import pytest

from finetune.arguments import resolve
from finetune.errors import CheckpointError, ConfigError

SMALL = str(Path(__file__).parents[1] / "recipes" / "small.yaml")
OLD, NEW, ELSEWHERE = "runs/small/1", "runs/large/2", "other/mine/3"


@pytest.fixture(autouse=True)
def _folders(tmp_path, monkeypatch):
    """Two runs, one of them newer, one in another folder, a configuration, and a checkpoint outside any run."""
    monkeypatch.chdir(tmp_path)
    for age, run in enumerate((ELSEWHERE, NEW, OLD)):
        folder = Path(run, "checkpoints")
        folder.mkdir(parents=True)
        Path(run, "config.yaml").touch()
        for kind in ("best", "last"):
            (folder / f"{kind}.ckpt").touch()
            os.utime(folder / f"{kind}.ckpt", (1e9 - age, 1e9 - age))
    for name in ("mine.yaml", "stray.ckpt"):
        Path(name).touch()


def config(path):
    return ["--config", str(path)]


def start(run, kind):
    return [*config(f"{run}/config.yaml"), "--ckpt_path", f"{run}/checkpoints/{kind}.ckpt"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fit", "--track", "wandb"], ["fit", "--run.track", "wandb"]),
        (
            ["fit", "--track=wandb", "--model.lr", "1", "--track", "tensorboard"],
            ["fit", "--run.track", "wandb,tensorboard", "--model.lr", "1"],
        ),
        # nothing of ours: the words stay as they are, in their order
        (["fit"], ["fit"]),
        (["fit", "--model.lr", "3", "--trainer.max_epochs=2"], ["fit", "--model.lr", "3", "--trainer.max_epochs=2"]),
        (["test", "--help"], ["test", "--help"]),
        # a recipe becomes its file and names the run; a name that is given comes later, so it wins
        (["fit", "--config", "small"], ["fit", *config(SMALL), "--run.name", "small"]),
        (["fit", "-c", "small"], ["fit", *config(SMALL), "--run.name", "small"]),
        (["fit", "--config=small.yaml"], ["fit", *config(SMALL), "--run.name", "small"]),
        (["validate", "--config", "small"], ["validate", *config(SMALL)]),
        (["fit", "--config", "mine.yaml"], ["fit", *config("mine.yaml"), "--run.name", "mine"]),
        (
            ["fit", "--model.lr", "3", "--config", "small", "--config", "mine.yaml", "--run.name", "x"],
            ["fit", *config(SMALL), *config("mine.yaml"), "--run.name", "mine", "--model.lr", "3", "--run.name", "x"],
        ),
        # a run becomes a checkpoint with the configuration beside it: to go on, the last; to measure, the best
        (["fit", "--ckpt_path", OLD], ["fit", *start(OLD, "last")]),
        (["test", "--ckpt_path", OLD], ["test", *start(OLD, "best")]),
        (["validate", f"--ckpt_path={OLD}"], ["validate", *start(OLD, "best")]),
        (["fit", "--ckpt_path", f"{OLD}/checkpoints/best.ckpt"], ["fit", *start(OLD, "best")]),
        (["fit", "--ckpt_path", "x", "--ckpt_path", OLD, "--model.lr", "3"], ["fit", *start(OLD, "last"), "--model.lr", "3"]),
        # last: the newest run, the newest of the recipe's, the newest of the folder
        (["fit", "--ckpt_path", "last"], ["fit", *start(NEW, "last")]),
        (
            ["fit", "--config", "small", "--ckpt_path", "last"],
            ["fit", *config(SMALL), "--ckpt_path", f"{OLD}/checkpoints/last.ckpt"],
        ),
        (
            ["fit", "--ckpt_path", "last", "--run.folder", "other"],
            ["fit", *start(ELSEWHERE, "last"), "--run.folder", "other"],
        ),
        # a configuration of the user takes the place of the run's
        (
            ["test", "--ckpt_path", "stray.ckpt", "--config", "mine.yaml"],
            ["test", *config("mine.yaml"), "--ckpt_path", "stray.ckpt"],
        ),
        # null: from the start, whatever the configuration says
        (
            ["fit", "--config", "mine.yaml", "--ckpt_path", "null"],
            ["fit", *config("mine.yaml"), "--run.name", "mine", "--ckpt_path", "null"],
        ),
    ],
    ids=lambda value: " ".join(value).replace(SMALL, "SMALL"),
)
def test_words(words, expected):
    assert resolve(words) == expected


@pytest.mark.parametrize(
    ("words", "error", "says"),
    [
        (["fit", "--config"], ConfigError, "--config needs a value"),
        (["fit", "--ckpt_path="], ConfigError, "--ckpt_path needs a value"),
        (["fit", "--config", "smal"], ConfigError, "Did you mean 'small'"),
        (["fit", "--ckpt_path", "stray.ckpt"], ConfigError, r"no config\.yaml of a run beside stray\.ckpt"),
        (["fit", "--ckpt_path", "stry.ckpt"], CheckpointError, r"Did you mean 'stray\.ckpt'"),
        (["fit", "--ckpt_path", "last", "--run.folder", "none"], CheckpointError, "no run with a checkpoint in none"),
        (["fit", "--ckpt_path", "last", "--config", "scratch"], CheckpointError, "no run with a checkpoint in runs/scratch"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes(words, error, says):
    with pytest.raises(error, match=says):
        resolve(words)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"model:\n  lr: [1\n", r"broken\.yaml, line 3, column 1 is no YAML"),
        (b"model:\n\tlr: 1\n", r"broken\.yaml, line 2, column 1 is no YAML"),
        (b"- model\n", r"broken\.yaml holds list where options are expected"),
        (b"# caf\xe9\n", r"broken\.yaml is no text in UTF-8"),
    ],
)
def test_a_broken_configuration_is_named_with_its_line(tmp_path, text, says):
    path = tmp_path / "broken.yaml"
    path.write_bytes(text)
    with pytest.raises(ConfigError, match=says):
        resolve(["fit", "--config", str(path)])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "trainer: 5",
            "mine.yaml: the section 'trainer' holds int '5', expected options, such as 'trainer: {max_epochs: 10}'.",
        ),
        ("trainer: [max_epochs, 5]", "the section 'trainer' holds list"),
        ("model: 5", "the section 'model' holds int '5'"),
        ("model:", "the section 'model' holds nothing"),
        ("data: []", "the section 'data' holds list '[]'"),
        ("run: x", "the section 'run' holds str 'x'"),
        ("run: false", "the section 'run' holds bool 'False'"),
        ("fit:\n  trainer: 5", "the section 'fit.trainer' holds int '5'"),
    ],
)
def test_a_section_without_options_is_named(text, says):
    Path("mine.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        resolve(["fit", "--config", "mine.yaml"])
    assert says in str(caught.value)
    Path(OLD, "config.yaml").write_text(text)  # that of a run is checked as well
    with pytest.raises(ConfigError):
        resolve(["fit", "--ckpt_path", OLD])


@pytest.mark.parametrize("text", ["trainer:", "run: null", "model: my.Module", "data: {batch_size: 3}", "run: part.yaml", ""])
def test_sections_that_are_fine(text):
    Path("mine.yaml").write_text(text)
    Path("part.yaml").touch()
    assert resolve(["fit", "--config", "mine.yaml"])[1:3] == ["--config", "mine.yaml"]
