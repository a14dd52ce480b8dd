"""Which classes and functions a configuration or a checkpoint may name, as naming one runs its code.

A file from elsewhere may name anything that is installed: `os.system` as a callback, a function that unpickles as a backbone.
What may be named without asking is what this toolkit is made of, what lies in the working folder, and what the user typed. All
else is refused before it is imported, by a message that shows it, until the user says `--trust PACKAGE`, or in Python
`trust("package")`. Python's own library is never named. Only the arguments of the command as it was started count as typed.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from finetune.errors import ConfigError
from finetune.own_modules import module_in, spec_elsewhere

KNOWN = (
    *("finetune", "lightning", "pytorch_lightning", "timm", "torchmetrics"),
    *("torch.nn", "torch.optim", "torch.utils.data", "torchvision.models", "torchvision.ops", "torchvision.transforms"),
)
"""Libraries whose classes may be named; the whole of torch would include functions that unpickle."""

_DOTTED = re.compile(r"\b[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")
# options whose values name classes
_OF_CODE = re.compile(r"^--(model|data)$|^--trainer\.|\.class_path$|(backbone|adaptation)$")
_INSTALLED = ("site-packages", "dist-packages")
_trusted: set[str] = set()
_guarded: ContextVar[frozenset[str] | None] = ContextVar("guarded", default=None)


def trust(*packages: str) -> None:
    """Let configurations and checkpoints that this process reads name what is in some packages.

    Args:
        *packages: Names of packages or modules.
    """
    _trusted.update(packages)


def trusted_here() -> list[str]:
    """Return the packages that are trusted where this is called, for a process that shall trust the same."""
    return sorted(_trusted | (_guarded.get() or frozenset()))


@contextmanager
def guarding(typed: Iterable[str] = (), packages: Iterable[str] = ()) -> Iterator[None]:
    """Refuse code that is not known to be harmless, see `require_trusted`; what is trusted around this block is so within.

    Args:
        typed: The words that the user typed: packages of classes that are named in them are trusted. Nobody types within
            another such block, so there they count for nothing.
        packages: Other packages to trust.
    """
    around = _guarded.get()
    named = _packages(typed) if around is None else ()
    token = _guarded.set(frozenset({*named, *packages}) | (around or frozenset()))
    try:
        yield
    finally:
        _guarded.reset(token)


def is_guarded() -> bool:
    """Say whether this is called within `guarding`, as code that a configuration or a checkpoint names is."""
    return _guarded.get() is not None


def _packages(words: Iterable[str]) -> Iterator[str]:
    """Yield the packages of the classes in a command; not those of words that only look alike, such as `yaml.ckpt`.

    >>> list(_packages(["fit", "--model=a.B", "--data.root", "c.d", "--trainer.callbacks", "[{class_path: e.F}]"]))
    ['a', 'e']
    """
    option = ""
    for place, word in enumerate(words):
        text = word
        if word.startswith("--"):
            option, _, text = word.partition("=")
        elif place == 0 and word == "stages":
            option = "--backbone"
        if _OF_CODE.search(option):
            yield from (name.partition(".")[0] for name in _DOTTED.findall(text))


def take_trust(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate the packages of `--trust PACKAGE` from all other words.

    >>> take_trust(["fit", "--trust", "a", "--x", "1", "--trust=b"])
    (['a', 'b'], ['fit', '--x', '1'])

    Raises:
        ConfigError: If a name is missing.
    """
    packages, rest = [], []
    waiting = iter(words)
    for word in waiting:
        option, equals, value = word.partition("=")
        if option != "--trust":
            rest.append(word)
            continue
        value = value if equals else next(waiting, "")
        if not all(part.isidentifier() for part in value.split(".")):
            raise ConfigError(f"Expected --trust to be followed by the name of a package, found '{value}'.")
        packages.append(value)
    return packages, rest


def require_trusted(path: str) -> None:
    """Make sure that a name may be imported: always one outside of Python's library, and within `guarding` a trusted one.

    Raises:
        ConfigError: If it may not.
    """
    package = path.partition(".")[0]
    if package in sys.stdlib_module_names:
        raise ConfigError(
            f"'{path}' is named where a class of a model, of data or of the trainer is expected. It is part of Python itself, "
            "and is not run. If you did not write this, do not trust the configuration or the checkpoint that it stands in."
        )
    if _guarded.get() is not None and not _is_trusted(path):
        raise ConfigError(refusal(path))


def refusal(path: str) -> str:
    """Return the message about a name that is not trusted."""
    package = path.partition(".")[0]
    return (
        f"A configuration or a checkpoint names '{path}', which is neither part of this toolkit and its libraries nor in the "
        f"working folder. It would run code of '{package}': look at it first. If you trust it, say so: --trust {package} "
        f"(in Python: finetune.trusted_code.trust('{package}'))."
    )


def require_all_trusted(values: Any) -> None:
    """Make sure that all classes, functions and backbones that stand at any depth of a configuration may be named.

    Raises:
        ConfigError: If one may not.
    """
    if isinstance(values, Mapping):
        for key in ("class_path", "backbone"):
            if isinstance(path := values.get(key), str) and _DOTTED.fullmatch(path):
                require_trusted(path)
        for value in values.values():
            require_all_trusted(value)
    elif isinstance(values, list | tuple):
        for value in values:
            require_all_trusted(value)
    elif inspect.isroutine(values) or isinstance(values, functools.partial):
        _require_harmless(values)


def _require_harmless(function: Callable[..., Any]) -> None:
    """Refuse what a configuration hands over to be called, if it is of Python's library or one of our own functions."""
    while isinstance(function, functools.partial):
        function = function.func
    path = f"{getattr(function, '__module__', None) or 'builtins'}.{getattr(function, '__qualname__', '')}"
    require_trusted(path)
    if path.startswith("finetune."):
        raise ConfigError(f"'{path}' is a function of this toolkit. No configuration may have it called: leave it out.")


def _is_trusted(path: str) -> bool:
    package = path.partition(".")[0]
    named = _trusted | (_guarded.get() or frozenset())
    within = any(path == one or path.startswith(f"{one}.") for one in (*KNOWN, *named))
    return within or package == "__main__" or in_working_folder(package) or _is_loaded_network(path) or not _exists(package)


def _is_loaded_network(path: str) -> bool:
    """Say whether a name is that of a network whose module this program has imported by itself."""
    module, _, name = path.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    return isinstance(found, type) and any(base.__module__.startswith("torch.nn.") for base in found.__mro__)


def _exists(package: str) -> bool:
    return package in sys.modules or spec_elsewhere(package) is not None


def in_working_folder(package: str) -> bool:
    """Say whether a package that is not installed would be imported from the working folder, or from below it."""
    if package in sys.stdlib_module_names:
        return False
    spec = spec_elsewhere(package)
    if spec is None:
        return module_in(os.getcwd(), package) is not None
    places = [spec.origin] if spec.has_location else list(spec.submodule_search_locations or [])
    here = Path.cwd().resolve()
    found = [Path(place).resolve() for place in places if place]
    return bool(found) and all(place.is_relative_to(here) and not set(_INSTALLED) & set(place.parts) for place in found)


@contextmanager
def guarded_parser() -> Iterator[None]:
    """Let the command's parser import only what is trusted, and build nothing where no particular class is expected."""
    from jsonargparse import _common as settings
    from jsonargparse import set_parsing_settings

    here = {entry.stem for entry in Path.cwd().iterdir() if entry.suffix == ".py" or entry.is_dir()}
    local = [name for name in here if name.isidentifier() and in_working_folder(name)]
    typed = [name for name in (_guarded.get() or ()) if name not in sys.stdlib_module_names]
    before = dict(settings.parsing_settings)  # there is no public way back
    set_parsing_settings(
        import_path_denylist=["*"],
        import_path_allowlist=sorted({*KNOWN, *local, *typed, *_trusted} - {"jsonargparse"}),
        instantiate_subclass_spec_in_any=False,
    )
    try:
        yield
    finally:
        settings.parsing_settings.update(before)
