"""Which recipe suits a folder: chosen by the number of training pictures per class, where the user names none."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from finetune.errors import DataError
from finetune.folders import scan
from finetune.sample import BUILT_IN

FEW, MANY = 10, 500  # pictures per class: below FEW it is few_shot, from MANY on it is large
_SAYS_OTHERWISE = ("--config", "-c", "--ckpt_path", "--model", "--data", "--print_config")


def choose_recipe(words: Sequence[str]) -> tuple[str, str] | None:
    """Return the recipe for the words of `fit` and the reason, or None where the words say what to do.

    Args:
        words: The options; a recipe, a checkpoint or classes of the user's own leave nothing to choose.
    """
    options: dict[str, str] = {}
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        following = words[place + 1] if place + 1 < len(words) else ""
        options[name] = value if equals else following
    if any(option in options for option in _SAYS_OTHERWISE):
        return None
    if options.get("--model.weights") == "none":
        return "scratch", "training starts from random weights"
    number, where = _pictures_per_class(options)
    if number is None:
        return None
    of = f"{number:g} training pictures per class in {where}"
    if number < FEW:
        return "few_shot", f"{of}, fewer than {FEW}"
    if number < MANY:
        return "small", f"{of}, between {FEW} and {MANY}"
    return "large", f"{of}, {MANY} or more"


def _pictures_per_class(options: dict[str, str]) -> tuple[float | None, str]:
    """Return the median over the classes, None for a folder that cannot be read: the data module says what is wrong with it."""
    root = options.get("--data.root", "digits")
    if shots := options.get("--data.shots", ""):
        return (float(shots), root) if shots.isdigit() else (None, root)
    try:
        folder = scan(BUILT_IN[root]() if root in BUILT_IN else root)
    except (DataError, OSError):
        return None, root
    try:
        share = float(options.get("--data.fraction") or 1)
    except ValueError:
        return None, root
    return round(median(folder.counts("train")) * share), root
