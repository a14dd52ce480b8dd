"""Weights for others: a safetensors file with timm's names, and beside it a card that says where they come from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from finetune.errors import ConfigError, FinetuneError, WeightsError
from finetune.escaping import shown
from finetune.files import atomic_write, write_atomically
from finetune.schema import decode_json
from finetune.transforms import InputSpec
from finetune.weight_files import sha256_of

KEY = "resnet-finetune"
"""Under this name the card stands in the file's own metadata, as JSON."""


def write_weights(path: Path, tensors: Mapping[str, Tensor], card: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Write a safetensors file with its card inside, and the card as `<name>.json` beside it.

    Args:
        path: Where to; what is there is replaced.
        tensors: The weights by timm's names.
        card: What is to be known of them, as plain values; `input` is taken over by a model that loads the file.
        dtype: Floating-point tensors are stored as this.

    Returns:
        The card, with the file's size and sha256.
    """
    stored = {name: (t.to(dtype) if t.is_floating_point() else t).contiguous() for name, t in tensors.items()}
    with atomic_write(path) as partial:
        safetensors.torch.save_file(stored, partial, {KEY: json.dumps(card)})
    complete = {**card, "file": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
    write_atomically(path.with_suffix(".json"), json.dumps(complete, indent=2) + "\n")
    return complete


def read_card(path: Path) -> dict[str, Any]:
    """Return the card inside a file of weights; empty if it has none."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
        return decode_json(text, dict[str, Any], "the card of weights", where=str(path)) if text else {}
    except (safetensors.SafetensorError, FinetuneError, OSError):
        return {}


def input_on(card: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
    """Return the input that weights with this card expect, as plain values; None if the card does not say.

    Raises:
        WeightsError: If the card says something that is no input.
    """
    fields = card.get("input")
    if fields is None:
        return None
    try:
        found = asdict(InputSpec.from_plain(fields))
        if unknown := set(fields) - set(found):
            raise ConfigError(f"'{unknown.pop()}' is not known")
        return found
    except ConfigError as error:
        raise WeightsError(
            f"The card in '{path}' does not describe an input: expected size, mean, std, interpolation and crop under 'input', "
            f"found {shown(repr(fields))[:200]}. Write the file again with its card as it was, or without one."
        ) from error


def describe(card: Mapping[str, Any]) -> str:
    """Return in a few words what weights are; empty if the card does not say.

    >>> describe({"teacher": {"name": "tf_efficientnet_lite0"}, "input": {"size": 96}})
    'distilled from tf_efficientnet_lite0, for pictures of 96 px'
    """
    teacher, size = _entry(card, "teacher", "name"), _entry(card, "input", "size")
    if not isinstance(teacher, str):
        return ""
    return f"distilled from {teacher}" + (f", for pictures of {size} px" if size else "")


def _entry(card: Mapping[str, Any], *keys: str) -> Any:
    found: Any = card
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found
