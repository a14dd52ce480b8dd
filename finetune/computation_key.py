"""A key of what a network or a transform computes: its modules with their settings and tensors, and the code of the user's own.

Results that are stored may be served again only where the key is equal. It therefore holds too much rather than too little:

* of every module: its class, `extra_repr`, public attributes, parameters, all buffers, hooks, and the mode that it is in;
* of code that belongs to no installed library: the compiled code of classes and functions as they are loaded, so that a file
  that is edited while a run goes on changes nothing yet, with defaults, closures, and the globals that they name, transitively;
* of code of installed libraries: the qualified name. Their versions belong into the caller's key.

What it cannot see: private attributes, what code reads from files, from the environment or over the network, extensions in C,
and what an own class looks up by a name that is put together at run time.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import inspect
import json
import re
import sys
import types
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LIBRARIES = frozenset({"torch", "torchvision", "timm", "numpy", "PIL", "lightning", "finetune", *sys.stdlib_module_names})
"""Packages whose code is known by its name: their versions are part of the keys of stores."""

_INSTRUMENTS = ("finetune", "lightning", "torchmetrics")  # their hooks watch and change nothing
_NOTES = {
    "num_classes",
    "pretrained_cfg",
    "default_cfg",
    "feature_info",
    "grad_checkpointing",
}  # timm's, of no effect on features
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...))
_NAMED = (torch.dtype, torch.device, torch.memory_format, torch.layout)
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")

Named = Callable[[str], bool]


def computation_key(value: Any, leave_out: Named = lambda _: False, moded: Named = lambda _: True) -> str:
    """Return a hash of what a network, a transform, a function or a class computes.

    Args:
        value: What computes.
        leave_out: Whether a module or tensor of a network, by its name, takes no part.
        moded: Whether it matters if a module, by its name, is in training mode.

    >>> computation_key(nn.ReLU()) == computation_key(nn.ReLU()), computation_key(nn.ReLU()) == computation_key(nn.SiLU())
    (True, False)
    """
    description = _Description(leave_out, moded)
    found = description.module(value, "") if isinstance(value, nn.Module) else description.value(value)
    code = description.code_of_all()
    python = sys.implementation.cache_tag if code else None  # compiled code is that of a Python version
    return hashlib.blake2b(json.dumps([found, code, python]).encode(), digest_size=16).hexdigest()


def tensor_hash(tensor: Tensor) -> str:
    """Hash a tensor: shape, kind of number and values; the layout in memory makes no difference."""
    digest = hashlib.blake2b(f"{tuple(tensor.shape)}{tensor.dtype}".encode(), digest_size=16)
    if tensor.device.type != "meta":
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class _Description:
    """Turns what computes into nested lists of strings; own classes and functions are numbers there, and described after it."""

    def __init__(self, leave_out: Named, moded: Named) -> None:
        self.leave_out, self.moded = leave_out, moded
        self._waiting: deque[Callable[[], Any]] = deque()  # a chain of calls may be longer than Python's stack
        self._numbers: dict[int, int] = {}
        self._held: list[Any] = []  # so that no two objects have the same id
        self._open: set[int] = set()

    def _seen(self, value: Any) -> str | None:
        """Return the number of an object that was described before, and give one to any other."""
        if id(value) in self._numbers:
            return f"#{self._numbers[id(value)]}"
        self._numbers[id(value)] = len(self._numbers)
        self._held.append(value)
        return None

    def _later(self, value: Any, describe: Callable[[], Any]) -> str:
        """Return the number of an own class or function, which is described in its turn."""
        if seen := self._seen(value):
            return seen
        self._waiting.append(describe)
        return f"#{self._numbers[id(value)]}"

    def code_of_all(self) -> list[Any]:
        """Describe the own classes and functions that were met, and those that they name."""
        found = []
        while self._waiting:
            found.append(self._waiting.popleft()())
        return found

    # ----------------------------------------------------------------------------------------------------- modules

    def module(self, module: nn.Module, name: str) -> Any:
        """Describe a network under a name."""
        if seen := self._seen(module):
            return seen
        tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        inner = f"{name}." if name else ""
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        notes = _NOTES if type(module).__module__.startswith("timm.") else set()
        return [
            self.kind(type(module)),
            module.training if self.moded(name) else None,
            _ADDRESS.sub("", module.extra_repr()),
            module.code if isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule) else None,
            [
                [key, self.value(value, inner + key)]
                for key, value in sorted(vars(module).items())
                if not key.startswith("_") and key != "training" and key not in notes and not self.leave_out(inner + key)
            ],
            [
                [key, tensor_hash(tensor)]
                for key, tensor in tensors.items()
                if key != "num_batches_tracked" and not self.leave_out(inner + key)
            ],
            [self.value(hook) for hook in hooks if _top(getattr(hook, "__module__", None)) not in _INSTRUMENTS],
            [
                [key, self.module(child, inner + key)]
                for key, child in module._modules.items()
                if child is not None and not self.leave_out(inner + key)
            ],
        ]

    # ------------------------------------------------------------------------------------------------------ values

    def value(self, value: Any, name: str = "") -> Any:
        """Describe anything: plain values as they are, objects by their class and public attributes."""
        if isinstance(value, enum.Enum):
            return [type(value).__qualname__, value.name, repr(value.value)]
        if isinstance(value, _PLAIN):
            return repr(value)
        if isinstance(value, _NAMED):
            return str(value)
        if isinstance(value, Tensor):
            return tensor_hash(value)
        if isinstance(value, np.ndarray | np.generic) and value.dtype != object:
            return [str(value.dtype), list(value.shape), hashlib.blake2b(value.tobytes(), digest_size=16).hexdigest()]
        if isinstance(value, Mapping | list | tuple | set | frozenset):
            return self._container(value, name)
        if isinstance(value, nn.Module):
            return self.module(value, name)
        if isinstance(value, type):
            return self.kind(value)
        if isinstance(value, types.ModuleType):
            return value.__name__
        return self._callable(value) or self._object(value, name)

    def _container(self, value: Any, name: str) -> Any:
        if id(value) in self._open:
            return "cycle"
        self._open.add(id(value))
        try:
            if isinstance(value, Mapping):
                return {"mapping": [[self.value(key), self.value(inner, f"{name}.{key}")] for key, inner in value.items()]}
            found = [self.value(inner, f"{name}.{number}") for number, inner in enumerate(value)]
            return {"set": sorted(found, key=json.dumps)} if isinstance(value, set | frozenset) else found
        finally:
            self._open.discard(id(value))

    def _callable(self, value: Any) -> Any:
        """Describe a function, a method or a partial; nothing for anything else."""
        if isinstance(value, functools.partial):
            return ["partial", self.value(value.func), self.value(value.args), self.value(value.keywords)]
        if inspect.ismethod(value):
            return ["method", self.value(value.__func__), self.value(value.__self__)]
        if isinstance(value, types.FunctionType):
            return self.function(value)
        if inspect.isroutine(value):
            return f"{getattr(value, '__module__', None)}.{getattr(value, '__qualname__', value)}"
        return None

    def _object(self, value: Any, name: str) -> Any:
        if seen := self._seen(value):
            return seen
        attributes = sorted(getattr(value, "__dict__", {}).items())
        return [
            self.kind(type(value)),
            [[key, self.value(inner, f"{name}.{key}")] for key, inner in attributes if not key.startswith("_")],
        ]

    # -------------------------------------------------------------------------------------------------------- code

    def kind(self, kind: type) -> Any:
        """Describe a class: by its name, and by its code unless it is a library's."""
        name = f"{kind.__module__}.{kind.__qualname__}"
        functions = {key: member for key, member in vars(kind).items() if isinstance(member, types.FunctionType)}
        if _is_library(kind.__module__):  # of which the user may have replaced methods
            patched = {key: f for key, f in functions.items() if not _is_library(f.__module__)}
            return [name, *([key, self.function(f)] for key, f in sorted(patched.items()))] if patched else name
        return self._later(kind, lambda: self._kind(kind, name, functions))

    def _kind(self, kind: type, name: str, functions: Mapping[str, Any]) -> Any:
        own = [(key, _inner(member)) for key, member in sorted(vars(kind).items()) if key in functions or not _is_dunder(key)]
        bases = [self.kind(base) for base in kind.__mro__[1:] if base is not object]
        return [name, bases, [[key, self.value(member)] for key, member in own]]

    def function(self, function: types.FunctionType) -> Any:
        """Describe a function: by its name, and by its code unless it is a library's."""
        name = f"{function.__module__}.{function.__qualname__}"
        if _is_library(function.__module__):
            return name
        return self._later(function, lambda: self._function(function, name))

    def _function(self, function: types.FunctionType, name: str) -> Any:
        cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
        found = [name, self.code(function.__code__), self.value(function.__defaults__), self.value(function.__kwdefaults__)]
        found.append([self.value(content) for content in cells])
        return found if _is_installed(function.__module__) else [*found, self._globals(function)]

    def code(self, code: types.CodeType) -> Any:
        """Describe compiled code, without the numbers of its lines."""
        constants = [self.code(one) if isinstance(one, types.CodeType) else self.value(one) for one in code.co_consts]
        return [code.co_code.hex(), constants, list(code.co_names), list(code.co_varnames), list(code.co_freevars)]

    def _globals(self, function: types.FunctionType) -> Any:
        """Describe what a function of the user's names outside of itself."""
        found = []
        names = sorted(_names(function.__code__))
        for name in names:
            if _is_dunder(name):
                continue
            value = function.__globals__.get(name, sys.modules.get(name))
            if isinstance(value, types.ModuleType):
                own = not _is_library(value.__name__) and not _is_installed(value.__name__)
                members = {key: vars(value)[key] for key in names if own and key in vars(value) and not _is_dunder(key)}
                found += [[f"{name}.{key}", self._global(member)] for key, member in members.items()]
            elif value is not None:
                found.append([name, self._global(value)])
        return found

    def _global(self, value: Any) -> Any:
        known = (
            *_PLAIN,
            *_NAMED,
            enum.Enum,
            Tensor,
            np.ndarray,
            np.generic,
            Mapping,
            list,
            tuple,
            set,
            frozenset,
            nn.Module,
            type,
        )
        if isinstance(value, known):
            return self.value(value)
        return self._callable(value) or f"{type(value).__module__}.{type(value).__qualname__}"


def _top(module: str | None) -> str:
    return (module or "").partition(".")[0]


def _is_library(module: str | None) -> bool:
    return _top(module) in LIBRARIES


def _is_installed(module: str | None) -> bool:
    """Say whether a module was installed, so that it is not what somebody edits between two runs."""
    file = getattr(sys.modules.get(module or ""), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _inner(member: Any) -> Any:
    """Return the function in a member of a class, or the member."""
    if isinstance(member, staticmethod | classmethod):
        return member.__func__
    if isinstance(member, property):
        return [member.fget, member.fset]
    return member.func if isinstance(member, functools.cached_property) else member


def _names(code: types.CodeType) -> set[str]:
    """Return the names that code and the functions within it use."""
    inner = [_names(one) for one in code.co_consts if isinstance(one, types.CodeType)]
    return set(code.co_names).union(*inner)
