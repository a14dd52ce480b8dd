"""A method of domain adaptation beside its two floors, trained with the same budget: the source alone, and AdaBN.

Most of what a method seems to gain may be the BatchNorm statistics of the target, which AdaBN has for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finetune.apart import objection, train_apart
from finetune.arguments import last_value, without
from finetune.console import say
from finetune.domain_table import domain_table
from finetune.errors import ConfigError
from finetune.runs import new_run

FLOORS = ("SourceOnly", "AdaBN")
_OPTION = "--model.adaptation"


def compare(words: Sequence[str]) -> None:
    """Train a method and its floors, each in a process of its own, and print one table.

    Args:
        words: `fit` and its options, as the user typed them.

    Raises:
        ConfigError: If a run is to be resumed, or the options do not allow another method.
        SystemExit: If a training fails; those that are done are in the table all the same.
    """
    if any(word.partition("=")[0] == "--ckpt_path" for word in words):
        raise ConfigError("--compare trains anew: leave out --ckpt_path, or leave out --compare.")
    folder, name = last_value(words, "--run.folder") or "runs", last_value(words, "--run.name") or "domain_adaptation"
    trainings = {"as asked": list(words), **{floor: [*without(words, _OPTION), _OPTION, floor] for floor in FLOORS}}
    if found := objection(trainings[FLOORS[0]]):
        raise ConfigError(
            f"--compare trains {FLOORS[0]} beside what you ask for, which these options do not allow: expected those of\n"
            f"resnet-finetune adapt. It says: {found}"
        )
    home = new_run(Path(folder), f"{name}-compared")
    runs: dict[str, Path] = {}
    failed = 0
    for number, (title, options) in enumerate(trainings.items(), start=1):
        say(f"\n=== {title}: training {number} of {len(trainings)}")
        command = [*options, "--run.folder", str(home), "--run.name", title.replace(" ", "_")]
        failed = train_apart(command)
        if failed:
            say(f"\n{title} ended with exit code {failed}.", error=True)
            break
        runs[title] = max((home / title.replace(" ", "_")).iterdir())
    if runs:
        say(f"\n{domain_table(runs)}\nfiles  {home}")
    if failed:
        raise SystemExit(failed)
