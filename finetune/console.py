"""What the command prints. Every text passes `shown`, so that no name in it can steer a terminal.

No other module of the package calls `print`, and texts for the progress bar's line or for one of several processes go through
`tell`. What libraries warn of and log is cleaned while a command runs, see `clean_messages`.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from finetune.escaping import shown


class Prints(Protocol):
    """A trainer, or a module of Lightning: it prints on the first of several processes, and above a progress bar."""

    @property
    def print(self) -> Callable[..., None]:
        """Print a text."""


def clean(text: str) -> str:
    """Return a text of several lines as it can be printed."""
    return shown(text, keep="\n")


def say(text: object = "", *, error: bool = False) -> None:
    """Print a text on stdout, or on stderr if it is about a mistake."""
    print(clean(str(text)), file=sys.stderr if error else sys.stdout, flush=True)


def tell(through: Prints, text: str) -> None:
    """Print a text through a trainer or a module."""
    through.print(clean(text))


@contextmanager
def clean_messages() -> Iterator[None]:
    """Clean what is warned of and logged, which may hold names of files."""
    show, make = warnings.showwarning, logging.getLogRecordFactory()

    def show_clean(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        text = str(message)
        show(message if clean(text) == text else clean(text), *args, **kwargs)

    def make_clean(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        try:
            text = record.getMessage()
        except Exception:  # logging itself says what is wrong with such a message
            return record
        if clean(text) != text:
            record.msg, record.args = clean(text), None
        return record

    warnings.showwarning = show_clean
    logging.setLogRecordFactory(make_clean)
    try:
        yield
    finally:
        warnings.showwarning = show
        logging.setLogRecordFactory(make)
