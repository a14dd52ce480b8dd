"""The ranges of the model's options, written out as a table of what is let through and what is not."""

import inspect

import pytest

from finetune import FinetuneModule
from finetune.errors import ConfigError
from finetune.options import check_options

NAN = float("nan")
DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(FinetuneModule.__init__).parameters.items()
    if parameter.default is not parameter.empty
}
TABLE = [
    # option, the last values inside, the first values outside, what the message says
    ("num_classes", [2, 1000], [1, 0, -3], "num_classes to be at least 2"),
    ("class_names", [None, ["a", "b", "c"]], [["a", "b"], []], "as many class_names, found"),
    ("lr", [1e-12, 10.0], [0.0, -1.0, NAN], "lr to be greater than 0"),
    ("lr_decay", [0.1, 1.0], [0.0, -0.5, NAN], "lr_decay to be greater than 0"),
    ("step_drop", [0.1, 2.0], [0.0, NAN], "step_drop to be greater than 0"),
    ("weight_decay", [0.0, 1.0], [-1e-9, NAN], "weight_decay to be 0 or more"),
    ("momentum", [0.0, 0.99], [-0.1, NAN], "momentum to be 0 or more"),
    ("warmup_epochs", [0.0, 0.5], [-0.5], "warmup_epochs to be 0 or more"),
    ("warmup_steps", [0, 7], [-1], "warmup_steps to be 0 or more"),
    ("ramp_epochs", [0.0, 3.0], [-1.0], "ramp_epochs to be 0 or more"),
    ("label_smoothing", [0.0, 0.99], [1.0, -0.1, NAN], "label_smoothing to be at least 0 and below 1"),
    ("min_lr_ratio", [0.0, 0.99], [1.0, -0.1], "min_lr_ratio to be at least 0 and below 1"),
]


@pytest.mark.parametrize(("option", "inside", "outside", "says"), TABLE, ids=[row[0] for row in TABLE])
def test_ranges(option, inside, outside, says):
    for value in inside:
        check_options({**DEFAULTS, "num_classes": 3, option: value})
    for value in outside:
        with pytest.raises(ConfigError, match=says):
            check_options({**DEFAULTS, "num_classes": 3, option: value})


def test_two_warmups_exclude_each_other():
    with pytest.raises(ConfigError, match=r"warmup_epochs \(1\.0\) and warmup_steps \(5\) are both set"):
        check_options({**DEFAULTS, "num_classes": 3, "warmup_epochs": 1.0, "warmup_steps": 5})
