"""The command's parser: what is wrong in one sentence, with the nearest right name, instead of a page of usage."""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from finetune.console import say
from finetune.errors import FinetuneError, did_you_mean, own_error
from finetune.trusted_code import refusal, require_trusted


class Parser(LightningArgumentParser):
    """A parser whose errors are short and name the nearest right key, class or value."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and leave with exit code 2.

        Args:
            message: What the parser says.
            ex: The exception behind it.
        """
        if own := own_error(ex):
            raise own
        say(f"error: {explain(message, _option_strings(self))}", error=True)
        verb = next((word for word in self.prog.split() if word in ("validate", "test")), "fit")  # they take the same options
        say(f"For all options: resnet-finetune {verb} --help", error=True)
        raise SystemExit(2)


def _option_strings(parser: argparse.ArgumentParser) -> list[str]:
    """Return the options of a parser and of its verbs."""
    verbs = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
    parsers = [parser, *(sub for choices in verbs for sub in choices.values())]
    return list(dict.fromkeys(text for one in parsers for action in one._actions for text in action.option_strings))


class _Escape(BaseException):
    """Carries an error of ours past jsonargparse, which would turn it into one about types."""

    def __init__(self, error: FinetuneError) -> None:
        self.error = error


def instantiate(kind: type, *args: Any, **kwargs: Any) -> Any:
    """Create an object for the parser; use it within `own_errors`."""
    try:
        return kind(*args, **kwargs)
    except FinetuneError as error:
        raise _Escape(error) from error


@contextmanager
def own_errors() -> Iterator[None]:
    """Let the errors of ours that objects raise when they are created come out as they are."""
    try:
        yield
    except _Escape as escaped:
        raise escaped.error from None


def explain(message: str, options: Iterable[str] = ()) -> str:
    """Turn a message of jsonargparse into one that a newcomer can act on; an unknown one stays as it is.

    Args:
        message: The original message.
        options: The option strings that the parser knows, such as `--trainer.max_epochs`.
    """
    for pattern, rewrite in _PATTERNS:
        match = re.search(pattern, message, re.DOTALL)
        if match:
            return str(rewrite(match, list(options)))
    return message.strip()


def _unrecognised(match: re.Match[str], options: list[str]) -> str:
    first = match[1].split("=")[0]
    groups = ["--model.", "--data.", "--trainer.", "--run."]
    known = [*options, *(f"{group}{name}" for group, names in _init_options().items() for name in names)]
    prefix = next((group for group in groups if first.startswith(group)), "")
    hint = did_you_mean(first, [option for option in known if option.startswith(prefix)] or known)
    return f"There is no option '{first}'.{hint}"


def _no_init_option(match: re.Match[str], _: list[str]) -> str:
    class_path, name = match[1], match[2].split(".")[0]
    known = _init_names(class_path)
    return f"{class_path.rpartition('.')[2]} has no option '{name}'.{did_you_mean(name, known)} It has: {', '.join(known)}."


def _no_attribute(match: re.Match[str], _: list[str]) -> str:
    module, name = match[1], match[2]
    names = [n for n in dir(importlib.import_module(module)) if not n.startswith("_")]
    return f"The module '{module}' has no class '{name}'.{did_you_mean(name, names)}"


def _not_trusted(match: re.Match[str], _: list[str]) -> str:
    try:
        require_trusted(match[1])
    except FinetuneError as error:  # part of Python itself
        return str(error)
    return refusal(match[1])


def _no_module(match: re.Match[str], _: list[str]) -> str:
    near = [path.stem for path in Path().glob("*.py")] + [path.parent.name for path in Path().glob("*/__init__.py")]
    return (
        f"The module '{match[1]}' cannot be imported.{did_you_mean(match[1], [*near, 'finetune'])} "
        "A class path is MODULE.CLASS, where MODULE lies in the working folder or is installed."
    )


def _literal(match: re.Match[str], _: list[str]) -> str:
    key, choices, found = match[1], re.findall(r"'([^']*)'", match[2]), match[3].strip()
    return f"{key}: expected one of {', '.join(choices)}; found '{found}'.{did_you_mean(found, choices)}"


def _wrong_type(match: re.Match[str], _: list[str]) -> str:
    return f"{match[1]}: expected {match[2]}; found '{match[3].strip()}'."


def _wrong_of_several(match: re.Match[str], _: list[str]) -> str:
    kinds = [name.replace("NoneType", "null") for name in re.findall(r"<class '(\w+)'>", match[2])]
    return f"{match[1]}: expected {' or '.join(kinds)}; found '{match[3].strip()}'."


def _not_expected(match: re.Match[str], options: list[str]) -> str:
    key = match[1]
    keys = [option.removeprefix("--") for option in options if option.startswith("--")]
    known = [*keys, *(f"{group[2:]}{name}" for group, names in _init_options().items() for name in names)]
    return f"There is no option '{key}'.{did_you_mean(key, known)}"


def _wrong_command(match: re.Match[str], _: list[str]) -> str:
    return f"There is no command '{match[1]}'.{did_you_mean(match[1], re.findall(chr(39) + r'([a-z-]+)' + chr(39), match[2]))}"


_PATTERNS: list[tuple[str, Any]] = [
    (r"Importing '([\w.]+)' is not allowed", _not_trusted),
    (r"[Uu]nrecognized arguments: (\S+)", _unrecognised),
    (r"given class_path '([\w.]+)':\s+Option '([\w.]+)' is not accepted", _no_init_option),
    (r"given class_path '([\w.]+)':.*?(?:Key|Option|Group) '([\w.]+)' (?:is not|does not)", _no_init_option),
    (r"module '([\w.]+)' has no attribute '(\w+)'", _no_attribute),
    (r"No module named '([\w.]+)'", _no_module),
    (r"Parser key \"([\w.]+)\":\s+Expected a typing\.Literal\[([^\]]*)\]\. Got value: ([^\n]*)", _literal),
    (r"Parser key \"([\w.]+)\":\s+Expected an? <class '(\w+)'>\. Got value: ([^\n]*)", _wrong_type),
    (
        r"Parser key \"([\w.]+)\":\s+Does not validate against any of the Union subtypes\s+"
        r"Subtypes: \[((?:<class '\w+'>(?:, )?)+)\].*Given value: ([^\n]*)",
        _wrong_of_several,
    ),
    (r"(?:Key|Option) '([\w.]+)' is not (?:expected|accepted)", _not_expected),
    (r"Subcommand '\w+' does not accept option '([\w.]+)'", _not_expected),
    (r"invalid choice: '([^']+)' \(choose from ([^)]*)\)", _wrong_command),
]


def _init_options() -> dict[str, list[str]]:
    return {
        "--model.": _init_names("finetune.FinetuneModule"),
        "--data.": _init_names("finetune.FolderDataModule"),
    }


def _init_names(class_path: str) -> list[str]:
    """Return the names that a class takes, those of its bases included where it passes keywords on."""
    module, _, name = class_path.rpartition(".")
    names: dict[str, None] = {}
    for base in getattr(importlib.import_module(module), name).__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
        names.update({p.name: None for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)})
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return list(names)
