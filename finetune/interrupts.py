"""Signals that ask a run to stop: noted when they come, obeyed when the step is done.

A signal may come in the middle of anything, where nothing can be kept. Here it is only noted; whoever trains asks between two
steps whether there is one. The second signal stops at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable
from types import FrameType
from typing import Any

STOPS = (signal.SIGINT, signal.SIGTERM)
_AGAIN = b"\nStopping after this step, or after the validation that is going on, with a checkpoint. Again to stop at once.\n"


class Interrupts:
    """The signals of a process that trains.

    Attributes:
        asked: The signal that came, or None.
        training: Whether there is something to be kept; until then a stop is obeyed at once.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self.training = False
        self._before: dict[int, Any] = {}
        self._process = os.getpid()

    def listen(self, signals: Iterable[int] = STOPS) -> None:
        """Take over these signals, in place of whoever had them; `forget` gives them back. Only the main thread can.

        Args:
            signals: Their numbers.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        self._process = os.getpid()  # not the one that made it, where training goes on in a fork
        for number in signals:
            before = signal.signal(number, self._note)
            if before != self._note:
                self._before.setdefault(number, before)

    def forget(self) -> None:
        """Give the signals back."""
        if threading.current_thread() is threading.main_thread():
            for number, before in self._before.items():
                signal.signal(number, signal.SIG_DFL if before is None else before)
        self._before, self.training = {}, False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a process that reads pictures, forked from this one; its parent decides
            return
        first, self.asked = self.asked is None, number
        if number in STOPS and not (first and self.training):
            raise _exception(number)
        if number == signal.SIGINT:
            os.write(2, _AGAIN)  # print may be what was interrupted


def _exception(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(exit_code(number))


def exit_code(number: int) -> int:
    """Return what a shell calls the end of a process by a signal.

    >>> exit_code(signal.SIGTERM), exit_code(signal.SIGINT)
    (143, 130)
    """
    return 128 + number
