"""The command's parser: what is wrong in one sentence, with the nearest right name, instead of a page of usage."""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import operator
import re
import sys
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn, Union, get_args, get_origin

from lightning.pytorch.cli import LightningArgumentParser

from finetune.console import say
from finetune.errors import FinetuneError, did_you_mean, own_error
from finetune.option_names import full_name, misplaced, options_in, suggestion
from finetune.trusted_code import refusal, require_trusted

_typed: ContextVar[tuple[str, ...]] = ContextVar("typed", default=())
_called: ContextVar[str] = ContextVar("called", default="")


@contextmanager
def called_as(command: str) -> Iterator[None]:
    """Name a command in errors as the user called it, such as `adapt`, which is carried out as `fit`."""
    token = _called.set(command)
    try:
        yield
    finally:
        _called.reset(token)


class Parser(LightningArgumentParser):
    """A parser whose errors are short and name the nearest right key, class or value.

    A number keeps the kind that it was typed with: `1` is an int, `1.0` a float, see `int_before_float`.
    """

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        """Add an argument; the arguments are those of jsonargparse."""
        return _int_first(super().add_argument(*args, **kwargs))

    def add_argument_group(self, *args: Any, **kwargs: Any) -> Any:
        """Add a group, to which the arguments of a class are added."""
        group = super().add_argument_group(*args, **kwargs)
        add = group.add_argument
        group.add_argument = lambda *names, **options: _int_first(add(*names, **options))  # type: ignore[method-assign]
        return group

    def parse_args(self, args: Any = None, *rest: Any, **options: Any) -> Any:
        """Parse arguments; errors look there for the full names of options."""
        outermost = _typed.get() or tuple(sys.argv[1:] if args is None else args)  # parsers of nested classes are called within
        token = _typed.set(outermost)
        try:
            return super().parse_args(args, *rest, **options)
        finally:
            _typed.reset(token)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and leave with exit code 2.

        Args:
            message: What the parser says.
            ex: The exception behind it.
        """
        if own := own_error(ex):
            raise own
        say(f"error: {explain(message, _option_strings(self))}", error=True)
        command = _called.get() or next((part for part in self.prog.split() if part in ("validate", "test")), "fit")
        say(f"For all options: resnet-finetune {command} --help", error=True)
        raise SystemExit(2)


def int_before_float(hint: Any) -> Any:
    """Return a union type with int in front of float, so that the int 1 is not read as the float 1.0.

    To the trainer the int 1 is one batch, and the float 1.0 is all of them. `typing` keeps unions in a cache in which the order
    of their members does not count, so `Optional[Union[int, float]]` may come out with float in front, which takes any int.

    >>> int_before_float(Union[float, int, None])
    int | float | None
    """
    members = get_args(hint)
    if get_origin(hint) not in (Union, types.UnionType) or not {int, float} <= {m for m in members if isinstance(m, type)}:
        return hint
    try:  # not Union[...], which would ask the cache again
        return functools.reduce(operator.or_, sorted(members, key=lambda member: member is not int))
    except TypeError:  # a member that knows no |
        return hint


def _int_first(action: Any) -> Any:
    """Order the type of an argument of a class, which jsonargparse has put into its action."""
    if hasattr(action, "_typehint"):
        action._typehint = int_before_float(action._typehint)
    return action


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


def _known(options: Iterable[str]) -> list[str]:
    """Return the full names of all options, those of the chosen classes included."""
    plain = [option.removeprefix("--") for option in options if option.startswith("--")]
    return [*plain, *(f"{group}{name}" for group, names in _init_options().items() for name in names)]


def _unrecognised(match: re.Match[str], options: list[str]) -> str:
    first = match[1].split("=")[0]
    if not first.startswith("-"):
        return f"'{first}' belongs to no option. {misplaced(first)}"
    return f"There is no option '{first}'.{suggestion(first.lstrip('-'), _known(options))}"


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
    key, choices, found = _full(match[1]), re.findall(r"'([^']*)'", match[2]), match[3].strip()
    return f"{key}: expected one of {', '.join(choices)}; found '{found}'.{did_you_mean(found, choices)}"


def _full(key: str) -> str:
    return full_name(key, _typed.get())


def _wrong_type(match: re.Match[str], _: list[str]) -> str:
    return f"{_full(match[1])}: expected {match[2]}; found '{match[3].strip()}'."


def _wrong_of_several(match: re.Match[str], _: list[str]) -> str:
    key, found = _full(match[1]), match[3].strip()
    if nested := re.fullmatch(r"NestedArg\(key='([^']*)', val='?(.*?)'?\)", found):
        key, found = _full(f"{match[1]}.{nested[1]}").removesuffix(f".{nested[1]}"), f"{nested[1]}: {nested[2]}"
    class_wanted = re.search(r"lightning\.pytorch\.core\.\w+\.Lightning(Data)?Module'", match[2])
    if class_wanted:
        kind, option = ("data module", "data.root") if class_wanted[1] else ("module", "model.backbone")
        hint = "" if found.replace(".", "").isidentifier() and "." in found else f" Did you mean '--{option} {found}'?"
        return f"{key}: expected the class of a {kind}, as in MODULE.CLASS; found '{found}'.{hint}"
    choices = list(dict.fromkeys(choice for inside in re.findall(r"Literal\[(.*?)\]", match[2]) for choice in _choices(inside)))
    return f"{key}: expected {' or '.join(_kinds(match[2]))}; found '{found}'.{did_you_mean(found, choices)}"


def _kinds(subtypes: str) -> list[str]:
    """Return the types of a union in words.

    >>> _kinds("<class 'float'>, dict[str, float], <class 'NoneType'>")
    ['float', 'a mapping such as {name: float}', 'null']
    """
    found = []
    for kind in re.findall(r"<class '[\w.]+'>|dict\[.*?\]|(?:typing\.)?Literal\[.*?\]|[\w.]+\[[^\]]*\]*", subtypes):
        if kind.startswith("<class"):
            found.append(kind[8:-2].rpartition(".")[2].replace("NoneType", "null"))
        elif kind.startswith("dict["):
            value = kind[5:-1].partition(", ")[2]
            found.append(f"a mapping such as {{name: {'value' if 'Any' in value else value}}}")
        elif "Literal[" in kind:
            found += _choices(kind[kind.index("[") + 1 : -1])
        else:
            found.append(f"a {kind.partition('[')[0].rpartition('.')[2]}")
    return list(dict.fromkeys(found))


def _choices(inside: str) -> list[str]:
    return [choice.strip().strip("'") for choice in inside.split(",")]


def _not_expected(match: re.Match[str], options: list[str]) -> str:
    key = _full(match[1])
    if "." in match[1]:
        return f"There is no option '{key}'.{suggestion(key, _known(options)).replace(chr(39) + '--', chr(39))}"
    ends = [option.removeprefix("--") for option in options if "." not in option]  # the options of the nested class itself
    near = did_you_mean(match[1], [*ends, *_last_parts()]).replace(" '", f" '{key.removesuffix(match[1])}")
    return f"There is no option '{key}'.{near}"


def _last_parts() -> list[str]:
    return [name for names in _init_options().values() for name in names]


def _no_value(match: re.Match[str], _: list[str]) -> str:
    name = match[1]
    full = [each for each, value in options_in(_typed.get()) if value is None and f"--{each}".startswith(f"{name}.")]
    return f"The option {f'--{full[-1]}' if full else name} needs a value."


def _required(match: re.Match[str], _: list[str]) -> str:
    given = reversed(list(options_in(_typed.get())))
    option = next((name for name, value in given if value and _names_class(name, value)), "").removesuffix(".class_path")
    if not option:
        return f"A value is missing for: {match[1]}."
    first = match[1].split(",")[0]
    return f"The class of --{option} needs a value for: {match[1]}. Give it as --{option}.{first} VALUE."


def _names_class(name: str, value: str) -> bool:
    return name not in ("model", "data") and value.rpartition(".")[2][:1].isupper() and value.replace(".", "").isidentifier()


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
        r"Parser key \"([\w.]+)\":.*?Does not validate against any of the Union subtypes\s+"
        r"Subtypes: \[([^\n]*)\]\n.*Given value: ([^\n]*)",
        _wrong_of_several,
    ),
    (r"(?:Key|Option) '([\w.]+)' is not (?:expected|accepted)", _not_expected),
    (r"Subcommand '\w+' does not accept option '([\w.]+)'", _not_expected),
    (r"argument (--[\w.]+): expected one argument", _no_value),
    (r"the following arguments are required: ([\w, .]+)", _required),
    (r"invalid choice: '([^']+)' \(choose from ([^)]*)\)", _wrong_command),
]


def _init_options() -> dict[str, list[str]]:
    """Return the options of the classes that the arguments choose, as far as they are ours, or of the default ones."""
    classes = dict(zip(("model", "data"), _CLASSES_OF.get(_called.get(), _DEFAULT_CLASSES), strict=True))
    for name, value in options_in(_typed.get()):
        group = name.removesuffix(".class_path")
        if group in classes and value is not None and value.startswith("finetune.") and value not in _DEFAULT_CLASSES:
            classes[group] = value
    return {f"{group}.": _init_names(path) for group, path in classes.items()}


_DEFAULT_CLASSES = ("finetune.FinetuneModule", "finetune.FolderDataModule")
_CLASSES_OF = {
    "adapt": ("finetune.AdaptModule", "finetune.AdaptDataModule"),
    "distill": ("finetune.DistillModule", "finetune.DistillDataModule"),
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
