"""Files that are read back, checked once when they are opened: a typed value, or an error that names the place.

Each kind of file has a dataclass beside its reader, with bounds as `Annotated[int, Meta(ge=0)]` of msgspec:

    read_json(path, Record, what="the record of a run")
    read_yaml(path, dict[str, Any], what="the options of a run")
    decode_json(text, Card, what="the metadata of an exported model", where="model.onnx")
    convert(value, Stamp, what="a checkpoint's own entry", where="best.ckpt")

Keys that a dataclass does not know are ignored, as a later version may have written them; a `msgspec.Struct` with
`forbid_unknown_fields=True` refuses them. Size, depth and number of values are limited before anything is made of them, so that
a hostile file costs neither minutes nor the memory.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import msgspec
import yaml

from finetune.errors import CheckpointError, FinetuneError
from finetune.escaping import shown

T = TypeVar("T")

MAX_BYTES = 8 * 2**20
MAX_YAML_BYTES = 2**20  # far slower to read than JSON
MAX_DEPTH = 64
MAX_VALUES = 1_000_000
_MAX_PLAIN = 4096  # characters of a YAML scalar without quotes, which may be a number, such as 1:59:59 in base 60
_MAX_SHOWN = 60  # characters of a found value
_ROOT = "$"
_WHERE = re.compile(
    r"^(?P<expected>.*?)(?:, got `(?P<got>[^`]+)`)?(?: - at `(?P<place>\$.*?)`| - at `key` in `(?P<keys>\$.*?)`)?$", re.S
)
_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d+)\]|(\[\.\.\.\])")


class _InvalidError(Exception):
    """What is wrong with a file, before it is known which file that is."""

    def __init__(self, reason: str, place: str = "") -> None:
        super().__init__(f"at {place}, {reason}" if place else reason)


def read_json(
    path: str | os.PathLike[str],
    kind: type[T],
    what: str,
    *,
    advice: str = "",
    error: type[FinetuneError] = CheckpointError,
    max_bytes: int = MAX_BYTES,
    finite: bool = True,
) -> T:
    """Read a JSON file.

    Args:
        path: The file.
        kind: What it must hold: a dataclass, or any type that msgspec knows.
        what: What the file is, for the message, such as `the record of a run`.
        advice: What to do if it does not hold that.
        error: The class to raise.
        max_bytes: Its largest size.
        finite: Refuse NaN and Infinity.

    Raises:
        FinetuneError: Of the class `error`, if the file is missing, unreadable, no JSON, or holds something else.
    """
    text = read_text(path, what, advice=advice, error=error, max_bytes=max_bytes)
    return decode_json(text, kind, what, where=os.fspath(path), advice=advice, error=error, max_bytes=max_bytes, finite=finite)


def read_yaml(
    path: str | os.PathLike[str],
    kind: type[T],
    what: str,
    *,
    advice: str = "",
    error: type[FinetuneError] = CheckpointError,
    max_bytes: int = MAX_YAML_BYTES,
) -> T:
    """Read a YAML file with the safe loader; see `read_json`. An empty file is an empty mapping."""
    text = read_text(path, what, advice=advice, error=error, max_bytes=max_bytes)
    return decode_yaml(text, kind, what, where=os.fspath(path), advice=advice, error=error, max_bytes=max_bytes)


def read_text(
    path: str | os.PathLike[str],
    what: str,
    *,
    advice: str = "",
    error: type[FinetuneError] = CheckpointError,
    max_bytes: int = MAX_BYTES,
    errors: str = "strict",
    follow: bool = True,
) -> str:
    """Read a regular UTF-8 file of limited size; see `read_json`. A byte order mark is left out.

    Args:
        path: The file.
        what: What the file is.
        advice: What to do if it cannot be read.
        error: The class to raise.
        max_bytes: Its largest size.
        errors: How bytes that are no UTF-8 are decoded, as for `open`.
        follow: Whether the file may be a link.
    """
    name = os.fspath(path)
    try:
        no_links = 0 if follow else getattr(os, "O_NOFOLLOW", 0)
        # a named pipe would wait for a writer for ever
        descriptor = os.open(name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | no_links)
        with open(descriptor, "rb") as handle:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                _refuse("it is no regular file", what, name, advice, error)
            if status.st_size > max_bytes:
                _refuse(f"it is larger than {max_bytes / 2**20:.3g} MB", what, name, advice, error)
            content = handle.read(status.st_size)
        return content.decode("utf-8-sig", errors)
    except UnicodeDecodeError as found:
        raise error(f"{shown(name)} is no text in UTF-8: {found.reason} at byte {found.start}.{_sentence(advice)}") from found
    except (OSError, ValueError) as found:  # ValueError: a NUL in the name
        reason = getattr(found, "strerror", None) or found
        raise error(f"{shown(name)} ({what}) cannot be read: {reason}.{_sentence(advice)}") from found


def decode_json(
    text: str | bytes,
    kind: type[T],
    what: str,
    *,
    where: str = "",
    advice: str = "",
    error: type[FinetuneError] = CheckpointError,
    max_bytes: int = MAX_BYTES,
    finite: bool = True,
) -> T:
    """Read JSON from memory; see `read_json`.

    Args:
        text: The JSON.
        kind: What it must hold.
        what: What it is.
        where: The file it is from.
        advice: What to do if it does not hold that.
        error: The class to raise.
        max_bytes: Its largest size.
        finite: Refuse NaN and Infinity.
    """
    try:
        if len(text) > max_bytes:
            raise _InvalidError(f"it is larger than {max_bytes / 2**20:.3g} MB")
        value = json.loads(text, object_pairs_hook=_once)
    except _InvalidError as found:
        raise error(_message(str(found), what, where, advice)) from None
    except RecursionError:
        raise error(_message(f"it is nested deeper than {MAX_DEPTH} levels", what, where, advice)) from None
    except ValueError as found:  # no JSON, no UTF-8, an integer of thousands of digits
        raise error(_message(f"it is no JSON ({_shortened(str(found))})", what, where, advice)) from found
    return convert(value, kind, what, where=where, advice=advice, error=error, finite=finite)


def decode_yaml(
    text: str,
    kind: type[T],
    what: str,
    *,
    where: str = "",
    advice: str = "",
    error: type[FinetuneError] = CheckpointError,
    max_bytes: int = MAX_YAML_BYTES,
) -> T:
    """Read YAML from memory with the safe loader; see `decode_json`. An empty text is an empty mapping."""
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        if len(text) > max_bytes:
            raise _InvalidError(f"it is larger than {max_bytes / 2**20:.3g} MB")
        _check_yaml(yaml.parse(text, Loader=loader))
        value = yaml.load(text, Loader=loader)
    except _InvalidError as found:
        raise error(_message(str(found), what, where, advice)) from None
    except yaml.MarkedYAMLError as found:
        mark = found.problem_mark or found.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = _shortened(str(found.problem or found.context), 200)
        raise error(f"{shown(where) or 'This'}{place} is no YAML: {reason}.{_sentence(advice)}") from found
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as found:  # such as a date without such a day
        raise error(_message(f"it is no YAML ({_shortened(str(found))})", what, where, advice)) from found
    return convert({} if value is None else value, kind, what, where=where, advice=advice, error=error, finite=False)


def convert(
    value: Any,
    kind: type[T],
    what: str,
    *,
    where: str = "",
    advice: str = "",
    error: type[FinetuneError] = CheckpointError,
    finite: bool = True,
) -> T:
    """Turn plain values into a typed one; see `read_json`. Nothing is coerced: `"1"` is no number.

    Args:
        value: What was read: dicts, lists, strings, numbers, booleans, None.
        kind: What it must be.
        what: What it is.
        where: The file it is from.
        advice: What to do if it is something else.
        error: The class to raise.
        finite: Refuse NaN and infinity.
    """
    try:
        _check(value, finite)
        return msgspec.convert(value, kind)
    except _InvalidError as found:
        raise error(_message(str(found), what, where, advice)) from None
    except FinetuneError as found:  # of a check in __post_init__
        raise error(_message(str(found).removesuffix("."), what, where, advice)) from found
    except msgspec.ValidationError as found:
        raise error(_message(_explained(str(found), value), what, where, advice)) from found
    except (ValueError, RecursionError) as found:  # such as a key of bytes that are no text
        raise error(_message(_shortened(str(found)), what, where, advice)) from found


# ------------------------------------------------------------------------------------------------------------- limits


def _check(value: Any, finite: bool) -> None:
    """Look through plain values, without recursion; tensors and other objects are left to their reader.

    Raises:
        _InvalidError: If they are nested too deeply, too many, or hold a number or a text that no file of ours does.
    """
    levels: list[Iterator[tuple[Any, Any]]] = [iter([("", value)])]
    keys: list[Any] = []
    count = 0
    while levels:
        entry = next(levels[-1], None)
        if entry is None:
            levels.pop()
            keys = keys[:-1]
            continue
        key, item = entry
        count += 1
        if count > MAX_VALUES:
            raise _InvalidError(f"it holds more than {MAX_VALUES} values")
        wrong = _wrong_text(key) or _wrong_leaf(item, finite)
        if wrong:
            raise _InvalidError(wrong, _place([*keys, key][1:]))
        if isinstance(item, Mapping | list | tuple):
            if len(levels) > MAX_DEPTH:
                raise _InvalidError(f"it is nested deeper than {MAX_DEPTH} levels")
            levels.append(iter(item.items() if isinstance(item, Mapping) else enumerate(item)))
            keys.append(key)


def _wrong_leaf(item: Any, finite: bool) -> str:
    if isinstance(item, str):
        return _wrong_text(item)
    if isinstance(item, int) and abs(item) >= 2**64:
        return "found an integer of more than 64 bits"
    if finite and isinstance(item, float) and not math.isfinite(item):
        return f"expected a finite number, found {item}"
    return ""


def _wrong_text(item: Any) -> str:
    return "found a text with a NUL character" if isinstance(item, str) and "\0" in item else ""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _InvalidError(f"the key {_shortened(repr(twice))} is given twice")
    return found


class _Open:
    """A YAML collection whose end has not come yet."""

    def __init__(self, anchor: str | None, mapping: bool) -> None:
        self.anchor, self.mapping, self.values, self.children = anchor, mapping, 1, 0
        self.keys: set[str] = set()


def _check_yaml(events: Iterator[Any]) -> None:
    """Look through the events of a YAML file before anything is made of them.

    Raises:
        _InvalidError: If it is nested too deeply, refers to itself, names a key twice, or grows too large through its aliases.
    """
    open_: list[_Open] = [_Open(None, False)]
    sizes: dict[str, int] = {}
    for event in events:
        if isinstance(event, yaml.CollectionStartEvent):
            if len(open_) > MAX_DEPTH:
                raise _InvalidError(f"it is nested deeper than {MAX_DEPTH} levels")
            open_.append(_Open(event.anchor, isinstance(event, yaml.MappingStartEvent)))
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            done = open_.pop()
            size, anchor = done.values, done.anchor
        elif isinstance(event, yaml.AliasEvent):
            name = str(event.anchor)
            if any(level.anchor == name for level in open_):
                line = f"line {event.start_mark.line + 1}" if event.start_mark else "it"
                raise _InvalidError(f"{line} refers to itself (*{_shortened(name)})")
            size, anchor = sizes.get(name, 1), None
        elif isinstance(event, yaml.ScalarEvent):
            size, anchor = 1, event.anchor
            _check_scalar(open_[-1], event)
        else:
            continue
        open_[-1].values += size
        open_[-1].children += 1
        if anchor is not None:
            sizes[anchor] = size
        if open_[-1].values > MAX_VALUES:
            raise _InvalidError(f"it holds more than {MAX_VALUES} values, counting what its aliases repeat")


def _check_scalar(level: _Open, event: Any) -> None:
    line = event.start_mark.line + 1
    if event.implicit[0] and len(event.value) > _MAX_PLAIN:
        raise _InvalidError(f"line {line}: a value without quotes is longer than {_MAX_PLAIN} characters")
    if level.mapping and level.children % 2 == 0 and event.value != "<<":
        if event.value in level.keys:
            raise _InvalidError(f"line {line}: the key {_shortened(repr(event.value))} is given twice")
        level.keys.add(event.value)


# ----------------------------------------------------------------------------------------------------------- messages


def _explained(message: str, value: Any) -> str:
    """Turn msgspec's message into ours, with what was found."""
    match = _WHERE.match(message)
    if match is None:
        return _shortened(message, 200)
    expected = match["expected"].removeprefix("Object ").replace("`", "'")
    expected = expected[:1].lower() + expected[1:]
    steps = list(_STEP.finditer((match["place"] or match["keys"] or _ROOT).removeprefix(_ROOT)))
    keys = [step[1] if step[1] is not None else int(step[2]) if step[2] is not None else ... for step in steps]
    place = _place(keys)
    if match["keys"]:
        return f"{f'at {place}, ' if place else ''}a key is no text: {expected}"
    found: Any = value
    try:
        for key in keys:
            found = found[key]
        seen = (
            f", found {_shortened(repr(found) if isinstance(found, str | int | float | bool | None) else type(found).__name__)}"
        )
    except (KeyError, IndexError, TypeError):  # msgspec does not name the key of a mapping
        seen = f", found {match['got']}" if match["got"] else ""
    missing = "missing required field" in expected
    expected = expected.replace("missing required field", "expected the key")
    return f"{f'at {place}, ' if place else ''}{expected}{', which is missing' if missing else seen}"


def _place(keys: list[Any]) -> str:
    """Name a place the way it would be written in Python.

    >>> _place(["stages", 3, "parameters"])
    'stages[3].parameters'
    """
    text = "".join("[…]" if key is ... else f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)
    return _shortened(text.removeprefix("."), 200)


def _shortened(text: str, most: int = _MAX_SHOWN) -> str:
    text = shown(text[: most + 1])
    return f"{text[:most]}…" if len(text) > most else text


def _sentence(advice: str) -> str:
    return f" {advice}" if advice else ""


def _message(reason: str, what: str, where: str, advice: str) -> str:
    subject = f"{shown(where)} does not hold {what}" if where else f"This is not {what}"
    return f"{subject}: {reason}.{_sentence(advice)}"


def _refuse(reason: str, what: str, where: str, advice: str, error: type[FinetuneError]) -> NoReturn:
    raise error(_message(reason, what, where, advice))
