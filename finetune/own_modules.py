"""Modules of the user's in the working folder, and what else Python would read there by its place alone.

The working folder is not on `sys.path`: whatever lies in a folder that was downloaded could otherwise stand in for a library
(`tqdm.py`), or be one that another library uses where it finds it (`defusedxml.py`). While the command runs, a module of the
working folder is found only if a class path names it or another such module imports it, only if it is found nowhere else, and
never under the name of a known library.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import FrameType, ModuleType

_VARIABLE = "RESNET_FINETUNE_OWN_MODULES"  # for processes that start anew and unpickle objects of these modules
# who imports what a class path names
_BY_NAME = {("finetune.named_objects", "_module_of"), ("jsonargparse._util", "import_object")}
# what libraries import where it is installed, beside what their own metadata list
_LIBRARIES = {
    *("accelerate", "apex", "bitsandbytes", "colorama", "cupy", "cv2", "dali", "deepspeed", "defusedxml", "dotenv"),
    *("flash_attn", "flax", "functorch", "hydra", "ipywidgets", "jax", "keras", "mpi4py", "numba", "olefile", "omegaconf"),
    *("onnx", "onnxruntime", "onnxscript", "opt_einsum", "pandas", "peft", "psutil", "pyarrow", "rich", "ruamel", "ruyaml"),
    *("seaborn", "simplejson", "tensorboard", "tensorboardX", "tensorflow", "timm", "torch_xla", "torchao", "tqdm"),
    *("transformers", "triton", "typeshed_client", "ujson", "wandb", "xformers"),
}


def module_in(folder: str, name: str) -> ModuleSpec | None:
    """Return where a folder holds a module of the user's, or None if it does not or the name is that of a library.

    Args:
        folder: The folder.
        name: A name without dots.
    """
    found = PathFinder.find_spec(name, [folder])
    return None if found is None or is_library(name) else found


def is_library(name: str) -> bool:
    """Say whether a module is called like one of Python's library or of a package that libraries use, installed or not."""
    return name in sys.stdlib_module_names or name in _LIBRARIES or name.lower() in _required()


@cache
def _required() -> frozenset[str]:
    """Return what installed packages require or would use, by the names in their metadata."""
    from importlib.metadata import distributions

    requirements = [text for each in distributions() for text in [each.metadata["Name"] or "", *(each.requires or [])]]
    names = {re.split(r"[^\w.-]", text, maxsplit=1)[0].lower().replace("-", "_") for text in requirements}
    return frozenset(names | {name.removeprefix("python_") for name in names})


class _WorkingFolder(MetaPathFinder):
    """Find modules of the user's in a folder, behind all other finders.

    Args:
        folder: The folder.
        names: Modules that may be imported whoever asks.
    """

    def __init__(self, folder: str, names: Sequence[str] = ()) -> None:
        self.folder, self.names, self.found = folder, set(names), set(names)

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return where a module is, if it is asked for by its name."""
        if path is not None or not (fullname in self.names or self._is_asked_for()):
            return None
        spec = module_in(self.folder, fullname)
        if spec is not None:
            self.found.add(fullname)
            os.environ[_VARIABLE] = json.dumps([self.folder, sorted(self.found)])
        return spec

    def _is_asked_for(self) -> bool:
        """Say whether the statement that imports belongs to a class path or to a module of the user's."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None and _is_of_import(frame):
            frame = frame.f_back
        if frame is None:
            return False
        module = str(frame.f_globals.get("__name__"))
        own = module.partition(".")[0] in self.found and _lies_in(frame.f_code.co_filename, self.folder)
        return own or (module, frame.f_code.co_name) in _BY_NAME


def _is_of_import(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).partition(".")[0] == "importlib"


def _lies_in(file: str, folder: str) -> bool:
    return os.path.abspath(file).startswith(os.path.join(folder, ""))


def spec_elsewhere(name: str) -> ModuleSpec | None:
    """Return where a module is that is loaded already or that Python finds without the working folder's help."""
    if name in sys.modules:
        return sys.modules[name].__spec__
    finders = (finder for finder in sys.meta_path if not isinstance(finder, _WorkingFolder | _Outside))
    found = (finder.find_spec(name, None) for finder in finders)
    try:
        return next((spec for spec in found if spec is not None), None)
    except (ImportError, ValueError, AttributeError):
        return None


class _Outside(MetaPathFinder):
    """Import matplotlib from another folder than the working folder, where it would look for its settings first."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return where matplotlib is, with a loader that leaves the working folder meanwhile."""
        if fullname != "matplotlib":
            return None
        spec = PathFinder.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _OutsideLoader(spec.loader)
        return spec


class _OutsideLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.loader  # type: ignore[union-attr]
        with outside_working_folder():
            self.loader.exec_module(module)


@contextmanager
def outside_working_folder() -> Iterator[None]:
    """Let a library that looks for settings in the working folder find none, such as where to send a key to."""
    before = os.getcwd()
    os.chdir(os.path.dirname(os.path.abspath(__file__)))
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def own_modules() -> Iterator[None]:
    """Let class paths name modules of the working folder, and keep all else that lies there out of what is imported."""
    last, first = _WorkingFolder(os.getcwd()), _Outside()
    before = os.environ.get(_VARIABLE)
    sys.meta_path.append(last)
    sys.meta_path.insert(0, first)
    try:
        yield
    finally:
        for finder in (last, first):
            with suppress(ValueError):
                sys.meta_path.remove(finder)
        os.environ.pop(_VARIABLE, None)
        if before is not None:
            os.environ[_VARIABLE] = before


def inherit_own_modules() -> None:
    """In a process that a command started and that begins anew, as a data-loading worker may: find the same modules."""
    if _VARIABLE in os.environ and not any(isinstance(finder, _WorkingFolder) for finder in sys.meta_path):
        folder, names = json.loads(os.environ[_VARIABLE])
        sys.meta_path.append(_WorkingFolder(folder, names))


def protect_processes() -> None:
    """Keep the working folder off `sys.path` of the processes that this one starts, as Python 3.11 and later can.

    Processes that read data, compile or train on another device begin as `python -c` or `python -m`, which put it in front.
    """
    os.environ.setdefault("PYTHONSAFEPATH", "1")
