"""The end of a run that was stopped: what to type to go on, and the exit code."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from finetune import checkpoints
from finetune.errors import CheckpointError
from finetune.interrupts import exit_code
from finetune.resuming import progress_text
from finetune.runs import CHECKPOINTS
from finetune.saving import LAST


def stop_signal(stop: BaseException) -> int | None:
    """Return the signal behind an exception, or None; Lightning itself leaves with 1 after Ctrl-C and with 0 after SIGTERM."""
    if isinstance(stop, SIGTERMException) or (isinstance(stop, SystemExit) and stop.code == exit_code(signal.SIGTERM)):
        return signal.SIGTERM
    if isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt):
        return signal.SIGINT
    return None


def code_of(stop: BaseException, asked: int | None = None) -> int | str | None:
    """Return the exit code for a stop: 130 after Ctrl-C, 143 after SIGTERM; processes that the first one started leave with 0.

    Args:
        stop: The exception.
        asked: The signal that was noted before, if any.
    """
    number = stop_signal(stop) or asked
    if number is None:
        return stop.code if isinstance(stop, SystemExit) else 1
    return 0 if getattr(rank_zero_only, "rank", 0) else exit_code(number)


def how_to_go_on(run: Path | None) -> str:
    """Return what to tell the user about a run that was stopped.

    Args:
        run: The run's folder, relative to where the user is.
    """
    last = None if run is None else run / CHECKPOINTS / LAST
    if last is None or not last.is_file():
        return "\nStopped before there was a checkpoint to go on from."
    try:
        done = f" ({progress_text(checkpoints.read(last))})"
    except CheckpointError:
        done = ""
    return f"\nStopped. To go on from the last checkpoint{done}: resnet-finetune fit --ckpt_path {shlex.quote(str(run))}"
