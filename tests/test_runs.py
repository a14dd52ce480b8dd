"""A run's folder: made once whoever asks at the same time, found again, and with files that are whole or not there."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

from finetune.errors import CheckpointError, ConfigError
from finetune.runs import AtomicCheckpointIO, RunLogger, find_checkpoint, new_run, only_here, run_of

SHARED = "RESNET_FINETUNE_RUN"


@pytest.fixture(autouse=True)
def _own_variable(monkeypatch):
    monkeypatch.setenv(SHARED, "")


# -- a new run --------------------------------------------------------------------------------------------------------------


def test_processes_that_start_at_once_get_folders_of_their_own(tmp_path):
    code = (
        "import sys; from pathlib import Path; from finetune.runs import new_run;"
        "print('ready', flush=True); sys.stdin.readline();"
        "print(*(new_run(Path('runs'), 'x') for _ in range(50)))"
    )
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": tmp_path}
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    both = [subprocess.Popen([sys.executable, "-c", code], env=path, **options) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    made = [run for process in both for run in process.communicate(timeout=60)[0].split()]
    assert len(set(made)) == 100
    assert {str(folder.relative_to(tmp_path)) for folder in tmp_path.glob("runs/x/*")} == set(made)


def test_processes_of_one_run_share_its_folder(tmp_path, monkeypatch):
    run = new_run(tmp_path, "x")
    child = subprocess.run(["printenv", SHARED], capture_output=True, text=True, check=True)
    assert Path(child.stdout.strip()) == run
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert new_run(tmp_path, "x") == run
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    assert new_run(tmp_path, "x") != run


@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_folder_that_cannot_be_made(tmp_path, kind):
    # regression: a link to a disk that is not there kept the search for a free name going for ever
    root = tmp_path / "runs"
    root.touch() if kind == "file" else root.symlink_to(tmp_path / "unplugged" / "disk")
    with pytest.raises(ConfigError, match=r"cannot be made: .+\. Choose another with --run\.folder"):
        new_run(root, "x")


# -- finding a checkpoint ---------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for age, file in enumerate(("b/2/last", "a/1/last", "a/0/last", "b/2/best", "a/1/best", "c/only_last/last", "d/other/x")):
        path = Path("runs", *file.split("/")[:2], "checkpoints", f"{file.split('/')[2]}.ckpt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (1e9 - age, 1e9 - age))
    Path("runs/empty/1/checkpoints").mkdir(parents=True)
    return Path("runs")


@pytest.mark.parametrize(
    ("what", "options", "expected"),
    [
        ("last", {}, "b/2/checkpoints/last"),
        ("last", {"name": "a"}, "a/1/checkpoints/last"),
        ("runs/a/1", {}, "a/1/checkpoints/best"),
        ("runs/a/1/", {"prefer": "last"}, "a/1/checkpoints/last"),
        ("runs/a/0", {}, "a/0/checkpoints/last"),  # it has no best
        ("runs/c/only_last", {"prefer": "best"}, "c/only_last/checkpoints/last"),
        ("runs/d/other/checkpoints/x.ckpt", {}, "d/other/checkpoints/x"),
    ],
)
def test_what_is_meant(runs, what, options, expected):
    assert find_checkpoint(what, runs, **options) == runs / f"{expected}.ckpt"


@pytest.mark.parametrize(
    ("what", "name", "says"),
    [
        ("last", "empty", r"no run with a checkpoint in runs/empty: start one without --ckpt_path"),
        ("runs/empty/1", None, r"folder runs/empty/1 holds no checkpoint: expected runs/empty/1/checkpoints/best\.ckpt"),
        (
            "runs/d/other/checkpoints/y.ckpt",
            None,
            r"Did you mean 'x\.ckpt'\? Expected a \.ckpt file, a run's folder, or 'last'",
        ),
        ("nowhere/x.ckpt", None, r"There is no checkpoint nowhere/x\.ckpt\. Expected"),
        ("runs/a/7", None, r"There is no checkpoint runs/a/7\."),
    ],
)
def test_what_is_not_there(runs, what, name, says):
    with pytest.raises(CheckpointError, match=says):
        find_checkpoint(what, runs, name)


def test_the_run_of_a_checkpoint():
    assert run_of(Path("runs/a/1/checkpoints/best.ckpt")) == Path("runs/a/1")
    assert run_of(Path("downloads/best.ckpt")) is None


# -- metrics.csv ------------------------------------------------------------------------------------------------------------


def log(run, rows, until=None):
    logger = RunLogger(run, until)
    for step, values in rows:
        logger.log_metrics(values, step=step)
    logger.save()


def read(run):
    with (run / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


HISTORY = [(0, {"lr/head": 0.5}), (3, {"val/acc": 0.25}), (4, {"lr/head": 0.25}), (7, {"val/acc": 0.75})]


def test_history_is_kept_and_repeated_steps_are_not_there_twice(tmp_path):
    run = tmp_path / "x" / "1"
    log(run, HISTORY)
    before = (run / "metrics.csv").read_bytes()
    # the checkpoint was written after 4 steps, 0 to 3; the run that goes on has a metric more
    log(run, [(4, {"lr/head": 0.125}), (7, {"val/acc": 0.5, "val/new": 1.0})], until=4)
    assert read(run) == [
        {"step": "0", "lr/head": "0.5"},
        {"step": "3", "val/acc": "0.25"},
        {"step": "4", "lr/head": "0.125"},
        {"step": "7", "val/acc": "0.5", "val/new": "1.0"},
    ]
    assert {path.name for path in run.iterdir()} == {"metrics.csv"}

    again = tmp_path / "x" / "2"
    log(again, HISTORY)
    assert (again / "metrics.csv").read_bytes() == before
    log(again, [(8, {"lr/head": 0.0})])  # nothing is repeated
    assert [row["step"] for row in read(again)] == ["0", "3", "4", "7", "8"]


@pytest.mark.parametrize("rest", ["0.125", "0.125,", "0.125,5,0.5,,9", "\n"])
def test_a_line_that_a_kill_cut_off_is_dropped(tmp_path, rest):
    run = tmp_path / "x" / "1"
    log(run, HISTORY)
    with (run / "metrics.csv").open("a") as file:
        file.write(rest)
    log(run, [(7, {"val/acc": 0.5})], until=7)
    assert [row["step"] for row in read(run)] == ["0", "3", "4", "7"]


# -- writing checkpoints ----------------------------------------------------------------------------------------------------


class Unwritable:
    def __reduce__(self):
        raise RuntimeError("no space left")


@pytest.mark.parametrize("previous", [True, False])
def test_a_failure_leaves_the_previous_checkpoint(tmp_path, previous):
    io, path = AtomicCheckpointIO(), tmp_path / "checkpoints" / "last.ckpt"
    if previous:
        io.save_checkpoint({"epoch": 1, "a": torch.arange(3)}, str(path))
        before = path.read_bytes()
    with pytest.raises(RuntimeError, match="no space left"):
        io.save_checkpoint({"epoch": 2, "a": torch.zeros(100_000), "z": Unwritable()}, path)
    assert [p.name for p in path.parent.iterdir()] == (["last.ckpt"] if previous else [])
    if previous:
        assert path.read_bytes() == before
        assert torch.load(path, weights_only=True)["epoch"] == 1


def test_a_file_system_that_is_full(tmp_path):
    resource = pytest.importorskip("resource")
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"epoch": 1}, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"it needs 4\.0 MB"):
            io.save_checkpoint({"epoch": 2, "a": torch.zeros(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    assert torch.load(path, weights_only=True)["epoch"] == 1


def test_a_checkpoint_replaces_the_previous_one(tmp_path):
    for epoch in (1, 2):
        AtomicCheckpointIO().save_checkpoint({"epoch": epoch}, tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True) == {"epoch": 2}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.runs._PATIENCE", 0.1)
    code = "import sys; from pathlib import Path; from finetune.runs import only_here\n"
    code += "with only_here(Path(sys.argv[1])): print('mine', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(ConfigError, match="Another process is training in"), only_here(tmp_path):
            raise AssertionError
        other.communicate("")
    with only_here(tmp_path):
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGCHLD, signal.SIGTERM])
def test_a_signal_that_raises_waits_for_the_checkpoint(tmp_path, monkeypatch, number):
    def end(*_):
        raise InterruptedError

    def write(checkpoint, handle, *arguments, save=torch.save):
        os.kill(os.getpid(), number)
        for _ in range(1000):  # where the handler would be called
            pass
        save(checkpoint, handle)

    before = signal.signal(number, end)
    monkeypatch.setattr("finetune.runs.torch.save", write)
    try:
        with pytest.raises(InterruptedError):
            AtomicCheckpointIO().save_checkpoint({"a": torch.ones(3)}, tmp_path / "last.ckpt")
    finally:
        assert signal.signal(number, before) == end, "given back"
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["a"].sum() == 3
    assert not list(tmp_path.glob("*.part"))


def test_where_there_are_no_locks_training_goes_on_without(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("finetune.runs.FileLock.acquire", refuse)
    with pytest.raises(KeyError) as caught, only_here(tmp_path):
        raise KeyError
    assert caught.value.__context__ is None, "the user's error is not laid upon that of the lock"


def test_the_last_run_may_be_one_of_several(tmp_path):
    for number, run in enumerate(("small/1", "small-repeated/2/fold-1/3", "small-repeated/2/fold-2/4", "other/5")):
        file = tmp_path / run / "checkpoints" / "last.ckpt"
        file.parent.mkdir(parents=True)
        file.touch()
        os.utime(file, (number, number))
    assert find_checkpoint("last", tmp_path, "small").parent.parent == tmp_path / "small-repeated/2/fold-2/4"
    assert find_checkpoint("last", tmp_path).parent.parent == tmp_path / "other/5"
