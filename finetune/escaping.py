"""Names that others chose, such as those of files and classes, on a terminal and in a table for a spreadsheet.

A name may hold letters that steer a terminal (colours, the window's title, a line that is drawn over), that turn the direction
of writing, or that a spreadsheet takes for a formula. They are shown, and do nothing.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

_FORMULA = "=+-@\t\r\n"
_GUARDED = re.compile(rf"'*[{re.escape(_FORMULA)}]")


def shown(text: str, keep: str = "") -> str:
    r"""Return a name as it can be printed: letters that steer, and bytes that are no letters, become their codes.

    Args:
        text: The name.
        keep: Control characters that stay, such as the ends of lines in a message.

    >>> print(shown("a\x1b[31m\n\u202egpj.exe\udce9"))
    a\x1b[31m\n\u202egpj.exe\xe9
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(letter if letter in keep or not _steers(letter) else _code(letter) for letter in text)


def _steers(letter: str) -> bool:
    joins = letter in "\u200c\u200d"  # within emoji and some scripts
    return unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp") and not joins


def _code(letter: str) -> str:
    number = ord(letter)
    if 0xDC80 <= number <= 0xDCFF:  # a byte that is no letter in the encoding of file names
        return f"\\x{number - 0xDC00:02x}"
    short = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(letter)
    return short or (f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}")


def cell(text: str) -> str:
    """Return a name for a cell of a CSV file, which spreadsheets would otherwise take for a formula; `from_cell` undoes it.

    >>> cell("=1+1"), cell("a=1"), cell("'=1")
    ("'=1+1", 'a=1', "''=1")
    """
    return f"'{text}" if _GUARDED.match(text) else text


def cells(texts: Iterable[str]) -> list[str]:
    """Return names for the cells of a row, see `cell`."""
    return [cell(text) for text in texts]


def column(name: str) -> str:
    r"""Return a name for the head of a column, where nothing looks for it by the letters that are replaced.

    >>> column("val/acc"), column("=1+1"), column(column("=1+1")), column("\x1b[2J")
    ('val/acc', "'=1+1", "'=1+1", '\\x1b[2J')
    """
    return cell(from_cell(shown(name)))


def from_cell(text: str) -> str:
    """Return the name that `cell` was given.

    >>> [from_cell(cell(name)) for name in ("=1", "'=1", "'a", "-")]
    ['=1', "'=1", "'a", '-']
    """
    return text[1:] if text.startswith("'") and _GUARDED.match(text) else text
