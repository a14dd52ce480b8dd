"""Check the model's options before anything is built from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune.errors import ConfigError


def check_options(h: Mapping[str, Any]) -> None:
    """Check the ranges of the options of `FinetuneModule`, and those that exclude each other.

    Args:
        h: The options by name.

    Raises:
        ConfigError: If one is out of its range.
    """
    number, names = h["num_classes"], h["class_names"]
    if number < 2 or (names is not None and len(names) != number):
        also = "" if names is None else f" and as many class_names, found {len(names)}"
        raise ConfigError(f"Expected num_classes to be at least 2{also}; num_classes is {number}.")
    if h["warmup_epochs"] and h["warmup_steps"]:
        raise ConfigError(
            f"warmup_epochs ({h['warmup_epochs']}) and warmup_steps ({h['warmup_steps']}) are both set: give one of them."
        )
    milestones = h["step_milestones"] or []
    if any(not 0 < share < 1 for share in milestones) or list(milestones) != sorted(milestones):
        raise ConfigError(f"Expected step_milestones to be rising shares of the run between 0 and 1, found {milestones}.")
    positive = {"lr": h["lr"], "lr_decay": h["lr_decay"], "step_drop": h["step_drop"]}
    zero_or_more = {name: h[name] for name in ("weight_decay", "momentum", "warmup_epochs", "warmup_steps", "ramp_epochs")}
    shares = {name: h[name] for name in ("label_smoothing", "min_lr_ratio")}
    for name, value in positive.items():
        if not value > 0:
            raise ConfigError(f"Expected {name} to be greater than 0, found {value}.")
    for name, value in zero_or_more.items():
        if not value >= 0:
            raise ConfigError(f"Expected {name} to be 0 or more, found {value}.")
    for name, value in shares.items():
        if not 0 <= value < 1:
            raise ConfigError(f"Expected {name} to be at least 0 and below 1, found {value}.")
