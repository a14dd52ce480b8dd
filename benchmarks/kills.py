"""Runs that are killed with SIGKILL at random moments and resumed, against runs that are not: bit for bit, or not.

    python benchmarks/kills.py --runs 20 --folder kills/

Every run has an EMA of the weights, mixup, dropout, random augmentation, two processes that read pictures, and checkpoints also
within epochs; the freezing policies take turns. What is done is kept in the folder, so the script itself may be stopped and
started again. It ends with 1 if any run differs.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import choice, machine
from tabulate import tabulate

from finetune.resuming import progress

POLICIES = ("gradual:1", "lp_ft:0.34", "full")
PROGRAM = [sys.executable, str(Path(__file__).resolve().parent.parent / "cli.py"), "fit"]
OPTIONS = {
    "--data.image_size": 32,
    "--data.batch_size": 16,
    "--data.workers": 2,
    "--data.augment": "strong",
    "--model.backbone": "test_resnet",
    "--model.backbone_args.drop_rate": 0.2,
    "--model.weights": "none",
    "--model.bn": "train",
    "--model.mixup": 0.2,
    "--model.lr": 0.02,
    "--trainer.max_epochs": 7,
    "--trainer.accelerator": "cpu",
    "--trainer.enable_progress_bar": "false",
    "--run.ema": 0.9,
    "--run.name": "kills",
    "--run.save_every_minutes": 0.005,
    "--run.gradients_every": 10,
}
PARTS = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20, help="runs that are killed (default: 20)")
    parser.add_argument("--kills", type=int, default=1, help="how often each is killed (default: 1)")
    parser.add_argument("--folder", type=Path, help="where runs and results are kept (default: a new one, removed at the end)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kills-") as temporary, choice("digits", 320, 101) as pictures:
        folder = (options.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        data = folder / "pictures"
        if not data.exists():
            data.symlink_to(pictures)  # the same path in all runs
        elif not data.resolve().is_dir():
            data.unlink()
            data.symlink_to(pictures)
        results = [one(folder, data, number, options) for number in range(options.runs)]
    equal = sum(all(r[key] for key in ("readable", "weights", "validation", "training")) for r in results)
    rows = [[i + 1, *(("no", "yes")[v] if isinstance(v, bool) else v for v in r.values())] for i, r in enumerate(results)]
    headers = ["run", "policy", "killed after", "checkpoint at", "readable", "weights equal", "val equal", "train equal"]
    print(f"\n{machine()}\n{tabulate(rows, headers=headers)}\n\n{equal} of {len(results)} equal the run that was not killed")
    sys.exit(equal != len(results))


def one(folder: Path, data: Path, number: int, options: argparse.Namespace) -> dict[str, Any]:
    """Kill and resume a run, or return what an earlier start of this script found."""
    kept = folder / f"killed-{number}.json"
    if kept.is_file():
        return dict(json.loads(kept.read_text()))
    policy = POLICIES[number % len(POLICIES)]
    whole = reference(folder, data, policy)
    home = folder / f"killed-{number}-{time.time_ns()}"
    moments, found, readable = random.Random(f"{options.seed} {number}"), [], True
    after = []
    for kill in range(options.kills):
        after.append(moments.random() * whole["seconds"] / (kill + 1))
        start_and_kill(home, [*words(data, policy), *resume(home)], after[-1])
        checkpoint = last(home)
        readable = readable and not (checkpoint is None and list(home.glob("runs/*/*/checkpoints/last.ckpt")))
        found.append("none" if checkpoint is None else "{}, batch {}".format(*progress(checkpoint)))
    start(home, [*words(data, policy), *resume(home)])
    result = {
        "policy": policy,
        "killed": ", ".join(f"{seconds:.1f} s" for seconds in after),
        "checkpoint": "; ".join(f"epoch {text}" for text in found),
        "readable": readable,
        **compare(Path(whole["home"]), home, resumed_in=last_epoch(found)),
    }
    kept.write_text(json.dumps(result))
    print(number + 1, result, file=sys.stderr, flush=True)
    return result


def words(data: Path, policy: str) -> list[str]:
    return [*(str(word) for pair in OPTIONS.items() for word in pair), "--data.root", str(data), "--model.freezing", policy]


def resume(home: Path) -> list[str]:
    runs = list(home.glob("runs/kills/*/checkpoints/last.ckpt"))
    return ["--ckpt_path", str(runs[0].parent.parent)] if runs else []


def reference(folder: Path, data: Path, policy: str) -> dict[str, Any]:
    """Return the run of a policy that is not killed: where it is, and how many seconds it trained."""
    home = folder / f"whole-{POLICIES.index(policy)}"
    kept = home / "done.json"
    if not kept.is_file():
        home = home.with_name(f"{home.name}-{time.time_ns()}")
        seconds = start(home, words(data, policy))
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"home": str(home), "seconds": seconds}))
    return dict(json.loads(kept.read_text()))


def launch(home: Path, options: list[str]) -> subprocess.Popen[str]:
    if "--ckpt_path" in options:  # everything else is in the run's folder
        options = options[options.index("--ckpt_path") :]
    home.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*PROGRAM, *options], cwd=home, env=environment, start_new_session=True, **out)  # type: ignore[call-overload]


def start(home: Path, options: list[str]) -> float:
    """Run to the end and return the seconds of training."""
    begin, said = 0.0, []
    end = begin
    with launch(home, options) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            begin = begin or (time.perf_counter() if line.startswith("head ") else 0.0)  # the table's last row, before step 1
            end = time.perf_counter() if line.startswith("epoch ") else end
    if process.returncode:
        sys.exit(f"{' '.join(options)} ended with {process.returncode}:\n{''.join(said)}")
    return end - begin


def start_and_kill(home: Path, options: list[str], seconds: float) -> None:
    with launch(home, options) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("head "):
                break
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)


def last(home: Path) -> dict[str, Any] | None:
    for path in home.glob("runs/kills/*/checkpoints/last.ckpt"):
        try:
            return dict(torch.load(path, weights_only=True))
        except Exception as error:
            print(f"{path}: {error}", file=sys.stderr)
    return None


def last_epoch(found: list[str]) -> int:
    """Return the number of the first epoch, counted from 0, that is wholly trained behind the last kill."""
    if found[-1] == "none":
        return 0
    epoch, batch = found[-1].split(", batch ")
    return int(epoch) + (int(batch) > 0)


def compare(whole: Path, killed: Path, resumed_in: int) -> dict[str, bool]:
    a, b = last(whole), last(killed)
    assert a is not None
    weights = b is not None and all(same(a.get(part), b.get(part)) for part in PARTS)
    rows = [history(whole), history(killed)]
    epochs = range(int(OPTIONS["--trainer.max_epochs"]))  # type: ignore[call-overload]
    val = all(same_rows(rows, epoch, "val/") for epoch in epochs)
    train = all(same_rows(rows, epoch, "train/") for epoch in epochs if epoch >= resumed_in)
    return {"weights": weights, "validation": val, "training": train}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def history(home: Path) -> list[dict[str, str]]:
    (file,) = home.glob("runs/kills/*/metrics.csv")
    with file.open(newline="") as handle:
        return list(csv.DictReader(handle))


def same_rows(runs: list[list[dict[str, str]]], epoch: int, kind: str) -> bool:
    """Compare the metrics of an epoch that begin with a word: in both runs they are there once, and equal to the last digit."""
    found = []
    for rows in runs:
        own = [{k: v for k, v in row.items() if k.startswith(kind) and v} for row in rows if row["epoch"] == str(epoch)]
        found.append([row for row in own if row])
    return len(found[0]) == 1 and found[0] == found[1]


if __name__ == "__main__":
    main()
