"""Prepare the words of `fit`, `validate` and `test` for the parser: recipe names become files, runs become checkpoints."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.errors import ConfigError, FinetuneError
from finetune.recipe_files import find_recipe
from finetune.runs import CONFIG, RESUMED_CONFIG, find_checkpoint, run_of
from finetune.schema import read_yaml

_SECTIONS = {"model": "lr: 0.01", "data": "batch_size: 32", "trainer": "max_epochs: 10", "run": "patience: 3"}
_COMMANDS = ("fit", "validate", "test")  # whose options may stand in a section of their own
_OURS = ("--config", "-c", "--ckpt_path", "--run.folder", "--track")


def resolve(words: Sequence[str]) -> list[str]:
    """Turn recipe names into files, and a run or `last` into its checkpoint.

    A checkpoint without `--config` takes the configuration of its run; the words that follow override it. A recipe gives
    the run its name. `--track` is short for `--run.track`, and may be given several times.

    Args:
        words: The verb and its options.

    Raises:
        FinetuneError: If a recipe, run or checkpoint is not there.
    """
    given, rest = _take(words)
    configs = [_require_options(find_recipe(name)) for name in given["--config"]]
    folder = given["--run.folder"][-1:] or [str(option_of(configs, "run", "folder") or "runs")]
    resolved = [*rest[:1], *(word for path in configs for word in ("--config", str(path)))]
    name = option_of(configs, "run", "name") or (configs[-1].stem if configs else None)
    wanted = given["--ckpt_path"][-1:]
    if wanted and wanted != ["null"]:
        named = last_value(rest, "--run.name") or name
        checkpoint = find_checkpoint(wanted[0], Path(folder[0]), named, prefer="last" if words[0] == "fit" else "best")
        if not configs:
            resolved += ["--config", str(_require_options(_config_of(checkpoint)))]
        resolved += ["--ckpt_path", str(checkpoint)]
    elif configs and words[0] == "fit":
        resolved += ["--run.name", str(name)]
    if wanted == ["null"]:
        resolved += ["--ckpt_path", "null"]  # it overrides one that a configuration names
    if given["--run.folder"]:
        resolved += ["--run.folder", *folder]
    if given["--track"]:
        resolved += ["--run.track", ",".join(given["--track"])]
    return [*resolved, *rest[1:]]


def option_of(configs: Sequence[Path], *keys: str) -> Any:
    """Return an option that configuration files give, the last of them first; None if none does.

    Args:
        configs: The files.
        *keys: Its place, from outside to inside.
    """
    for path in reversed(configs):
        try:
            found: Any = read_yaml(path, dict[str, Any], "options")
        except FinetuneError:
            continue  # somebody else says what is wrong with it
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        if found is not None:
            return found
    return None


def without(words: Sequence[str], option: str) -> list[str]:
    """Return words without an option, the options within it, and their values.

    >>> without(["--a", "1", "--a.x=3", "--ab", "4", "--b=2"], "--a")
    ['--ab', '4', '--b=2']
    """
    kept: list[str] = []
    waiting = iter(words)
    for word in waiting:
        name, equals, _ = word.partition("=")
        if name != option and not name.startswith(f"{option}."):
            kept.append(word)
        elif not equals:
            next(waiting, None)
    return kept


def _require_options(path: Path) -> Path:
    """Return the path of a configuration, or say where in it the mistake is."""
    found: Any = read_yaml(path, object, "options", error=ConfigError)
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds {type(found).__name__} where options are expected, such as 'model: {{lr: 0.01}}'.")
    _require_sections(path, found or {})
    return path


def _require_sections(path: Path, found: Mapping[Any, Any], prefix: str = "") -> None:
    """Refuse a section of a configuration that holds no options: the parser would leave some of them out without a message."""
    for name, value in found.items():
        if name in _COMMANDS and not prefix and isinstance(value, dict):
            _require_sections(path, value, f"{name}.")
        if name not in _SECTIONS or isinstance(value, dict):
            continue
        takes_class = name in ("model", "data")
        if value is None and not takes_class:
            continue  # an empty section: its defaults hold
        if isinstance(value, str) and value and (takes_class or os.path.isfile(value)):
            continue  # a class, or another file with the options of the section
        held = "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
        raise ConfigError(
            f"{path}: the section '{prefix}{name}' holds {held}, expected options, such as '{name}: {{{_SECTIONS[name]}}}'. "
            "Correct it, or leave the section out."
        )


def last_value(words: Sequence[str], option: str) -> str | None:
    """Return the last value that words give an option, or None."""
    found = [word.partition("=")[2] for word in words if word.startswith(f"{option}=")]
    found += [value for word, value in itertools.pairwise(words) if word == option]
    return found[-1] if found else None


def _take(words: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Separate the values of the options that are resolved here from all other words."""
    given: dict[str, list[str]] = {option: [] for option in _OURS}
    rest: list[str] = []
    waiting = iter(words)
    for word in waiting:
        option, equals, value = word.partition("=")
        if option not in _OURS:
            rest.append(word)
            continue
        if not equals:
            value = next(waiting, "")
        if not value:
            raise ConfigError(f"The option {option} needs a value.")
        given["--config" if option == "-c" else option].append(value)
    return given, rest


def _config_of(checkpoint: Path) -> Path:
    home = run_of(checkpoint)
    kept = (
        []
        if home is None
        else [path for path in (home / RESUMED_CONFIG, home / CONFIG) if path.is_file() and not path.is_symlink()]
    )
    if not kept:
        raise ConfigError(f"There is no {CONFIG} of a run beside {checkpoint}: name the configuration with --config FILE.")
    return kept[0]
