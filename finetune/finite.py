"""Weights and results that are numbers: NaN and infinity are refused where they are read, by the name of the tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from finetune.errors import CheckpointError, FinetuneError


def require_finite(tensors: Mapping[str, Any], where: str, error: type[FinetuneError] = CheckpointError) -> None:
    """Refuse weights that hold NaN or infinity, or no values at all (tensors on the device `meta`).

    A tensor of nothing but 0 and -inf is a mask, and fine.

    Args:
        tensors: Tensors by name; other values are left alone.
        where: Where they are from, for the message.
        error: The class of the error.

    Raises:
        FinetuneError: Of that class; the message names the first such tensor.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            continue
        if tensor.is_meta:
            raise error(
                f"{where}: '{name}' holds no values (it is on the device meta): the model was saved before its weights were "
                "loaded. Save it again with its weights."
            )
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        odd = ~torch.isfinite(tensor)
        if bool(odd.any()) and not bool(((tensor == 0) | (tensor == -math.inf)).all()):
            raise error(
                f"{where}: '{name}' holds {int(odd.sum())} of {tensor.numel()} values that are NaN or infinite, so whatever is "
                "computed with it means nothing. The training diverged, or the file is damaged: use an earlier checkpoint."
            )


def finite_temperature(value: Any, where: str) -> float:
    """Return a temperature that logits can be divided by.

    Raises:
        CheckpointError: If it is no finite number above 0.
    """
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    if not (math.isfinite(number) and number > 0):
        raise CheckpointError(f"{where} has the temperature {value!r}: expected a finite number above 0. Export it again.")
    return float(number)
