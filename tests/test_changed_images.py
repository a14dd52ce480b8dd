"""Real runs whose images change before they are resumed or measured: what is read for training is never read for measuring."""

import csv
import hashlib
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import NETWORK

from finetune.loading import PictureDataset
from finetune.main import main

OPTIONS = [*NETWORK, "--data.image_size", "32", "--data.workers", "0", "--data.batch_size", "8", "--run.gradients_every", "0"]
OPTIONS += [
    "--trainer.accelerator",
    "cpu",
    "--trainer.enable_progress_bar",
    "false",
    "--data.root",
    "photos",
    "--config",
    "a.yaml",
]


def draw(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)


class Watched:
    """What was trained on and what was measured, by content, as the datasets were asked for it."""

    def __init__(self):
        self.trained, self.measured = set(), set()

    def note(self, dataset, index):
        content = hashlib.sha256(Path(dataset.root, dataset.pictures[index].file).read_bytes()).hexdigest()
        (self.measured if dataset.seed is None else self.trained).add(content)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Folders with a run of one epoch each: one whose split is drawn, one whose split is given."""
    found, before = {}, Path.cwd()
    for layout in ("drawn", "given"):
        home = tmp_path_factory.mktemp(layout)
        (home / "a.yaml").write_text("seed_everything: 0\n")
        for number in range(30):
            split = "" if layout == "drawn" else "val/" if number % 5 == 0 else "train/"
            draw(home / f"photos/{split}{'ab'[number % 2]}/{number:02d}.png", number)
        os.chdir(home)
        watched = Watched()
        with pytest.MonkeyPatch.context() as patch:
            watch(patch, watched)
            main(["fit", *OPTIONS, "--trainer.max_epochs", "1"])
        os.chdir(before)
        found[layout] = home, watched
    return found


def watch(patch, watched):
    read = PictureDataset.__getitem__

    def noted(self, key):
        watched.note(self, key[1] if isinstance(key, tuple) else key)
        return read(self, key)

    patch.setattr(PictureDataset, "__getitem__", noted)


@pytest.fixture
def copy(started, tmp_path, monkeypatch, request):
    """A copy of a folder with its run, in which both can be changed; it tells what is read."""
    home, before = started[request.param]
    shutil.copytree(home, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    watched = Watched()
    watched.trained, watched.measured = set(before.trained), set(before.measured)
    watch(monkeypatch, watched)
    return watched


def run():
    (found,) = Path("runs/a").iterdir()
    return found


def held_out():
    with (run() / "split.csv").open(newline="") as file:
        return [Path("photos", row["file"]) for row in csv.DictReader(file) if row["split"] == "val"]


def resume(capsys, epochs):
    capsys.readouterr()
    main(["fit", *OPTIONS, "--ckpt_path", str(run()), "--trainer.max_epochs", str(epochs)])
    return capsys.readouterr().out


drawn = pytest.mark.parametrize("copy", ["drawn"], indirect=True)
given = pytest.mark.parametrize("copy", ["given"], indirect=True)


@drawn
def test_held_out_images_are_deleted(copy, capsys):
    table = (run() / "split.csv").read_bytes()
    first, *others = held_out()
    for path in others[:3]:
        path.unlink()
    names = ", ".join(path.relative_to("photos").as_posix() for path in others[:3])
    before = set(copy.measured)
    main(["validate", *OPTIONS, "--ckpt_path", str(run())])
    assert f"3 removed ({names})" in capsys.readouterr().out
    main(["evaluate", str(run()), "--calibrate", "--workers", "0", "--resamples", "0"])
    said = capsys.readouterr().out
    assert said.count(f"3 removed ({names})") == 1
    assert f"fitted on {len(others) - 2} validation pictures" in said
    assert f"3 removed ({names})" in resume(capsys, 2)
    assert copy.measured == before
    assert (run() / "split.csv").read_bytes() == table
    draw(others[0], 1000)  # new content where a held-out image was: it is trained on, and from then on not measured
    draw(Path("photos/a/new.png"), 1001)
    said = resume(capsys, 3)
    assert "2 added" in said
    assert "removed" not in said  # which was said and written down by the resume before
    os.replace("photos/a/new.png", first)
    assert "1 renamed" in (said := resume(capsys, 4)) or "1 moved" in said
    assert not copy.trained & copy.measured


@drawn
def test_class_folders_are_swapped(copy, capsys):
    os.replace("photos/a", "photos/c")
    os.replace("photos/b", "photos/a")
    os.replace("photos/c", "photos/b")
    said = resume(capsys, 2)
    assert "30 moved to another class" in said
    assert "15 a → b" in said
    assert not copy.trained & copy.measured


@drawn
def test_images_are_renamed_moved_copied_and_removed_at_random(copy, capsys):
    drawing = random.Random(0)
    for session in range(2):
        files = sorted(Path("photos").rglob("*.png"))
        for number, path in enumerate(drawing.sample(files, 12)):
            other = path.with_name(f"{session}-{number}.png")
            drawing.choice([path.rename, lambda to, path=path: shutil.copy(path, to), lambda _, path=path: path.unlink()])(
                other
            )
        assert "have changed since the run was started" in resume(capsys, 2 + session)
        assert not copy.trained & copy.measured


@given
def test_training_images_are_copied_into_the_validation_folder(copy, capsys):
    for path in sorted(Path("photos/train/a").iterdir())[:4]:
        shutil.copy(path, Path("photos/val/a", f"copy-{path.name}"))
    main(["evaluate", str(run()), "photos", "--workers", "0", "--resamples", "0"])
    assert "4 of the 10 images were trained on" in capsys.readouterr().out
    assert "4 in a split that their content does not belong to" in resume(capsys, 2)
    assert not copy.trained & copy.measured


@drawn
def test_without_its_table_a_run_whose_images_changed_is_not_measured(copy, capsys):
    (run() / "split.csv").unlink()
    main(["evaluate", str(run()), "--workers", "0", "--resamples", "0"])  # nothing has changed: the draw is the same
    capsys.readouterr()
    held = {row.split(",")[0] for row in (run() / "evaluation/photos-val/predictions.csv").read_text().splitlines()[1:]}
    Path(sorted(held)[0]).unlink()
    for words in (["evaluate", str(run()), "--overwrite"], ["fit", *OPTIONS, "--ckpt_path", str(run())]):
        with pytest.raises(SystemExit):
            main(words)
        assert "its run's split.csv is not there" in capsys.readouterr().err
