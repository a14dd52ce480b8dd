"""Attacks that want code to be run which nobody named, or a terminal or a spreadsheet to be steered; and what came of each.

python benchmarks/destroy_code.py [--quick]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import joblib
import torch
import yaml
from hostile import HACKED, Touch, checkpoint, outcome, picture
from tabulate import tabulate


class Attack(NamedTuple):
    """What is tried: the command's arguments in a folder, after all files were made."""

    name: str
    entry: int
    args: list[str]
    cwd: str = "."
    may_change: tuple[str, ...] = ()
    process: bool = False


NETWORK = ["--model.backbone", "test_resnet", "--model.weights", "none"]
TINY = ["--data.image_size", "32", "--data.workers", "0", "--trainer.max_epochs", "1", "--run.gradients_every", "0"]
DRY = ["--data.workers", "0", "--trainer.fast_dev_run", "true"]


def attacks(folder: Path) -> Iterator[Attack]:
    """Prepare a folder for each attack and yield it."""
    yield from _class_paths(folder)
    yield from _positions(folder)
    yield from _names(folder)


# ------------------------------------------------------------------------------------------- class paths in a file (5)

PROJECT = """
import functools
import os
import subprocess
from subprocess import Popen

import joblib
from finetune.main import main
from joblib import load


def start(args):
    main(args)


def annotated(args) -> None:
    main(args)


class Shell:
    def run(self, command, num_classes=2):
        os.system(command)

    __call__ = run


shell = Shell()
method = shell.run
bound = functools.partial(Shell.run, shell)
made = staticmethod(Shell.run)
"""


def _class_paths(folder: Path) -> Iterator[Attack]:
    """A project of the user's own, with files from elsewhere that name what its module has beside networks."""
    home = folder / "project"
    home.mkdir()
    (home / "train.py").write_text(PROJECT)
    _pictures(home)
    joblib.dump(Touch(folder / HACKED), home / "evil.joblib")
    nested = ["fit", *DRY, "--model.backbone", "joblib.load", "--model.backbone_args.filename", "evil.joblib"]
    command = {"command": f"touch {folder / HACKED}"}
    again = {"args": nested}
    pickle = {"filename": "evil.joblib"}
    named: dict[str, dict[str, Any]] = {
        "train.main": again,
        "train.start": again,
        "train.annotated": again,
        "finetune.main.main": again,
        "finetune.training.run": {"words": nested},
        "train.shell": command,
        "train.method": command,
        "train.bound": command,
        "train.os.system": command,
        "train.subprocess.getoutput": {"cmd": command["command"]},
        "train.Popen": {"args": ["touch", str(folder / HACKED)]},
        "train.load": pickle,
        "train.joblib.load": pickle,
        "torch.load": {"f": "evil.joblib", "weights_only": False},
        "torch.hub.load": {"repo_or_dir": ".", "model": "x", "source": "local"},
        "timm.models.load_checkpoint": {"checkpoint_path": "evil.joblib"},
        "lightning.Trainer": {"fast_dev_run": True},
        "torch.utils.data.DataLoader": {"dataset": []},
    }
    (home / "hubconf.py").write_text(f"import os\nos.system({command['command']!r})\n")
    for number, (path, arguments) in enumerate(named.items()):
        options = {"backbone": path, "backbone_args": arguments, "weights": "none", "num_classes": 2}
        checkpoint(home / f"{number}.ckpt", options=options)
        yield Attack(f"checkpoint: {path}", 5, ["predict", f"{number}.ckpt", "photos"], "project")
        config = {"model": {"class_path": "finetune.FinetuneModule", "init_args": options | {"num_classes": None}}}
        del config["model"]["init_args"]["num_classes"]  # type: ignore[attr-defined]
        (home / f"{number}.yaml").write_text(yaml.safe_dump(config))
        yield Attack(f"YAML: {path}", 5, ["fit", *DRY, "--config", f"{number}.yaml", "--data.root", "photos"], "project")
    for verb in (["evaluate", "0.ckpt", "photos"], ["export", "0.ckpt"], ["explain", "0.ckpt", "photos"]):
        yield Attack(f"checkpoint: train.main ({verb[0]})", 5, verb, "project")
    yield Attack("weights: train.main", 5, ["fit", *NETWORK[:2], *DRY, "--model.weights", "0.ckpt"], "project")
    yield Attack("resume: train.main", 5, ["fit", *DRY, "--config", "0.yaml", "--ckpt_path", "0.ckpt"], "project")
    options = {"backbone": "__main__.main", "backbone_args": again}
    checkpoint(home / "main.ckpt", options=options)
    yield Attack("checkpoint: __main__.main", 5, ["predict", "main.ckpt", "photos"], "project", process=True)
    (home / "main.yaml").write_text(yaml.safe_dump({"model": {"init_args": options}}))
    yield Attack("YAML: __main__.main", 5, ["fit", *DRY, "--config", "main.yaml"], "project", process=True)
    checkpoint(home / "class.ckpt", class_path="train.Popen")
    yield Attack("checkpoint of the class train.Popen", 5, ["predict", "class.ckpt", "photos"], "project")
    for name, content in {
        "a callback that is re-exported": {"callbacks": [{"class_path": "train.Popen", "init_args": named["train.Popen"]}]},
        "a logger that is a function": {"logger": [{"class_path": "train.os.system", "init_args": command}]},
        "a hook that is our own command": {
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.LambdaCallback",
                    "init_args": {"on_fit_start": "finetune.main.main"},
                }
            ]
        },
    }.items():
        file = f"{name.replace(' ', '_')}.yaml"
        (home / file).write_text(yaml.safe_dump({"trainer": content}))
        yield Attack(f"YAML: {name}", 5, ["fit", *NETWORK, *DRY, "--config", file], "project")


# --------------------------------------------------------------------------------------- what lies in the working folder (6)


def _positions(folder: Path) -> Iterator[Attack]:
    """Folders that were downloaded, in which a file stands in for a library, completes one, or is a setting of one."""
    code = f"import os\nos.system('touch {folder / HACKED}')\n"
    fit = ["fit", *NETWORK, *TINY, "--config", "scratch", "--data.root", "photos"]
    reads = {
        "tqdm": ["check", "photos"],
        "defusedxml": ["check", "photos"],
        "__future__": ["--version"],
        "typing": ["recipes"],
        "numpy": ["check", "photos"],
        "olefile": ["check", "photos"],
        "bitsandbytes": ["stages", "test_resnet"],
        "apex": ["stages", "test_resnet"],
        "rich": fit,
        "litlogger": fit,
        "sitecustomize_": ["--help"],
    }
    for name, args in reads.items():
        home = _downloaded(folder, name)
        (home / f"{name}.py").write_text(code)
        yield Attack(f"./{name}.py", 6, args, home.name, (f"{home.name}/runs",), process=True)
    home = _downloaded(folder, "package")
    (home / "tqdm").mkdir()
    (home / "tqdm" / "__init__.py").write_text(code)
    yield Attack("./tqdm/__init__.py", 6, ["check", "photos"], home.name, process=True)
    home = _downloaded(folder, "matplotlibrc")
    (home / "matplotlibrc").write_text("backend: module://evil\n")
    (home / "evil.py").write_text(code)
    yield Attack("./matplotlibrc", 6, fit, home.name, (f"{home.name}/runs",), process=True)
    home = _downloaded(folder, "again")
    (home / "finetune").mkdir()
    (home / "finetune" / "__init__.py").touch()
    (home / "finetune" / "__main__.py").write_text(code)
    args = ["fit", *NETWORK, *TINY, "--config", "scratch", "--data.root", "photos", "--run.seeds", "2"]
    yield Attack("./finetune in a training of its own process", 6, args, home.name, (f"{home.name}/runs",))
    yield from _repositories(folder, fit)


def _repositories(folder: Path, fit: list[str]) -> Iterator[Attack]:
    """Folders with a repository of git whose configuration names programs."""
    settings = {
        "fsmonitor": ["core.fsmonitor", f"touch {folder / HACKED}; false"],
        "filter": ["filter.x.clean", f"touch {folder / HACKED}; cat"],
    }
    for name, setting in settings.items():
        home = _downloaded(folder, name)
        (home / ".gitattributes").write_text("* filter=x\n")
        for args in (
            ["init", "-q"],
            ["add", ".gitattributes"],
            ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"],
            ["config", *setting],
        ):
            subprocess.run(["git", *args], cwd=home, check=True, stdout=subprocess.DEVNULL)
        os.utime(home / ".gitattributes", (1, 1))  # so that git has to compare it
        yield Attack(f"./.git with {setting[0]}", 6, fit, home.name, (f"{home.name}/runs",))


def _downloaded(folder: Path, name: str) -> Path:
    home = folder / f"with_{name}"
    home.mkdir()
    _pictures(home)
    return home


def _pictures(home: Path) -> None:
    for number in range(8):
        for label in ("a", "b"):
            (home / "photos" / label).mkdir(parents=True, exist_ok=True)
            picture(10 * number + (label == "b")).resize((32, 32)).save(home / "photos" / label / f"{number}.png")


# -------------------------------------------------------------------------------- names that steer a terminal or a table (7)

ESCAPE, FORMULA = "\x1b]0;owned\x07\x1b[2J", '=HYPERLINK("http://x","y")'


def _names(folder: Path) -> Iterator[Attack]:
    home = folder / "names"
    home.mkdir()
    _pictures(home)
    root = home / f"photos{ESCAPE}"
    (home / "photos").rename(root)
    code, said = _in(home, ["fit", *NETWORK, *TINY, "--config", "scratch", "--data.root", root.name, "--run.name", "mine"])
    assert code == 0, said
    (run,) = (home / "runs" / "mine").iterdir()
    last = run / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    for state in content["callbacks"].values():
        if "row" in state:
            state["row"] = {FORMULA: 1.0, ESCAPE: 2.0, "@SUM(1)": 3.0, "step": content["global_step"] - 1, "epoch": 0}
    torch.save(content, last)
    own = (f"names/runs/mine/{run.name}",)
    resumed = ["fit", "--ckpt_path", f"runs/mine/{run.name}", "--trainer.max_epochs", "2"]
    yield Attack("names of metrics in a checkpoint", 7, resumed, "names", own)
    yield Attack("a root with ESC in its name (evaluate)", 7, ["evaluate", f"runs/mine/{run.name}"], "names", own)
    yield Attack("a root with ESC in its name (check)", 7, ["check", root.name], "names")
    reuse = ["fit", *NETWORK[:2], *TINY, "--config", "linear_probe", "--model.weights", "none", "--data.augment", "none"]
    _in(home, [*reuse, "--data.root", root.name, "--data.reuse", "exact"])
    yield Attack("a root with ESC in its name (reuse)", 7, ["reuse"], "names")
    target = home / f"out{ESCAPE}"
    args = ["predict", f"runs/mine/{run.name}", root.name, "--workers", "0", "--out", f"{target.name}.csv"]
    yield Attack("an output with ESC in its name", 7, args, "names", (f"names/{target.name}.csv",))
    yield Attack("a missing run with ESC in its name", 7, ["report", f"gone{ESCAPE}"], "names")


def _in(home: Path, args: list[str]) -> tuple[object, str]:
    before = Path.cwd()
    os.chdir(home)
    try:
        return outcome(args)
    finally:
        os.chdir(before)


def steers(said: str, run: Path) -> list[str]:
    """Return what would steer: control characters in what was printed, formulas in the tables of a run."""
    found = sorted(set(re.findall(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", said.replace("\x1b[A", ""))))
    heads = [path.read_text(errors="replace").split("\n", 1)[0] for path in run.rglob("metrics.csv")]
    bad = [name for head in heads for name in re.split(r',(?=(?:[^"]*"[^"]*")*[^"]*$)', head)]
    return [repr(letter) for letter in found] + [
        name for name in bad if name.lstrip('"')[:1] in tuple("=+-@") or "\x1b" in name
    ]


def _steered(attack: Attack, said: str, folder: Path) -> list[str]:
    resumes = attack.args[0] == "fit"
    return steers(said, folder / attack.may_change[0] if resumes else folder / "nothing") if attack.entry == 7 else []


def carry_out(attack: Attack, folder: Path) -> tuple[object, str]:
    """Run the command as an attack says; return its exit code and what it printed."""
    if not attack.process:
        return _in(folder / attack.cwd, attack.args)
    command = [sys.executable, "-m", "finetune", *attack.args]
    done = subprocess.run(command, cwd=folder / attack.cwd, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


Result = tuple[Attack, object, bool, list[str], str]


def try_all(folder: Path, chosen: Callable[[Attack], bool] = lambda attack: True) -> Iterator[Result]:
    """Carry out attacks; yield each with its exit code, whether code ran, what steers, and what was printed."""
    for attack in attacks(folder):
        if not chosen(attack):
            continue
        code, said = carry_out(attack, folder)
        ran = (folder / HACKED).exists()
        (folder / HACKED).unlink(missing_ok=True)
        yield attack, code, ran, _steered(attack, said, folder), said


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="leave out what needs a process of its own")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="destroy-") as name:
        folder = Path(name).resolve()
        os.environ["RESNET_FINETUNE_CACHE"] = str(folder / "cache")
        for attack, code, ran, steered, said in try_all(folder, lambda attack: not (options.quick and attack.process)):
            message = next((line for line in said.splitlines() if line.startswith("error: ")), said[-100:])
            rows.append(
                (attack.entry, attack.name, code, "RAN" if ran else "no", " ".join(steered) or "no", ascii(message)[:110])
            )
            print(*map(ascii, rows[-1][:4]), file=sys.stderr, flush=True)
    print(tabulate(rows, ["entry", "attack", "exit code", "code ran", "steers", "message"]))
    print(f"{len(rows)} attacks: {sum(row[3] == 'RAN' for row in rows)} ran code, {sum(row[4] != 'no' for row in rows)} steer")


if __name__ == "__main__":
    _main()
