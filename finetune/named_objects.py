"""The class or function that a dotted path names, taken for what it is and not for what the path says.

A module holds more than it defines: `train.Popen` is a class of Python's library if `train.py` imports it, and
`train.main` may be this toolkit's own command. So a path is followed name by name, and what is found counts by the module that
defines it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from finetune.errors import ConfigError, did_you_mean
from finetune.trusted_code import require_trusted

_LIBRARIES = ("finetune", "lightning", "pytorch_lightning", "timm", "torch", "torchmetrics", "torchvision")
_NETWORKS = ("torch.nn", "torchvision.models", "torchvision.ops", "timm")  # where the networks of the libraries are


def import_path(path: str) -> Callable[..., Any]:
    """Import a class or function by its dotted path.

    Raises:
        ConfigError: If it cannot be imported or is not there, if it is neither a class nor a plain function, or where a file
            names it that may not, see `trusted_code`.
    """
    require_trusted(path)
    module_name, _, attribute = path.rpartition(".")
    try:
        if not all(part.isidentifier() for part in path.split(".")):
            raise ImportError("it is not a dotted path")  # such as ./my_net.py
        holder, names = _module_of(module_name)
    except ImportError as error:
        raise ConfigError(
            f"The backbone '{path}' cannot be imported: {error}. Expected the name of a timm model, or the dotted path of "
            "a class or function that can be imported from the working folder or the environment."
        ) from error
    found: Any = holder
    for name in (*names, attribute):
        inner = getattr(found, name, None)
        if not callable(inner) or isinstance(inner, ModuleType):
            others = [other for other in dir(found) if other != name]
            where = module_name if found is holder else found.__qualname__
            raise ConfigError(f"'{where}' has no class or function '{name}'.{did_you_mean(name, others)}")
        found = inner
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        require_trusted(_origin(type(found)))
        raise ConfigError(
            f"Expected '{path}' to be a class or a function that is written with def; it is an object of type "
            f"{type(found).__name__}, and is not called."
        )
    require_trusted(_origin(found))  # where it is really from
    return found


def _module_of(path: str) -> tuple[ModuleType, list[str]]:
    """Return the module that a path begins with, and the names of classes behind it.

    Raises:
        ImportError: If there is none, or if the module goes by another name.
    """
    module = path
    while True:
        try:
            found = importlib.import_module(module)
            break
        except ModuleNotFoundError as error:
            outer, _, _ = module.rpartition(".")
            if not outer or error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise
            module = outer
    names = path.removeprefix(module).split(".")[1:]
    if found.__name__ != module:
        raise ImportError(f"'{module}' is another name of the module '{found.__name__}'")
    holder: Any = found
    for place, name in enumerate(names):
        holder = getattr(holder, name, None)
        if not inspect.isclass(holder):
            raise ModuleNotFoundError(f"No module named '{'.'.join([module, *names[: place + 1]])}'")
    return found, names


def _origin(found: Any) -> str:
    """Return the path by which a class or function is defined."""
    return f"{getattr(found, '__module__', None) or 'builtins'}.{found.__qualname__}"


def require_network(build: Callable[..., Any], path: str, network: type, is_known: Callable[[Any], bool]) -> None:
    """Refuse what makes no network before it is called: calling it is running it.

    A network is a class of networks, or a function of the package that the path names. Of a library only what lies where its
    networks are will do, and nothing of this toolkit.

    Args:
        build: What the path names.
        path: The path.
        network: The base class of networks.
        is_known: Whether a function of a library is known to return a network.

    Raises:
        ConfigError: If it is something else.
    """
    origin = _origin(build)
    package = origin.partition(".")[0]
    if inspect.isclass(build):
        place = package not in _LIBRARIES or any(origin.startswith(f"{one}.") for one in _NETWORKS)
        fits = issubclass(build, network) and place
    elif package in _LIBRARIES:
        fits = is_known(build)
    else:
        fits = package == path.partition(".")[0] and not _returns_none(build)
    if not fits:
        raise ConfigError(
            f"Expected the backbone '{path}' to be an nn.Module class, or a function of yours that returns one; it is neither "
            f"(it is {origin}), and is not called."
        )


def _returns_none(build: Callable[..., Any]) -> bool:
    """Say whether a function is annotated to return nothing, as a program's `main` is."""
    return getattr(build, "__annotations__", {}).get("return", "") in (None, "None")
