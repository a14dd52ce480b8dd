"""The tree of errors, finding ours inside a library's, and the hint for a misspelt name."""

import re

import pytest

from finetune import errors
from finetune.errors import ConfigError, DataError, FinetuneError, did_you_mean, own_error


def test_the_tree_that_is_drawn_is_the_tree_that_is_there():
    drawn = re.findall(r"[├└]── (\w+)", errors.__doc__)
    classes = [name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, FinetuneError)]
    assert classes == ["FinetuneError", *drawn]
    assert all(getattr(errors, name).__bases__ == (FinetuneError,) for name in drawn)
    assert FinetuneError.__bases__ == (Exception,)


def wrapped(explicit):
    try:
        try:
            raise DataError("no picture")
        except DataError as error:
            if explicit:
                raise ValueError("wrapped") from error
            raise KeyError("while handling")  # noqa: B904
    except Exception as error:
        return error


@pytest.mark.parametrize("explicit", [True, False])
def test_our_error_is_found_inside_another(explicit):
    found = own_error(wrapped(explicit))
    assert type(found) is DataError
    assert str(found) == "no picture"


def test_the_outermost_of_ours_is_taken_and_a_circle_ends():
    inner, outer = DataError("inner"), ConfigError("outer")
    outer.__cause__ = inner
    assert own_error(outer) is outer
    a, b = ValueError("a"), ValueError("b")
    a.__cause__, b.__cause__ = b, a
    assert own_error(a) is None
    assert own_error(None) is None


@pytest.mark.parametrize(
    ("word", "options", "hint"),
    [
        ("resnt18", ["resnet18", "resnet50", "vit"], " Did you mean 'resnet18'?"),
        ("RESNET18", ["resnet18"], " Did you mean 'resnet18'?"),
        ("adamW", ["SGD", "AdamW"], " Did you mean 'AdamW'?"),
        ("qqqq", ["resnet18", "head"], ""),
        ("head", [], ""),
    ],
)
def test_did_you_mean(word, options, hint):
    assert did_you_mean(word, options) == hint
    assert did_you_mean(word, iter(options)) == hint
