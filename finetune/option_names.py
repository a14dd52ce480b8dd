"""Names of options in error messages: the full name of a nested one, and the option that a misspelt or foreign name means.

The parsers of nested classes know the last part of a name only, `lr` of `--model.lr`. The arguments that were typed, and the
configuration files among them, tell the rest.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from finetune.errors import FinetuneError, did_you_mean
from finetune.recipe_files import find_recipe, recipe_names

_ELSEWHERE = {
    "ckpt_path": ("resume", "checkpoint"),
    "config": ("recipe", "cfg"),
    "data.batch_size": ("batch", "bs"),
    "data.image_size": ("imgsz", "img_size", "input_size"),
    "data.root": ("data_dir", "data_path", "dataset", "folder", "images", "train_dir"),
    "data.workers": ("num_workers",),
    "model.backbone": ("arch", "architecture", "model_name"),
    "model.freezing": ("freeze",),
    "model.lr": ("learning_rate", "lr0"),
    "model.optimizer": ("opt",),
    "model.weight_decay": ("wd",),
    "model.weights": ("pretrained",),
    "run.folder": ("out", "output", "output_dir", "save_dir"),
    "seed_everything": ("seed",),
    "trainer.accelerator": ("device",),
    "trainer.devices": ("gpus",),
    "trainer.max_epochs": ("epochs", "num_epochs"),
    "trainer.precision": ("amp", "fp16"),
    "track": ("logger", "wandb"),
}
_BY_OTHER_NAME = {other: ours for ours, others in _ELSEWHERE.items() for other in others}
"""What other tools call an option of ours."""


def options_in(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield the names of the options among arguments, without hyphens, and their values.

    >>> list(options_in(["fit", "--model.lr", "0.1", "--data.root=x", "--print_config"]))
    [('model.lr', '0.1'), ('data.root', 'x'), ('print_config', None)]
    """
    for place, argument in enumerate(arguments):
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            following = arguments[place + 1] if place + 1 < len(arguments) else "--"
            yield name, value if equals else None if following.startswith("--") else following


def full_name(key: str, arguments: Sequence[str]) -> str:
    """Return the full name of an option of which a nested parser names the last part; that part if it was not given.

    >>> full_name("lr", ["fit", "--model.lr", "fast"]), full_name("lr", ["fit"])
    ('model.lr', 'lr')
    """
    given = [name for name, _ in options_in(arguments)]
    for name, value in options_in(arguments):
        if name == "config" and value is not None:
            given[:0] = _options_of(value)
    return next((name for name in reversed(given) if name == key or name.endswith(f".{key}")), key)


def _options_of(config: str) -> list[str]:
    """Return the names of the options in a configuration file, as they would be typed; none if it cannot be read."""
    try:
        return list(_flat(yaml.safe_load(find_recipe(config).read_text(encoding="utf-8"))))
    except (FinetuneError, OSError, ValueError, yaml.YAMLError, RecursionError):
        return []


def _flat(values: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(values, Mapping):
        for name, value in values.items():
            path = prefix.rstrip(".") if name in ("class_path", "init_args") else f"{prefix}{name}"
            yield path
            yield from _flat(value, f"{path}.")


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return a sentence with the option that a name most likely means, or an empty string.

    Args:
        name: What was typed, without hyphens.
        known: The full names of all options, without hyphens.

    >>> known = ["run.name", "model.lr", "trainer.max_epochs", "data.batch_size"]
    >>> suggestion("lr", known), suggestion("epochs", known), suggestion("batchsize", known)
    (" Did you mean '--model.lr'?", " Did you mean '--trainer.max_epochs'?", " Did you mean '--data.batch_size'?")
    """
    known = list(dict.fromkeys(known))
    plain = name.lower().replace("-", "_")
    ends = [option for option in known if option.rpartition(".")[2] == plain]
    if ours := ends[0] if ends else _BY_OTHER_NAME.get(plain):
        return f" Did you mean '--{ours}'?"
    group = plain.partition(".")[0]
    near = did_you_mean(name, [option for option in known if option.startswith(f"{group}.")] or known)
    if not near and "." not in plain:
        last = {option.rpartition(".")[2]: option for option in reversed(known)}
        near = did_you_mean(plain, last)
        for end, option in last.items():
            near = near.replace(f"'{end}'", f"'{option}'")
    return near.replace(" '", " '--")


def misplaced(argument: str) -> str:
    """Return what to type in place of an argument that belongs to no option, such as a folder behind `fit`."""
    path = Path(argument)
    if os.path.isdir(path):
        if any((path / name).is_file() for name in ("config.yaml", "record.json")):
            return f"To resume a run: --ckpt_path {argument}"
        return f"To train on a folder: --data.root {argument}"
    if path.suffix == ".ckpt":
        return f"To resume a run: --ckpt_path {argument}; to start from its weights: --model.weights {argument}"
    if path.suffix in (".yaml", ".yml") or argument in recipe_names():
        return f"To use a recipe: --config {argument}"
    return "Every option begins with two hyphens, such as --data.root FOLDER."
