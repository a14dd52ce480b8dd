"""Try to make the command delete, replace or read what it was not asked to, under a watch over the whole file tree.

Every attack works in a folder of its own below one scratch folder. Before and after it, all files below the scratch folder are
compared, the home and the cache included: kind, mode, content, and where links lead. Only the outputs that the arguments name
may change. A file called `hacked...` counts as code that was run.

python benchmarks/destroy.py            each attack in a process of its own
python benchmarks/destroy.py --quick    all of them in this process
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import csv
import hashlib
import io
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from damage import picture
from tabulate import tabulate

from finetune.main import main

TINY = ["--model.backbone", "test_resnet", "--model.weights", "none", "--data.image_size", "32", "--data.workers", "0"]
TINY += ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu", "--run.gradients_every", "0"]
SECRET = b"the user's secret" * 9
CACHES = ("cache/checked", "xdg", "home/.cache", "home/.config")  # what the command and its libraries keep for themselves
SECONDS = 180  # for one attack; what waits for a pipe would never end


class Attack(NamedTuple):
    """Something that tries to change what it should not.

    Attributes:
        name: What it tries.
        entry: The number of the kind of fault.
        args: The arguments of the command.
        cwd: The working folder, relative to the scratch folder.
        may_change: What the command may write: paths relative to the scratch folder.
        process: Whether it needs a process of its own in any case.
    """

    name: str
    entry: int
    args: list[str]
    cwd: str = "."
    may_change: tuple[str, ...] = ()
    process: bool = False


class Result(NamedTuple):
    """What an attack came to: its exit code, what changed, whether code ran, what steers, and the last line printed."""

    code: object
    changed: list[str]
    ran: bool
    steers: list[str]
    said: str


leaks: list[str] = []
"""What attacks brought to light although nothing was changed: content of a file that the command should not have read."""


# --------------------------------------------------------------------------------------------------------- the watch


def snapshot(root: Path) -> dict[str, tuple[int, int, str]]:
    """Return kind, mode and content of all that is below a folder; links are not followed."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            status = os.lstat(path)
            content = ""
            if stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            elif stat.S_ISREG(status.st_mode):
                content = hashlib.blake2b(Path(path).read_bytes()).hexdigest()
            found[os.path.relpath(path, root)] = (stat.S_IFMT(status.st_mode), stat.S_IMODE(status.st_mode), content)
    return found


def differences(before: dict[str, Any], after: dict[str, Any], may_change: tuple[str, ...]) -> list[str]:
    """Return what was changed, added or removed outside of what may change."""

    def allowed(path: str) -> bool:
        return any(
            path == each or path.startswith(f"{each}/") or ("*" in each and fnmatchcase(path, each)) for each in may_change
        )

    changed = [path for path in sorted({*before, *after}) if before.get(path) != after.get(path) and not allowed(path)]
    return [f"{'-' if path not in after else '+' if path not in before else '~'}{path}" for path in changed]


class _TooLongError(BaseException):
    pass


def _stop(*_: object) -> None:
    raise _TooLongError


def run_here(attack: Attack, scratch: Path) -> tuple[object, str]:
    """Run the command in this process; return its exit code and what it printed."""
    printed, before, path = io.StringIO(), Path.cwd(), [*sys.path]
    code: object = 0
    handler = signal.signal(signal.SIGALRM, _stop)
    os.chdir(scratch / attack.cwd)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            main(attack.args)
    except SystemExit as end:
        code = end.code
    except _TooLongError:
        code = "HANGS"
    except Exception as error:
        code = f"TRACEBACK {type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        os.chdir(before)
        sys.path[:] = path
    return code, printed.getvalue()


def run_apart(attack: Attack, scratch: Path) -> tuple[object, str]:
    """Run the command in a process of its own; return its exit code and what it printed."""
    words = [sys.executable, "-m", "finetune", *attack.args]
    try:
        done = subprocess.run(words, cwd=scratch / attack.cwd, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return "HANGS", ""
    traceback = "Traceback (most recent call last)" in done.stderr
    return "TRACEBACK" if traceback else done.returncode, done.stdout + done.stderr


def judge(attack: Attack, scratch: Path, apart: bool) -> Result:
    """Run an attack under the watch."""
    before = snapshot(scratch)
    code, said = (run_apart if apart or attack.process else run_here)(attack, scratch)
    after = snapshot(scratch)
    lines = [line for line in said.splitlines() if line.strip()]
    message = next((line for line in lines if line.startswith("error: ")), lines[-1] if lines else "")
    ran = [path for path in after.keys() - before.keys() if os.path.basename(path).startswith("hacked")]
    for path in ran:
        (scratch / path).unlink()  # so that the next attack can be seen to run
    changed = differences(before, after, (*attack.may_change, *CACHES))
    result = Result(code, changed, bool(ran), _steers(attack, said, scratch), message)
    print(f"{attack.entry} {attack.name}: {result.code} {result.changed[:3] or ''}", file=sys.stderr, flush=True)
    return result


def _steers(attack: Attack, said: str, scratch: Path) -> list[str]:
    from destroy_code import steers

    resumes = attack.entry == 7 and attack.args[0] == "fit"
    return steers(said, scratch / attack.may_change[0] if resumes else scratch / "nothing")


# ------------------------------------------------------------------------------------------------------ what is there


class World:
    """A trained run and images, copied into a new folder for each attack.

    Args:
        scratch: The scratch folder.
    """

    def __init__(self, scratch: Path) -> None:
        self.scratch, self.base, self.number = scratch, scratch / "base", 0
        for name in ("c0", "c1"):
            (self.base / "photos" / name).mkdir(parents=True)
            for index in range(8):
                picture(100 * int(name[1]) + index).save(self.base / "photos" / name / f"{index}.png")
        words = [*TINY, "--data.root", str(self.base / "photos"), "--data.batch_size", "4", "--trainer.max_epochs", "2"]
        words += ["--run.soup", "2", "--run.name", "base", "--run.folder", str(self.base)]
        code, said = run_here(Attack("", 0, ["fit", *words]), scratch)
        assert code == 0, said
        (made,) = (self.base / "base").iterdir()
        made.rename(self.base / "run")

    def folder(self) -> Path:
        """Return the folder of a new attack: `run`, `photos`, `mine` (a folder of the user's) and `thesis.txt`."""
        shutil.rmtree(self.scratch / f"{self.number:02d}", ignore_errors=True)
        self.number += 1
        folder = self.scratch / f"{self.number:02d}"
        shutil.copytree(self.base / "run", folder / "run")
        shutil.copytree(self.base / "photos", folder / "photos")
        (folder / "mine" / "sub").mkdir(parents=True)
        for name in ("mine/a.txt", "mine/sub/b.txt", "thesis.txt"):
            (folder / name).write_bytes(SECRET)
        return folder


# ---------------------------------------------------------------------------------------------------------- the attacks

Group = Callable[[World], Iterator[Attack]]


def attacks(scratch: Path, groups: Sequence[Group] = ()) -> Iterator[Attack]:
    """Prepare each attack, and yield it."""
    world = World(scratch)
    for group in groups or GROUPS:
        yield from group(world)
    if not groups:
        from destroy_code import attacks as attacks_on_code

        (scratch / "code").mkdir()
        for attack in attacks_on_code(scratch / "code"):
            places = tuple(f"code/{path}" for path in attack.may_change)
            yield attack._replace(cwd=f"code/{attack.cwd}", may_change=places)


def output_names(world: World) -> Iterator[Attack]:
    """Entry 1: names of outputs that are made from the user's input, and folders that we did not make."""
    for where, what in (("photos/c0", ".."), ("photos", "."), ("photos", "../photos/c0/..")):
        folder = world.folder()
        (folder / "run" / "notes.txt").write_text("mine")
        (folder / "run" / "evaluation" / "kept").mkdir(parents=True)
        (folder / "run" / "evaluation" / "kept" / "notes.txt").write_text("mine")
        args = ["evaluate", str(folder / "run"), what, "--overwrite", "--resamples", "0", "--workers", "0"]
        place = f"{folder.name}/run/evaluation/photos"
        yield Attack(f"evaluate RUN {what}", 1, args, f"{folder.name}/{where}", (place,))
    folder = world.folder()
    shutil.copy(folder / "run" / "checkpoints" / "best.ckpt", folder / "mine" / "model.ckpt")
    args = ["evaluate", "../../mine/model.ckpt", "..", "--resamples", "0", "--workers", "0"]
    place = f"{folder.name}/mine/evaluation"
    yield Attack("evaluate FILE .. beside the user's files", 1, args, f"{folder.name}/photos/c0", (place,))
    for words in (["evaluate", "run", "photos"], ["export", "run", "--format", "timm", "--pictures", "photos"]):
        for out, place in (("mine", "."), ("link", "."), (".", "mine"), ("..", "mine/sub")):
            folder = world.folder()
            (folder / "link").symlink_to(folder / "mine")
            root = os.path.relpath(folder, folder / place)
            args = [words[0], f"{root}/run", *(f"{root}/photos" if word == "photos" else word for word in words[2:])]
            args += ["--out", out, "--overwrite"]
            yield Attack(f"{words[0]} --out {out} --overwrite", 1, args, f"{folder.name}/{place}")
    folder = world.folder()
    path = folder / "run" / "checkpoints" / "best.ckpt"
    content = torch.load(path, weights_only=True)
    content["datamodule_hyper_parameters"]["root"] = f"{folder}/photos/c0/.."
    torch.save(content, path)
    args = ["evaluate", "run", "--split", "val", "--resamples", "0", "--overwrite"]
    yield Attack("evaluate RUN, whose checkpoint names ..", 1, args, folder.name, (f"{folder.name}/run/evaluation",))


def temporary_names(world: World) -> Iterator[Attack]:
    """Entry 2: names that lie beside the output, and links at them."""
    folder = world.folder()
    for name in ("model.part", "eval.part"):
        shutil.copytree(folder / "mine", folder / name)
    export = ["export", "run", "--format", "timm", "--pictures", "photos", "--out", "model"]
    yield Attack("export beside a folder model.part", 2, export, folder.name, (f"{folder.name}/model",))
    evaluate = ["evaluate", "run", "photos", "--resamples", "0", "--out", "eval"]
    yield Attack("evaluate beside a folder eval.part", 2, evaluate, folder.name, (f"{folder.name}/eval",))
    for name in ("x.csv.part", "x.csv.part.json", "x.csv.part.json.part"):
        for kind in ("file", "link", "broken link"):
            folder = world.folder()
            if kind == "file":
                (folder / name).write_bytes(SECRET)
            else:
                (folder / name).symlink_to(folder / ("thesis.txt" if kind == "link" else "mine/new.txt"))
            predict = ["predict", "run", "photos", "--out", "x.csv", "--workers", "0"]
            yield Attack(f"predict, {name} is a {kind}", 2, predict, folder.name, (f"{folder.name}/x.csv",))
    folder = world.folder()
    os.mkfifo(folder / "x.csv")
    predict = ["predict", "run", "photos", "--out", "x.csv", "--overwrite", "--workers", "0"]
    yield Attack("predict --overwrite a pipe", 2, predict, folder.name)
    folder = world.folder()
    shutil.copytree(folder / "run", folder / "run2")
    for name in ("index.html", "comparison.html"):
        (folder / name).write_text("<html>mine</html>")
    yield Attack("report over a page of the user's", 2, ["report", "run", "--out", "index.html"], folder.name)
    yield Attack("report of two runs over comparison.html", 2, ["report", "run", "run2"], folder.name)
    (folder / "small.yaml").symlink_to(folder / "mine" / "new.yaml")
    yield Attack("recipes --copy through a broken link", 2, ["recipes", "--copy", "small", "small.yaml"], folder.name)
    (folder / "pages").mkdir()
    (folder / "pages" / "explained-01.png").symlink_to(folder / "thesis.txt")
    explain = ["explain", "run", "photos/c0/0.png", "--neighbours", "0", "--out", "pages"]
    page = f"{folder.name}/pages/explained-01.png"
    yield Attack("explain --overwrite through a link", 2, [*explain, "--overwrite"], folder.name, (page,))
    for name in ("best.ckpt.part", "last.ckpt.part", "soup.ckpt.part"):
        folder = world.folder()
        (folder / "run" / "checkpoints" / name).symlink_to(folder / "thesis.txt")
        yield Attack(f"resume, {name} is a link", 2, _resume(folder), folder.name, (f"{folder.name}/run",))
    kept = world.scratch / "cache" / "kept"
    for name in ("photos", "0" * 32):
        (kept / name).mkdir(parents=True)
        (kept / name / "0.png").write_bytes(SECRET)
    (kept / ("1" * 32)).symlink_to(folder / "mine")
    yield Attack("reuse --clear with folders of the user's", 2, ["reuse", "--clear"], folder.name)
    mine = world.scratch / "cache" / "digits-v1" / "train"
    mine.mkdir(parents=True)
    (mine / "holiday.png").write_bytes(SECRET)
    fit = ["fit", *TINY, "--data.root", "digits", "--trainer.fast_dev_run", "true"]
    yield Attack("fit on digits, the cache holds other files", 2, fit, folder.name, (f"{folder.name}/runs",))


def _resume(folder: Path) -> list[str]:
    words = [*TINY, "--data.root", str(folder.parent / "base" / "photos"), "--data.batch_size", "4", "--run.soup", "2"]
    return ["fit", "--ckpt_path", "run", *words, "--trainer.max_epochs", "4"]


def paths_in_a_checkpoint(world: World) -> Iterator[Attack]:
    """Entry 3: the state of a callback names files and folders that it would delete."""
    forms = {
        "a folder of the user's": "{folder}/mine",
        "local://": "local://{folder}/mine",
        "a way out of checkpoints": "{folder}/run/checkpoints/../../mine",
        "a file of the user's": "{folder}/run/checkpoints/../../thesis.txt",
    }
    for what, form in forms.items():
        for soup in (False, True):
            folder = world.folder()
            path = folder / "run" / "checkpoints" / "last.ckpt"
            content = torch.load(path, weights_only=True)
            target = form.format(folder=folder)
            for key, state in content["callbacks"].items():
                if not key.startswith("BestEpochs" if soup else "ModelCheckpoint"):
                    continue
                state.pop("dirpath", None)
                worst = torch.tensor(-1.0)
                others = {f"{target}/{number}": worst for number in range(int(soup))}
                state |= {"best_k_models": {target: worst, **others}, "kth_best_model_path": target, "kth_value": worst}
                state |= {"best_model_path": target, "best_model_score": worst, "last_model_path": target}
            torch.save(content, path)
            name = "the best epochs" if soup else "the best checkpoint"
            yield Attack(f"resume, {name} names {what}", 3, _resume(folder), folder.name, (f"{folder.name}/run",))
    folder = world.folder()
    (folder / "backup").mkdir()
    for name in ("precious.ckpt", "other.ckpt"):
        (folder / "backup" / name).write_bytes(SECRET)
    options = {"dirpath": str(folder / "backup"), "filename": "mine", "monitor": "val/loss", "mode": "min"}
    own = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": options}
    (folder / "own.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [own]}}))
    from lightning.pytorch.callbacks import ModelCheckpoint

    path = folder / "run" / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    precious, worst = f"{folder}/backup/precious.ckpt", torch.tensor(1e30)
    content["callbacks"][ModelCheckpoint(**options).state_key] = {
        **dict.fromkeys(("kth_best_model_path", "best_model_path", "last_model_path"), precious),
        **dict.fromkeys(("best_model_score", "current_score", "kth_value"), worst),
        "best_k_models": {precious: worst},
        "dirpath": str(folder / "backup"),
        "monitor": "val/loss",
    }
    torch.save(content, path)
    places = (f"{folder.name}/run", *(f"{folder.name}/backup/mine{end}.ckpt" for end in ("", "-v1", "-v2")))
    args = [*_resume(folder), "--config", "run/config.yaml", "--config", "own.yaml"]
    yield Attack("resume, a callback of the user's names another file of its folder", 3, args, folder.name, places)


def links_and_pipes(world: World) -> Iterator[Attack]:
    """Entry 4: a run that came from elsewhere holds links, pipes, and tables that name other files."""
    for name in ("augmented.jpg", "explained.png", "config.yaml", "metrics.csv"):
        folder = world.folder()
        (folder / "run" / name).unlink(missing_ok=True)
        (folder / "run" / name).symlink_to(folder / "thesis.txt")
        page = folder / "run" / "report.html"
        yield Attack(f"report, {name} is a link", 4, ["report", "run"], folder.name, (f"{folder.name}/run/report.html",))
        text = page.read_text(errors="replace") if page.is_file() else ""
        if SECRET.decode() in text or base64.b64encode(SECRET).decode() in text:
            leaks.append(f"report shows what {name} links to")
    for args in (["report", "run"], ["explain", "run", "--mistakes", "--neighbours", "0", "--out", "pages"]):
        for kind in ("a pipe", "a file elsewhere", "metrics.csv is a pipe"):
            folder = world.folder()
            os.mkfifo(folder / "photos" / "pipe.png")
            picture(77).save(folder / "private.png")
            if kind == "metrics.csv is a pipe":
                (folder / "run" / "metrics.csv").unlink()
                os.mkfifo(folder / "run" / "metrics.csv")
            else:
                named = "photos/pipe.png" if kind == "a pipe" else "private.png"
                _name_in_predictions(folder / "run", folder / named)
            places = (f"{folder.name}/run/report.html", f"{folder.name}/pages")
            yield Attack(f"{args[0]}, predictions name {kind}", 4, args, folder.name, places)
            page = folder / "run" / "report.html"
            if kind == "a file elsewhere" and args[0] == "report" and page.stat().st_mtime > _made(folder):
                leaks.extend(["report shows an image outside of the data"] if _shows(page, folder / "private.png") else [])
    for name in ("metrics.csv", "gradients.csv", "config.resumed.yaml", ".lock", "split.csv", "explained.png", "report.html"):
        folder = world.folder()
        (folder / "run" / name).unlink(missing_ok=True)
        (folder / "run" / name).symlink_to(folder / "thesis.txt")
        args = [*_resume(folder), "--run.gradients_every", "1"]
        yield Attack(f"resume, {name} is a link", 4, args, folder.name, (f"{folder.name}/run",))
    folder = world.folder()
    (folder / "run" / "checkpoints").rename(folder / "models")
    (folder / "run" / "checkpoints").symlink_to(folder / "models")
    yield Attack("resume, checkpoints is a link", 4, _resume(folder), folder.name, (f"{folder.name}/run",))
    for name, words in {"evaluation": ["evaluate", "run", "photos"], "export": ["export", "run", "--format", "timm"]}.items():
        folder = world.folder()
        (folder / "run" / name).symlink_to(folder / "mine")
        args = [*words, *(["--pictures", "photos"] if name == "export" else ["--resamples", "0"])]
        yield Attack(f"{words[0]}, {name} is a link", 4, args, folder.name)
    folder = world.folder()
    shutil.copytree(folder / "run" / "checkpoints", folder / "mine" / "checkpoints")
    for name in ("report.html", "metrics.csv"):
        (folder / "mine" / name).write_bytes(SECRET)
    args = [*_resume(folder), "--config", "run/config.yaml", "--run.folder", "runs"]
    args[2] = "mine/checkpoints/last.ckpt"
    yield Attack("resume a checkpoint in a project of the user's", 4, args, folder.name, (f"{folder.name}/runs",))


def _made(folder: Path) -> float:
    return (folder / "private.png").stat().st_mtime


def _shows(page: Path, image: Path) -> bool:
    from finetune.thumbnails import data_uri, thumbnail

    small = thumbnail(image)
    return small is not None and data_uri(small) in page.read_text(encoding="utf-8")


def _name_in_predictions(run: Path, file: Path) -> None:
    """Let all rows of a run's predictions name one file, and be wrong."""
    for table in run.glob("predictions.*.csv"):
        with table.open(newline="") as handle:
            rows = list(csv.reader(handle))
        number = {name.removeprefix("p:"): place for place, name in enumerate(rows[0])}
        for row in rows[1:]:
            row[0], row[1] = str(file), "c0"
            row[2], row[3], row[number["c0"]], row[number["c1"]] = "c1", "0.9", "0.1", "0.9"
        with table.open("w", newline="") as handle:
            csv.writer(handle).writerows(rows)


def places_of_others(world: World) -> Iterator[Attack]:
    """Entry 4: a configuration names the folder of another run, or a name leads out of the folder of runs."""
    loggers = "lightning.pytorch.loggers"
    callbacks = "lightning.pytorch.callbacks"
    brought = {
        "CSVLogger on another run": ("logger", f"{loggers}.CSVLogger", {"save_dir": ".", "name": "", "version": "run"}),
        "CSVLogger on other metrics": ("logger", f"{loggers}.CSVLogger", {"save_dir": ".", "name": "", "version": "plain"}),
        "TensorBoardLogger in another run": ("logger", f"{loggers}.TensorBoardLogger", {"save_dir": "run", "version": "x"}),
        "ModelCheckpoint in another run": (
            "callbacks",
            f"{callbacks}.ModelCheckpoint",
            {"dirpath": "run/checkpoints", "filename": "best", "enable_version_counter": False},
        ),
        "ModelCheckpoint over a checkpoint": (
            "callbacks",
            f"{callbacks}.ModelCheckpoint",
            {"dirpath": "plain", "filename": "mine", "enable_version_counter": False},
        ),
    }
    for name, (kind, path, options) in brought.items():
        folder = world.folder()
        (folder / "plain").mkdir()
        for file in ("metrics.csv", "mine.ckpt"):
            (folder / "plain" / file).write_bytes(SECRET)
        own = {"class_path": path, "init_args": options}
        content = {"trainer": {kind: [own]}, "data": {"init_args": {"root": "photos", "batch_size": 4}}}
        (folder / "own.yaml").write_text(yaml.safe_dump(content))
        args = ["fit", *TINY, "--config", "own.yaml", "--trainer.max_epochs", "1"]
        yield Attack(name, 4, args, folder.name, (f"{folder.name}/runs",))
    for name in ("../../x", "..", "/{folder}/mine/x", "a/../../../x"):
        folder = world.folder()
        args = ["fit", *TINY, "--data.root", "photos", "--run.name", name.format(folder=folder), "--trainer.max_epochs", "1"]
        yield Attack(f"run.name {name}", 4, args, folder.name, (f"{folder.name}/runs",))


def several_writers(world: World) -> Iterator[Attack]:
    """Entry 4: two writers of one table at once."""
    for out in ("x.csv", "x.jsonl"):
        folder = world.folder()
        files = folder / "list.txt"
        files.write_text("".join(f"{path}\n" for path in sorted(Path(folder, "photos").glob("*/*.png")) * 60))
        words = [
            "predict",
            "run",
            "--files_from",
            "list.txt",
            "--out",
            out,
            "--batch_size",
            "1",
            "--workers",
            "0",
            "--overwrite",
        ]
        first = subprocess.Popen(
            [sys.executable, "-m", "finetune", *words], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while first.poll() is None and not (folder / f"{out}.part.json").is_file():
            time.sleep(0.05)
        own = (out, f"{out}.part", f"{out}.part.json", f".{out}.part.json.resnet-finetune-*.part")  # the last come and go
        places = tuple(f"{folder.name}/{name}" for name in own)
        yield Attack(f"two predict --overwrite {out} at once", 4, words, folder.name, places)
        code = first.wait()
        table = folder / out
        rows = table.read_bytes().splitlines() if table.is_file() else []
        if code or b"\0" in b"".join(rows) or len(rows) != 16 * 60 + (out == "x.csv"):
            leaks.append(f"two predict --overwrite {out}: exit code {code} of the first, {len(rows)} rows of {16 * 60}")
            table.unlink(missing_ok=True)


GROUPS: tuple[Group, ...] = (
    output_names,
    temporary_names,
    paths_in_a_checkpoint,
    links_and_pipes,
    places_of_others,
    several_writers,
)


# ---------------------------------------------------------------------------------------------------------------- all


def try_all(
    scratch: Path, apart: bool = False, only: Callable[[str], bool] = bool, groups: Sequence[Group] = ()
) -> list[tuple[Attack, Result]]:
    """Run all attacks, with home and cache below the scratch folder.

    Args:
        scratch: A new folder.
        apart: Run each in a process of its own.
        only: Says by its name whether an attack is run.
        groups: Which groups of attacks; all if empty.
    """
    places = {
        "HOME": "home",
        "RESNET_FINETUNE_CACHE": "cache",
        "XDG_CACHE_HOME": "xdg",
        "HF_HOME": "hub",
        "TORCH_HOME": "torch",
    }
    before = {name: os.environ.get(name) for name in places}
    for name, place in places.items():
        (scratch / place).mkdir()
        os.environ[name] = str(scratch / place)
    leaks.clear()
    try:
        return [(attack, judge(attack, scratch, apart)) for attack in attacks(scratch, groups) if only(attack.name)]
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def _main() -> None:
    parser = argparse.ArgumentParser(description="Try to make the command delete, replace or read what it was not asked to.")
    parser.add_argument("--quick", action="store_true", help="run all attacks in this process")
    parser.add_argument("--only", default="", metavar="TEXT", help="run only the attacks whose name contains this")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="destroy-") as name:
        results = try_all(Path(name).resolve(), not options.quick, lambda attack: options.only in attack)
    rows = [
        (
            attack.entry,
            attack.name,
            str(result.code)[:40],
            "\n".join(result.changed[:3]) + ("\n..." if len(result.changed) > 3 else "") or "no",
            "RAN" if result.ran else "no",
            " ".join(result.steers) or "no",
            result.said.replace(name, "")[:120],
        )
        for attack, result in results
    ]
    heads = ["entry", "attack", "exit code", "changed", "code ran", "steers", "message"]
    print(tabulate(rows, heads, maxcolwidths=[None, 44, 24, 40, None, 20, 60], disable_numparse=True))
    hung = sum(result.code == "HANGS" for _, result in results)
    tracebacks = sum(str(result.code).startswith("TRACEBACK") for _, result in results)
    for leak in leaks:
        print(f"LEAK {leak}")
    changed, ran = sum(bool(result.changed) for _, result in results), sum(result.ran for _, result in results)
    steered = sum(bool(result.steers) for _, result in results)
    print(
        f"{len(results)} attacks: {changed} changed, {ran} run; {hung} hung, {tracebacks} tracebacks, {len(leaks)} leaks, "
        f"{steered} steered"
    )
    raise SystemExit(bool(changed or ran or hung or leaks or steered))


if __name__ == "__main__":
    _main()
