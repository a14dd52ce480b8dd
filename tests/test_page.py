"""A page is one file whose script is the one that was shipped."""

import base64
import hashlib
import re

import pytest

from finetune.durations import duration
from finetune.errors import ConfigError
from finetune.page import TEMPLATES, render, value_text, write_page

EMPTY = {"runs": [], "different": "", "results": [], "figures": {}, "options": [], "classes": []}


def test_only_the_shipped_script_may_run():
    page = render("comparison.html", **EMPTY)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert script == (TEMPLATES / "page.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page


def test_a_name_is_text_wherever_it_stands():
    run = {"name": "</style><script>alert(1)</script>", "state": '" onclick="x', "link": '"><img src=x>', "colour": ""}
    page = render("comparison.html", **{**EMPTY, "runs": [run, run]})
    assert "<script>alert" not in page
    assert 'onclick="x' not in page
    assert "<img" not in page


def test_a_name_in_another_encoding_does_not_stop_the_page(tmp_path):
    path = write_page(tmp_path / "page.html", "a\udcffb")
    assert path.read_text() == "a?b"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere/page.html cannot be written: .* --out"):
        write_page(tmp_path / "nowhere" / "page.html", "")


@pytest.mark.parametrize(
    ("number", "text"), [(0.4, "0.4 s"), (59.96, "1 min 0 s"), (3600, "1 h 0 min"), (90_061, "25 h 1 min")]
)
def test_lengths_of_time(number, text):
    assert duration(number) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.001, "0.001"), (False, "false"), ("head", "head"), ([1, 2], "[1, 2]"), ({}, "{}")]
)
def test_values_read_as_they_are_typed(value, text):
    assert value_text(value) == text
