"""Read files with weights without running any code that they may hold."""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from finetune.errors import WeightsError, did_you_mean

OPTION = "--model.weights"
NAMED = ("auto", "hub", "bundled", "package", "none")
"""The sources that are no file."""
FILES = ".safetensors, .pth, .pt, .bin or .ckpt"
_NESTS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")  # as in timm, averaged weights come first


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a file on the CPU, without running any code that it may hold.

    What training scripts nest under `state_dict`, `model`, `model_state_dict` or `state_dict_ema` is found.

    Raises:
        WeightsError: If the file is missing, damaged, of another kind, or could be read only by running code.
    """
    path = require_file(str(path))
    return tensors_of(read_file(path), path)


def require_file(source: str) -> Path:
    """Return the path of a file that exists.

    Raises:
        WeightsError: If it does not; the message names the nearest file.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path
    folder = path if path.is_dir() else path.parent
    beside = sorted(p.name for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
    fitting = [name for name in beside if name.endswith(tuple(re.findall(r"\.\w+", FILES)))]
    if path.is_dir():
        held = f" It holds {', '.join(fitting[:5])}." if fitting else ""
        raise WeightsError(
            f"Expected a file with weights, found the folder '{source}'.{held} Give {OPTION} the path of a file."
        )
    hint = did_you_mean(path.name, [*beside, *NAMED])
    where = "" if folder.is_dir() else f" The folder '{folder}' does not exist."
    raise WeightsError(f"There is no file '{source}'.{hint}{where} Expected {', '.join(NAMED)} or the path of a {FILES} file.")


def read_file(path: Path) -> dict[str, Any]:
    """Read all plain content of a file on the CPU.

    Raises:
        WeightsError: If it is damaged, of another kind, or could be read only by running code.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(256)
    except OSError as error:
        raise WeightsError(f"The file '{path}' cannot be read: {error.strerror}.") from error
    _refuse_text(start, path)
    try:
        if path.suffix == ".safetensors" or start[8:9] == b"{":  # a header of JSON after its length in 8 bytes
            return dict(safetensors.torch.load_file(path))
        # timm's training script stores a Namespace, which holds values and runs nothing
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about the age of the format
            raw = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # what a damaged file raises differs by format and by the place of the damage
        code = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if code:
            if "." in code[1] and zipfile.is_zipfile(path) and _is_module(code[1]):
                raise WeightsError(
                    f"'{path}' is a whole model as torch.save(model, FILE) writes it (a pickled {code[1]}), and reading it "
                    "would run code. Save its tensors instead, where it was made: torch.save(model.state_dict(), FILE)."
                ) from error
            raise WeightsError(
                f"'{path}' holds more than tensors: reading it would run code ({code[1]}), which could be anybody's. Where you "
                "trust it, load it yourself and save the tensors alone: torch.save(model.state_dict(), FILE)."
            ) from error
        told = isinstance(error, RuntimeError | OSError | safetensors.SafetensorError)
        reason = str(error).partition("\n")[0][:200] if told else "not a format of weights"
        raise WeightsError(
            f"'{path}' cannot be read as weights ({reason}). Expected a {FILES} file; if it is one, it is damaged or "
            "incomplete: copy or download it again."
        ) from error
    return dict(raw) if isinstance(raw, Mapping) else {"": raw}


def _is_module(name: str) -> bool:
    """Guess by its name whether a pickled class is that of a network; nothing is imported."""
    package, _, own = name.partition(".")
    return package in ("torchvision", "timm", "finetune", "lightning") or ".nn." in name or own.endswith(("Net", "Module"))


def _refuse_text(start: bytes, path: Path) -> None:
    """Recognise what is often found under the name of a file with weights."""
    found = ""
    if not start:
        found = "an empty file"
    elif start.startswith(b"version https://git-lfs"):
        found = "a Git LFS pointer, which stands for the file: fetch that with `git lfs pull`"
    elif start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        found = "a web page: the address it was saved from leads to a page and not to the file, or asks for a login"
    if found:
        raise WeightsError(f"Expected weights in '{path}', found {found}.")


def tensors_of(raw: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Return the named tensors in what was read, also where a training script nested them.

    Raises:
        WeightsError: If there are none.
    """
    inner = raw
    while nest := next((key for key in _NESTS if isinstance(inner.get(key), Mapping)), None):
        inner = inner[nest]
    tensors = {str(name): value.detach() for name, value in inner.items() if isinstance(value, Tensor) and name}
    if not tensors:
        raise WeightsError(f"Expected named tensors in '{path}', found none (keys: {', '.join(map(str, inner)) or 'none'}).")
    for name, tensor in tensors.items():
        if fault := fault_of(tensor):
            raise WeightsError(f"'{path}' holds no weights in '{name}': {fault}.")
    return tensors


_MOST_REPEATED = 2**24  # bytes; a small file could otherwise ask for all memory there is


def fault_of(tensor: Tensor) -> str:
    """Say why a tensor cannot be a weight; empty if it can.

    >>> fault_of(torch.empty(2, device="meta"))
    'it is on the device meta, which has shapes and no values (save the model after its weights are loaded)'
    >>> fault_of(torch.zeros(1).expand(2**24))
    'it is 64 MB of 0 MB that are repeated'
    """
    if tensor.is_meta:
        return "it is on the device meta, which has shapes and no values (save the model after its weights are loaded)"
    if tensor.layout != torch.strided or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
        return f"it is {kind}, expected a dense tensor"
    if tensor.is_complex():
        return "it holds complex numbers"
    held, shown = tensor.untyped_storage().nbytes(), tensor.numel() * tensor.element_size()
    if shown > max(held, _MOST_REPEATED):
        return f"it is {shown / 2**20:,.0f} MB of {held / 2**20:,.0f} MB that are repeated"
    return ""


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
