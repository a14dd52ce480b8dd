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
    data: dict[str, str] = {}
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        following = words[place + 1] if place + 1 < len(words) else ""
        options[name] = value if equals else following
        group, _, option = name.replace(".init_args.", ".").partition(".")
        if group == "--data" and options[name] != "null":
            data[option] = options[name]
    if any(option in options for option in _SAYS_OTHERWISE):
        return None
    if options.get("--model.weights") == "none":
        return "scratch", "training starts from random weights"
    number, where = _pictures_per_class(data)
    if number is None:
        return None
    of = f"{number:g} training pictures per class (median) in {where}"
    if number < FEW:
        return "few_shot", f"{of}, fewer than {FEW}"
    if number < MANY:
        return "small", f"{of}, between {FEW} and {MANY}"
    return "large", f"{of}, {MANY} or more"


def _pictures_per_class(options: dict[str, str]) -> tuple[float | None, str]:
    """Return the median over the classes, None for a folder that cannot be read: the data module says what is wrong with it."""
    root = options.get("root", "digits")
    try:
        if "shots" in options:
            return float(int(options["shots"])), root
        val, test = float(options.get("val_fraction", 0.2)), float(options.get("test_fraction", 0))
        share = float(options.get("fraction", 1))
        folds = int(options.get("folds", 0))
        folder = scan(BUILT_IN[root]() if root in BUILT_IN else root, val, test)
    except (DataError, OSError, ValueError):
        return None, root
    counts = [max(1, round(share * number)) for number in folder.counts("train")]
    if folds > 1:
        together = [sum(both) for both in zip(folder.counts("train"), folder.counts("val"), strict=True)]
        counts = [round(number * (1 - 1 / folds)) for number in together]
    return median(counts), root
