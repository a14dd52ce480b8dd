"""Check the model's options before anything is built from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

from finetune.errors import ConfigError, did_you_mean
from finetune.losses import ClassWeights
from finetune.optim import LearningRateRule

HeadInit = Literal["default", "zero", "ridge", "logistic"]

_RANGES: Mapping[str, tuple[Callable[[float], bool], Sequence[str]]] = {
    "greater than 0": (lambda value: value > 0, ("lr", "lr_batch", "lr_decay", "step_drop")),
    "0 or more": (
        lambda value: value >= 0,
        ("weight_decay", "momentum", "warmup_epochs", "warmup_steps", "ramp_epochs", "focal_gamma", "mixup", "cutmix", "l2_sp"),
    ),
    "at least 0 and below 1": (
        lambda value: 0 <= value < 1,
        ("label_smoothing", "min_lr_ratio", "dropout", "drop_path"),
    ),
    "above 0 and at most 1": (lambda value: 0 < value <= 1, ("mix_share",)),
}
_CHOICES = {"class_weights": ClassWeights, "head_init": HeadInit, "lr_rule": LearningRateRule}


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
    for expected, (holds, among) in _RANGES.items():
        for name in among:
            if not holds(h[name]):
                raise ConfigError(f"Expected {name} to be {expected}, found {h[name]}.")
    for name, kind in _CHOICES.items():
        known = get_args(kind)
        if h[name] not in known:
            raise ConfigError(f"Unknown {name} '{h[name]}'.{did_you_mean(str(h[name]), known)} Expected {', '.join(known)}.")
