"""Files that are read back are checked at the door: a typed value or an error with file, place, expectation and finding."""

import json
import os
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Meta

from finetune.errors import CheckpointError, ConfigError, FinetuneError
from finetune.escaping import shown
from finetune.schema import MAX_BYTES, MAX_DEPTH, convert, decode_json, decode_yaml, read_json, read_text, read_yaml


@dataclass
class Stage:
    stage: str
    parameters: Annotated[int, Meta(ge=0)]
    lr: float | None = None


@dataclass
class Record:
    stages: list[Stage]
    best: dict[str, float]


FULL = {"stages": [{"stage": "a", "parameters": 3}, {"stage": "head", "parameters": 5, "lr": 0.1}], "best": {"value": 0.5}}


def changed(place, value):
    found = json.loads(json.dumps(FULL))
    inner = found
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return json.dumps(found)


def refused(text, kind=Record, decode=decode_json, **options):
    with pytest.raises(CheckpointError) as found:
        decode(text, kind, "the record of a run", where="r/record.json", advice="Remove it.", **options)
    return str(found.value)


def test_a_file_that_holds_becomes_typed_and_later_keys_are_ignored(tmp_path):
    path = tmp_path / "record.json"
    path.write_text(json.dumps({**FULL, "of a later version": {"a": [1]}}), encoding="utf-8-sig")  # as some editors save it
    found = read_json(path, Record, what="the record of a run")
    assert found.stages[1] == Stage("head", 5, 0.1)
    assert found.best == {"value": 0.5}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (changed(["stages", 1, "parameters"], "x"), "at stages[1].parameters, expected 'int', found 'x'. Remove it."),
        (changed(["stages", 1, "parameters"], -1), "at stages[1].parameters, expected 'int' >= 0, found -1."),
        (changed(["stages", 0], {"stage": "a"}), "at stages[0], expected the key 'parameters', which is missing."),
        (changed(["stages", 0, "stage"], "\0"), "at stages[0].stage, found a text with a NUL character"),
        (changed(["stages", 0, "stage"], 10**30), "at stages[0].stage, found an integer of more than 64 bits"),
        (changed(["best", "value"], float("nan")), "at best.value, expected a finite number, found nan"),
        (changed(["best", "value"], "1"), "at best[…], expected 'float', found str"),
        (changed(["stages", 0, "parameters"], True), "expected 'int', found True"),
        (changed(["stages", 0, "parameters"], "\x1b[2J" * 99), "found '\\x1b[2J\\x1b[2J"),
        ("null", "expected 'object', found None"),
        ("", "it is no JSON (Expecting value"),
        ('{"best": {}, "best": {}}', "the key 'best' is given twice"),
        ("[" * 100_000, f"deeper than {MAX_DEPTH} levels"),
        ("[" * 99 + "]" * 99, f"deeper than {MAX_DEPTH} levels"),
        ("9" * 5000, "it is no JSON"),
        (b"\xff", "it is no JSON"),
        ('{"\\ud800": 1}', "codec can't encode"),
        (" " * (MAX_BYTES + 1), "it is larger than 8 MB"),
    ],
)
def test_json_that_does_not_hold_is_named_with_place_expectation_and_finding(text, words):
    message = refused(text)
    assert message.startswith("r/record.json does not hold the record of a run: ")
    assert words in message
    assert len(message) < 300
    assert "\x1b" not in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &a\n  b: *a\n", "line 2 refers to itself (*a)"),
        ("a: 1\nb: 2\na: 3\n", "line 3: the key 'a' is given twice"),
        ("&0 [x, x]\n---\n", "is no YAML"),
        ("a: [", ", line 2, column 1 is no YAML: "),
        ("a: 2026-99-99", "it is no YAML (month"),
        ("[" * 60_000, "is no YAML"),
        ("[" * 99 + "]" * 99, f"deeper than {MAX_DEPTH} levels"),
        ("1: 2", "a key is no text"),
        ("[]: 1", "unhashable"),
        ("a: !!python/object/apply:os.abort []", "is no YAML"),
        ("- a", "expected 'object', found list"),
        ("a: 1" + ":59" * 200_000, "without quotes is longer than"),
        ("a: &b0 [x]\n" + "".join(f"k{i}: &b{i + 1} [{', '.join([f'*b{i}'] * 9)}]\n" for i in range(9)), "more than 1000000"),
    ],
)
def test_yaml_that_does_not_hold_is_named(text, words):
    assert words in refused(text, dict[str, Any], decode_yaml)


def test_yaml_as_people_write_it_is_read_as_the_safe_loader_reads_it():
    text = "base: &base {lr: 0.1, name: 2026-01-31}\nown: {<<: *base, lr: 1e-3, list: [*base, on, ~, 0o7, 1_000]}\n"
    assert decode_yaml(text, dict[str, Any], "options") == yaml.safe_load(text)
    assert decode_yaml("", dict[str, Any], "options") == {}


def test_many_values_are_refused():
    refused("[" + "[]," * (MAX_BYTES // 3 - 1) + "[]]", Any)
    refused("[" + "{a: b}," * 140_000 + "]", dict[str, Any], decode_yaml)


def test_only_regular_files_of_limited_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, words in [
        (tmp_path / "pipe", "no regular file"),
        (tmp_path, "cannot be read"),
        (tmp_path / "no", "No such file"),
    ]:
        with pytest.raises(ConfigError, match=words):
            read_json(path, Record, "a record", error=ConfigError)
    (tmp_path / "large").write_text("x" * 11)
    with pytest.raises(CheckpointError, match="larger than"):
        read_text(tmp_path / "large", "a table", max_bytes=10)
    (tmp_path / "latin").write_bytes("ä: 1".encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"no text in UTF-8: .* at byte 0"):
        read_yaml(tmp_path / "latin", dict[str, int], "options")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_text("a\0b", "a table")


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=3) | st.sampled_from(["stages", "best"]), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(PLAIN, st.sampled_from([Record, Stage, dict[str, Any], list[Stage], Any, int | str | None]))
@settings(deadline=None, derandomize=True, database=None, max_examples=300)
def test_any_plain_value_is_converted_without_loss_or_refused(value, kind):
    try:
        found = convert(value, kind, "a value")
    except FinetuneError as error:
        message = str(error)
    else:
        message = ""
    assert message == shown(message)
    if message:
        return
    if kind not in (Record, Stage, list[Stage]):
        assert found == value
    else:
        one = found[0] if isinstance(found, list) and found else found
        assert not isinstance(one, Record | Stage) or set(asdict(one)) <= {"stages", "best", "stage", "parameters", "lr"}


@given(st.text(max_size=60))
@settings(deadline=None, derandomize=True, database=None, max_examples=300)
def test_any_text_is_read_or_refused(text):
    for decode in (decode_json, decode_yaml):
        message = ""
        try:
            decode(text, dict[str, Any], "options")
        except FinetuneError as error:
            message = str(error)
        assert message == shown(message)
